"""A small world for the scaling core: groups start after a while, gateways report each second.

It stands in for Ray Serve and the gateways as the core sees them, through observations only. What
it does not have: network failures, replicas that come and go one by one, Serve's own restarts; the
loop's tests have those.

With traffic it is measured by tokens: a group with b requests in its batch takes t0 + s * b for an
iteration, at once and without noise, and what the groups cannot carry waits in the gateway.
"""

from dataclasses import dataclass, field, replace

from expertmesh.core.domain.deployment import ScalingRules
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.scaling.contract import (
    ApplicationSeen,
    Decision,
    Grant,
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
from expertmesh.core.scaling.kinds import option_name
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


OUTPUT = 256.0
PER_GROUP = 5.0
"""Requests a second, of 256 tokens, that one group as planned carries at a TPOT of 50 ms."""


@dataclass(frozen=True)
class Truth:
    """What groups of an option really do."""

    per_request_s: float = 0.03 / 64
    """By which each request in the batch makes an iteration longer."""
    lone_tpot_s: float = 0.02
    places: float = 96.0
    kv_requests: float = 1000.0
    """Requests that fill the cache."""


@dataclass(frozen=True)
class Traffic:
    per_s: float
    output_tokens: float = OUTPUT
    prompt_tokens: float = 100.0


def size_option(
    of: Pool, scale: int = 1, *, start_s: float = 60.0, known: bool = True
) -> GroupOption:
    """Groups of `2 * scale` workers that do `scale` times as much as the smallest."""
    rates = GroupRates(256.0 * scale, 1e6 * scale, 1280.0 * scale, 0.02)
    return GroupOption(
        of.name,
        Parallelism(tensor=1, data=2 * scale, expert=2 * scale),
        of.usd_per_hour(2 * scale),
        rates if known else GroupRates(256.0 * scale),
        start_s,
    )


def token_config(
    *options: GroupOption, pools: tuple[Pool, ...] = (), **changes: object
) -> ScalingConfig:
    """By default one pool of plain nodes, held as long as a restart takes, without an up-delay."""
    if not options:
        pools = pools or (pool("only", 0.5, nodes=40),)
        options = tuple(size_option(each) for each in pools)
    plain: dict[str, object] = {"up_delay_s": 0.0, "down_delay_s": None, "max_groups": 12}
    base = config(*pools, **(plain | changes))  # type: ignore[arg-type]
    return replace(base, options=options)


@dataclass
class Running:
    spec: GroupSpec
    asked_at_s: float
    ready_at_s: float
    fails: bool = False
    mute: bool = False
    """Its ranks do not answer any more."""
    leaving_at_s: float | None = None
    """As the provider has announced."""
    dead: bool = False
    """Its nodes are."""


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
    traffic: Traffic | None = None
    """None: not measured by tokens."""
    truths: dict[str, Truth] = field(default_factory=dict)
    """By option, where it is not as planned."""
    backlog: float = 0.0
    """Requests that wait for want of capacity."""
    all_came_at_s: float | None = None
    """When those that wait came; None: as they come, one by one."""
    provider: bool = False
    """An external provider takes what groups cannot carry."""
    grant: Grant | None = None
    _flow: Flow | None = None
    _doing: dict[str, GroupDoing] = field(default_factory=dict)

    def observation(self, queued: int) -> Observation:
        heard = [
            GatewaySeen(
                gateway=name,
                heard_at_s=self.now_s,
                knows_s=self.now_s - 1,
                queued=queued + round(self.backlog) if index == 0 else 0,
                oldest_wait_s=self.wait_s if index == 0 else 0.0,
                in_flight=dict(self.in_flight) if index == 0 else {},
                flow=self._flow if index == 0 else None,
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
            grant=self.grant,
        )

    @property
    def wait_s(self) -> float:
        if self.all_came_at_s is not None and self.backlog:
            return self.now_s - self.all_came_at_s
        per_s = self.traffic.per_s if self.traffic else 0.0
        return self.backlog / per_s if per_s else 0.0

    def step(self, queued: int = 0, dt_s: float = 1.0) -> Decision:
        """Decide on what is there now, do it, and let time pass."""
        if self.traffic is not None:
            self._serve(self.traffic, dt_s)
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

    def _serve(self, traffic: Traffic, dt_s: float) -> None:
        truths = {
            name: self._truth(run)
            for name, run in self.running.items()
            if name in self.serving and not run.dead
        }
        most = {
            name: truth.places
            / (truth.lone_tpot_s + truth.per_request_s * truth.places)
            / traffic.output_tokens
            for name, truth in truths.items()
        }
        asked = traffic.per_s + self.backlog / dt_s
        served = min(asked, sum(most.values()))
        self.backlog = 0.0 if self.provider else (asked - served) * dt_s
        finished, outside = served, asked - served if self.provider else 0.0
        self._doing, self.in_flight = {}, {}
        for name, truth in truths.items():
            tokens_per_s = served * most[name] / sum(most.values()) * traffic.output_tokens
            busy = tokens_per_s * truth.per_request_s
            batch = tokens_per_s * truth.lone_tpot_s / (1.0 - busy)
            self.in_flight[name] = round(batch)
            self._doing[name] = GroupDoing(
                at_s=self.now_s,
                span_s=10.0,
                running=round(batch),
                waiting=0,
                kv_usage=min(1.0, batch / truth.kv_requests),
                uncached_prompt_tokens_per_s=tokens_per_s
                * traffic.prompt_tokens
                / traffic.output_tokens,
                output_tokens_per_s=tokens_per_s,
                ttft_s=0.2 if batch else None,
                tpot_s=truth.lone_tpot_s + truth.per_request_s * batch if batch else None,
            )
        self._flow = Flow(
            10.0,
            traffic.per_s,
            traffic.per_s * traffic.prompt_tokens,
            finished,
            finished * traffic.prompt_tokens,
            finished * traffic.output_tokens,
            outside,
            outside * traffic.prompt_tokens,
            outside * traffic.output_tokens,
        )

    def _truth(self, run: Running) -> Truth:
        name = option_name(run.spec)
        scale = run.spec.parallelism.data / 2
        return self.truths.get(name) or Truth(0.03 / 64 / scale, places=96.0 * scale)

    def steps(self, seconds: int, queued: int = 0) -> list[Decision]:
        return [self.step(queued) for _ in range(seconds)]

    def run(self, seconds: int, dt_s: float = 5.0) -> list[Decision]:
        """A course by tokens, in longer steps."""
        return [self.step(dt_s=dt_s) for _ in range(round(seconds / dt_s))]

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
        silent = run.mute or run.dead
        replicas = tuple(
            ReplicaSeen("RUNNING" if ready else "STARTING", f"node-{index}/{index}", not run.dead)
            for index in range(world)
        )
        ranks = tuple(
            RankSeen(
                base_url=f"http://{name}:{index}",
                failures=3 if silent else 0,
                index=None if silent else index,
                world_size=None if silent else world,
            )
            for index in range(world)
            if ready and not run.fails
        )
        return GroupSeen(
            name,
            ApplicationSeen(status, "", replicas),
            ranks,
            True,
            doing=self._doing.get(name),
            leaving_at_s=run.leaving_at_s,
        )

    def _leaving(self) -> list[GroupSeen]:
        """Groups that are out of Serve; their placement groups have disappeared with them."""
        return [
            GroupSeen(record.spec.name, None, (), False)
            for record in self.state.groups
            if record.spec.name not in self.running
        ]
