"""The platform's own scaling core at the wheel of a simulated fleet."""

from dataclasses import replace

from expertmesh.core.domain.deployment import ScalingRules
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Parallelism
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.option import GroupOption
from expertmesh.core.scaling.contract import (
    ActionKind,
    ApplicationSeen,
    Decision,
    GroupSeen,
    ModelState,
    Observation,
    PoolSeen,
    RankSeen,
    ReplicaSeen,
    ScalingConfig,
    Timing,
)
from expertmesh.core.scaling.demand import Flow, GatewaySeen, GroupDoing
from expertmesh.core.scaling.policy import decide
from expertmesh.simulator.policy import Drain, GroupView, Move, Recall, Start, View
from expertmesh.simulator.scenario import Scenario

_MODEL = "simulated"
_GATEWAY = "simulated"
_STATUS = {
    GroupState.STARTING: "DEPLOYING",
    GroupState.READY: "RUNNING",
    GroupState.DRAINING: "RUNNING",
    GroupState.LOST: "UNHEALTHY",
}


class CorePolicy:
    """Turns views into the core's observations, and its actions into moves. Each group is one rank
    with all its workers; what a rank is makes no difference to the core."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._config = _config(scenario)
        self._options = {option.name: index for index, option in enumerate(self._config.options)}
        self._state = ModelState()
        self._known: dict[str, str] = {}
        """By the simulator's name of a group, the core's."""
        self._asked: list[tuple[str, int]] = []
        """Groups asked for in the last turn: the core's name and the option."""
        self.decision: Decision | None = None
        """The last one."""

    @property
    def name(self) -> str:
        return "expertmesh"

    def decide(self, view: View) -> tuple[Move, ...]:
        self._meet(view)
        decision = decide(self._config, self._state, self._observation(view), view.now_s)
        self._state = decision.state
        self.decision = decision
        theirs = {ours: name for name, ours in self._known.items()}
        states = {group.name: group.state for group in view.groups}
        moves: list[Move] = []
        self._asked = []
        for action in decision.actions:
            match action.kind:
                case ActionKind.START:
                    assert action.spec is not None
                    option = self._option_of(action.spec.pool, action.spec.parallelism)
                    self._asked.append((action.group, option))
                    moves.append(Start(option))
                case ActionKind.RECALL if action.group in theirs:
                    moves.append(Recall(theirs[action.group]))
                case ActionKind.DRAIN | ActionKind.REMOVE if action.group in theirs:
                    name = theirs[action.group]
                    if states.get(name) in (GroupState.STARTING, GroupState.READY):
                        moves.append(Drain(name))
        return tuple(moves)

    def _option_of(self, pool: str, parallelism: Parallelism) -> int:
        return next(
            index
            for index, option in enumerate(self._config.options)
            if (option.pool, option.parallelism) == (pool, parallelism)
        )

    def _meet(self, view: View) -> None:
        """Give the groups that appeared the names that the core asked for."""
        for group in view.groups:
            if group.name in self._known:
                continue
            asked = next((each for each in self._asked if each[1] == group.option), None)
            if asked is not None:
                self._asked.remove(asked)
                self._known[group.name] = asked[0]
            else:
                pool = self._config.options[group.option].pool
                self._known[group.name] = f"em-{_MODEL}-{pool}-{9_000_000 + len(self._known)}"
        shown = {group.name for group in view.groups}
        self._known = {name: ours for name, ours in self._known.items() if name in shown}

    def _observation(self, view: View) -> Observation:
        seen = {self._known[group.name]: self._seen(group, view) for group in view.groups}
        gone = [
            GroupSeen(record.spec.name, None, (), False)
            for record in self._state.groups
            if record.spec.name not in seen
        ]
        heard_at_s = view.now_s - self._scenario.metric_delay_s
        flow = Flow(
            span_s=view.window_s,
            arrivals_per_s=view.arrivals_per_s,
            arrived_prompt_tokens_per_s=view.arrived_prompt_tokens_per_s,
            finished_per_s=view.finished_per_s,
            uncached_prompt_tokens_per_s=view.finished_per_s * view.finished_prompt_tokens,
            output_tokens_per_s=view.finished_per_s * view.finished_output_tokens,
        )
        gateway = GatewaySeen(
            gateway=_GATEWAY,
            heard_at_s=heard_at_s,
            knows_s=view.now_s,
            queued=round(view.queued),
            queued_prompt_tokens=round(view.queued_prompt_tokens),
            oldest_wait_s=view.oldest_wait_s,
            flow=flow,
            in_flight={
                self._known[group.name]: round(group.in_flight)
                for group in view.groups
                if group.in_flight >= 0.5
            },
        )
        return Observation(
            groups=(*seen.values(), *gone), pools=self._pools(view), gateways=(gateway,)
        )

    def _seen(self, group: GroupView, view: View) -> GroupSeen:
        name = self._known[group.name]
        lost = group.state is GroupState.LOST
        failed = lost and all(
            record.spec.name != name or not record.served for record in self._state.groups
        )
        status = "DEPLOY_FAILED" if failed else _STATUS[group.state]
        ready = group.state in (GroupState.READY, GroupState.DRAINING)
        replica = ReplicaSeen("RUNNING" if ready else "STARTING", f"{name}/1", not lost)
        known = any(record.spec.name == name for record in self._state.groups)
        at_s = view.now_s - self._scenario.metric_delay_s
        return GroupSeen(
            name=name,
            application=ApplicationSeen(status, "", (replica,)),
            ranks=(RankSeen(name, 0, 0, 1),) if ready else (),
            placement_group=True,
            spec=None if known else self._spec(name, group.option),
            held_since_s=group.requested_at_s,
            doing=GroupDoing(
                at_s=at_s,
                span_s=view.window_s,
                running=round(group.in_flight - group.waiting),
                waiting=round(group.waiting),
                kv_usage=group.kv_usage,
                uncached_prompt_tokens_per_s=group.prompt_tokens_per_s,
                output_tokens_per_s=group.output_tokens_per_s,
                ttft_s=group.ttft_s,
                tpot_s=group.tpot_s,
            )
            if ready
            else None,
            leaving_at_s=view.notices.get(group.name),
        )

    def _spec(self, name: str, option: int) -> GroupSpec:
        chosen = self._config.options[option]
        return GroupSpec(
            name=name,
            model=_MODEL,
            model_source=_MODEL,
            pool=chosen.pool,
            parallelism=chosen.parallelism,
            max_model_len=0,
            usd_per_hour=chosen.usd_per_hour,
        )

    def _pools(self, view: View) -> tuple[PoolSeen, ...]:
        """What is not free is taken by others, whatever the reason."""
        seen = []
        for pool in self._config.pools:
            here = [
                index
                for index, option in enumerate(self._config.options)
                if option.pool == pool.name
            ]
            free = max(view.room[index] * self._config.options[index].workers for index in here)
            own = sum(
                record.spec.parallelism.tensor
                for record in self._state.groups
                if record.spec.pool == pool.name
            )
            seen.append(PoolSeen(pool.name, None, max(0, pool.max_nodes - own - free)))
        return tuple(seen)


