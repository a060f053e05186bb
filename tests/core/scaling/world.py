"""A small world for the scaling core: groups start after a while, gateways report each second.

It stands in for Ray Serve and the gateways as the core sees them, through observations only. What
it does not have: network failures, replicas that come and go one by one, Serve's own restarts; the
loop's tests have those.
"""

from dataclasses import dataclass, field, replace

from expertmesh.core.domain.deployment import ScalingRules
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.scaling.contract import (
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
from expertmesh.core.scaling.demand import GatewaySeen
from expertmesh.core.scaling.policy import decide
from expertmesh.core.scaling.replay import DecisionRecord

EP2 = Parallelism(tensor=1, data=2, expert=2)


def pool(
    name: str, usd: float = 1.0, nodes: int = 2, market: Market = Market.LOCAL, workers: int = 1
) -> Pool:
    return Pool(
        name=name,
        market=market,
        usd_per_node_hour=usd,
        accelerator=None,
        accelerators_per_node=0,
        cpus_per_node=workers,
        min_nodes=nodes,
        max_nodes=nodes,
    )


def rules(**changes: object) -> ScalingRules:
    base = ScalingRules(
        min_groups=0,
        max_groups=4,
        target_in_flight_per_group=8,
        up_delay_s=3.0,
        down_delay_s=15.0,
        drain_deadline_s=60.0,
        usd_per_hour_budget=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def config(*pools: Pool, timing: Timing | None = None, **changes: object) -> ScalingConfig:
    pools = pools or (pool("cheap", 0.3), pool("dear", 0.45))
    changed = rules(**changes)
    rates = GroupRates(in_flight=changed.target_in_flight_per_group)
    return ScalingConfig(
        model="tiny",
        source="/models/tiny",
        max_model_len=1024,
        rules=changed,
        pools=pools,
        options=tuple(
            GroupOption(each.name, EP2, each.usd_per_hour(2), rates, start_s=60.0) for each in pools
        ),
        timing=timing or Timing(),
    )


@dataclass
class Running:
    spec: GroupSpec
    asked_at_s: float
    ready_at_s: float
    fails: bool = False
    mute: bool = False
    """Its ranks do not answer any more."""


@dataclass
class World:
    config: ScalingConfig
    start_s: float = 20.0
    now_s: float = 1000.0
    live: dict[str, int] = field(default_factory=dict)
    """Live workers by pool, where they differ from the pool's nodes."""
    failing_pools: set[str] = field(default_factory=set)
    state: ModelState = field(default_factory=ModelState)
    running: dict[str, Running] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    gateways: tuple[str, ...] = ("g1",)
    silent: dict[str, GatewaySeen] = field(default_factory=dict)
    """Gateways whose last report stays."""
    serve_answers: bool = True
    journal_writes: bool = True
    settled: bool = True
    records: list[DecisionRecord] = field(default_factory=list)

    def observation(self, queued: int) -> Observation:
        heard = [
            GatewaySeen(
                gateway=name,
                heard_at_s=self.now_s,
                knows_s=self.now_s - 1,
                queued=queued if index == 0 else 0,
                in_flight=dict(self.in_flight) if index == 0 else {},
            )
            for index, name in enumerate(self.gateways)
        ]
        return Observation(
            groups=(*(self._seen(name) for name in sorted(self.running)), *self._leaving()),
            pools=tuple(
                PoolSeen(p.name, self.live.get(p.name, p.max_nodes * p.workers_per_node), 0)
                for p in self.config.pools
            ),
            gateways=(*heard, *self.silent.values()),
            serve_answers=self.serve_answers,
            journal_writes=self.journal_writes,
            settled=self.settled,
        )

    def step(self, queued: int = 0, dt_s: float = 1.0) -> Decision:
        """Decide on what is there now, do it, and let time pass."""
        observation = self.observation(queued)
        before = self.state
        decision = decide(self.config, before, observation, self.now_s)
        self.records.append(DecisionRecord(self.now_s, self.config, before, observation, decision))
        self.state = decision.state
        wanted = {r.spec.name: r.spec for r in self.state.groups if r.removed_at_s is None}
        self.running = {name: run for name, run in self.running.items() if name in wanted}
        for name, spec in wanted.items():
            if name not in self.running:
                fails = spec.pool in self.failing_pools
                self.running[name] = Running(spec, self.now_s, self.now_s + self.start_s, fails)
        for name in [name for name in self.in_flight if name not in self.running]:
            del self.in_flight[name]
        self.now_s += dt_s
        return decision

    def steps(self, seconds: int, queued: int = 0) -> list[Decision]:
        return [self.step(queued) for _ in range(seconds)]

    def silence(self, gateway: str, queued: int = 0) -> None:
        """The gateway reports once more and then never again."""
        self.gateways = tuple(name for name in self.gateways if name != gateway)
        self.silent[gateway] = GatewaySeen(gateway, self.now_s, self.now_s - 1, queued)

    def in_state(self, state: GroupState) -> list[str]:
        return [r.spec.name for r in self.state.groups if r.state is state]

    @property
    def serving(self) -> list[str]:
        return self.in_state(GroupState.READY)

    def _seen(self, name: str) -> GroupSeen:
        run = self.running[name]
        ready = self.now_s >= run.ready_at_s
        status = "DEPLOYING"
        if ready:
            status = "DEPLOY_FAILED" if run.fails else "RUNNING"
        world = run.spec.parallelism.data
        replicas = tuple(
            ReplicaSeen("RUNNING" if ready else "STARTING", f"node-{index}/{index}", True)
            for index in range(world)
        )
        ranks = tuple(
            RankSeen(
                base_url=f"http://{name}:{index}",
                failures=3 if run.mute else 0,
                index=None if run.mute else index,
                world_size=None if run.mute else world,
            )
            for index in range(world)
            if ready and not run.fails
        )
        return GroupSeen(name, ApplicationSeen(status, "", replicas), ranks, True)

    def _leaving(self) -> list[GroupSeen]:
        """Groups that are out of Serve; their placement groups have disappeared with them."""
        return [
            GroupSeen(record.spec.name, None, (), False)
            for record in self.state.groups
            if record.spec.name not in self.running
        ]