def _config(scenario: Scenario) -> ScalingConfig:
    options = tuple(
        replace(each.option, parallelism=_one_rank(each.option)) for each in scenario.options
    )
    pools: dict[str, Pool] = {}
    for each, option in zip(scenario.options, options, strict=True):
        workers = each.max_groups * option.workers
        known = pools.get(option.pool)
        pools[option.pool] = Pool(
            name=option.pool,
            market=each.market,
            usd_per_node_hour=option.usd_per_hour / option.workers,
            accelerator=None,
            accelerators_per_node=0,
            cpus_per_node=1,
            min_nodes=0,
            max_nodes=max(workers, known.max_nodes if known else 0),
        )
    longest_s = max(each.option.start_s for each in scenario.options)
    return ScalingConfig(
        model=_MODEL,
        source=_MODEL,
        max_model_len=0,
        rules=ScalingRules(
            min_groups=scenario.min_groups,
            max_groups=sum(each.max_groups for each in scenario.options),
            target_in_flight_per_group=options[0].rates.in_flight,
            up_delay_s=0.0,
            down_delay_s=None,
            drain_deadline_s=scenario.drain_deadline_s,
            usd_per_hour_budget=scenario.budget_usd_per_hour,
        ),
        pools=tuple(pools.values()),
        options=options,
        timing=Timing(
            gateway_stale_s=scenario.metric_delay_s + scenario.tick_s,
            start_deadline_s=4 * longest_s,
        ),
        slo=scenario.slo,
        max_wait_s=scenario.max_wait_s,
    )


def _one_rank(option: GroupOption) -> Parallelism:
    return Parallelism(tensor=option.workers, data=1, expert=option.workers)
