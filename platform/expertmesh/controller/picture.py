"""The fleet as a person sees it: pools with their nodes, groups with their ranks and experts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from expertmesh.controller.loads import EngineLoads
from expertmesh.controller.recent import Recent
from expertmesh.core.domain.fleet import RankInfo
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.contract import Decision, GroupRecord, ScalingConfig
from expertmesh.core.scaling.demand import GroupDoing
from expertmesh.core.scaling.hindsight import Regret


class NodeSeen(Protocol):
    """A node as Ray lists it."""

    @property
    def node_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def pool(self) -> str | None: ...
    @property
    def workers_total(self) -> float: ...


@dataclass(frozen=True, slots=True)
class NodeShown:
    id: str
    name: str
    workers: float
    """Engine workers that fit on it."""


@dataclass(frozen=True, slots=True)
class PoolShown:
    name: str
    market: str
    accelerator: str | None
    usd_per_node_hour: float
    max_nodes: int
    nodes: tuple[NodeShown, ...] | None
    """Those that live; None: they could not be listed."""
    groups_usd_per_hour: float
    idle_usd_per_hour: float | None
    """Of the parts of live nodes that no group occupies; None: not known."""


@dataclass(frozen=True, slots=True)
class RankShown:
    index: int
    node: str | None
    """Id of its node; None: not known."""
    answered_at_s: float | None = None
    """None: it has not answered, or its group does not serve."""
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupShown:
    name: str
    model: str
    pool: str
    state: str
    since_s: float
    requested_at_s: float
    expected_ready_at_s: float | None
    message: str
    usd_per_hour: float
    tensor: int
    data: int
    expert: int
    ranks: tuple[RankShown, ...]


@dataclass(frozen=True, slots=True)
class HindsightShown:
    """Of the model's groups until `until_s`, when it was last computed."""

    until_s: float
    span_s: float
    spent_usd: float
    least_usd: float
    """For the same work, by one who knew it in advance."""


@dataclass(frozen=True, slots=True)
class ModelShown:
    name: str
    mode: str
    min_groups: int
    max_groups: int
    budget_usd_per_hour: float | None
    ttft_target_s: float
    tpot_target_s: float
    decided_at_s: float | None
    """The rest is as of then."""
    reason: str = ""
    binding: str = ""
    pending: str | None = None
    need: int = 0
    wanted: int = 0
    ready: int = 0
    coming: int = 0
    queued: int = 0
    running: int = 0
    oldest_wait_s: float = 0.0
    live_gateways: int = 0
    stale_gateways: int = 0
    wait_s: float | None = 0.0
    """Predicted for a request that comes now; None: the groups fall behind."""
    load: float = 0.0
    """Like the next: in units of what one group of the first option can do."""
    load_needed: float = 0.0
    load_ready: float = 0.0
    arrivals_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    ttft_s: float | None = None
    """Like the next: of its slowest group; None: no answer lately."""
    tpot_s: float | None = None
    target: dict[str, int] = field(default_factory=dict)
    """Groups wanted, by option."""
    advice: tuple[str, ...] = ()
    hindsight: HindsightShown | None = None
    """None: not computed yet, or there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Picture:
    turned_at_s: float
    """When the controller last looked and decided."""
    pools: tuple[PoolShown, ...]
    groups: tuple[GroupShown, ...]
    models: tuple[ModelShown, ...]
    usd_per_hour: float
    """Of all groups and, as far as it is known, of what stands idle."""


@dataclass(frozen=True, slots=True)
class ExpertHeat:
    """How often the experts of one group were asked."""

    ranks: dict[int, dict[str, int]]
    """By rank and expert: tokens, over all layers."""
    lately: bool
    """Over about the last ten seconds; otherwise, when there were none, since the ranks started."""
    imbalance: float | None
    """Tokens of the heaviest rank over the mean of all; None: there were none."""


def picture(
    turned_at_s: float,
    configs: Iterable[ScalingConfig],
    decisions: Mapping[str, tuple[float, Decision]],
    records: Iterable[GroupRecord],
    nodes: Iterable[NodeSeen] | None,
    engines: EngineLoads,
    doing: Mapping[str, GroupDoing],
    regrets: Mapping[str, Regret],
) -> Picture:
    """`decisions`: the newest of each model and its time. `nodes`: None when they could not be
    listed. `doing`: by group. `regrets`: by model."""
    configs, records = tuple(configs), tuple(records)
    found: dict[str, Pool] = {pool.name: pool for one in configs for pool in one.pools}
    seen = None if nodes is None else tuple(node for node in nodes if node.alive)
    pools = tuple(
        _pool(pool, records, seen)
        for _, pool in sorted(found.items())
        if pool.market is not Market.EXTERNAL
    )
    groups = sorted((_group(record, engines) for record in records), key=lambda group: group.name)
    models = tuple(
        replace(
            _model(config, decisions.get(config.model), groups, doing),
            hindsight=_hindsight(regrets.get(config.model)),
        )
        for config in configs
    )
    idle = sum(pool.idle_usd_per_hour or 0.0 for pool in pools)
    spend = sum(group.usd_per_hour for group in groups)
    return Picture(turned_at_s, pools, tuple(groups), models, round(spend + idle, 9))


def _hindsight(regret: Regret | None) -> HindsightShown | None:
    if regret is None:
        return None
    span_s = regret.until_s - regret.since_s
    return HindsightShown(regret.until_s, span_s, regret.spent_usd, regret.least.usd)


def expert_heat(records: Iterable[GroupRecord], engines: EngineLoads) -> dict[str, ExpertHeat]:
    """By group; those whose ranks count what their experts do."""
    heats = {record.spec.name: _heat(engines.ranks(record)) for record in records}
    return {name: heat for name, heat in heats.items() if heat.ranks}


def _heat(recents: Iterable[Recent[RankInfo]]) -> ExpertHeat:
    totals: dict[int, dict[str, int]] = {}
    lately: dict[int, dict[str, int]] = {}
    for recent in recents:
        last, span = recent.last, recent.span()
        if last is None or not last.expert_tokens:
            continue
        totals[last.rank] = dict(last.expert_tokens)
        before = {} if span is None else span[1].expert_tokens
        lately[last.rank] = {
            expert: max(0, tokens - before.get(expert, tokens))
            for expert, tokens in last.expert_tokens.items()
        }
    is_lately = any(any(experts.values()) for experts in lately.values())
    ranks = lately if is_lately else totals
    sums = [sum(experts.values()) for experts in ranks.values()]
    imbalance = max(sums) * len(sums) / sum(sums) if sum(sums) else None
    return ExpertHeat(ranks, is_lately, None if imbalance is None else round(imbalance, 3))


def _pool(
    pool: Pool, records: Iterable[GroupRecord], nodes: tuple[NodeSeen, ...] | None
) -> PoolShown:
    spend = sum(r.spec.usd_per_hour for r in records if r.spec.pool == pool.name)
    own = None if nodes is None else [node for node in nodes if node.pool == pool.name]
    idle = None
    if own is not None:
        idle = round(max(0.0, len(own) * pool.usd_per_node_hour - spend), 9)
    return PoolShown(
        name=pool.name,
        market=pool.market.value,
        accelerator=pool.accelerator,
        usd_per_node_hour=pool.usd_per_node_hour,
        max_nodes=pool.max_nodes,
        nodes=None
        if own is None
        else tuple(NodeShown(node.node_id, node.name, node.workers_total) for node in own),
        groups_usd_per_hour=round(spend, 9),
        idle_usd_per_hour=idle,
    )


def _group(record: GroupRecord, engines: EngineLoads) -> GroupShown:
    spec = record.spec
    answers = {
        recent.last.rank: recent for recent in engines.ranks(record) if recent.last is not None
    }
    return GroupShown(
        name=spec.name,
        model=spec.model,
        pool=spec.pool,
        state=record.state.value,
        since_s=record.since_s,
        requested_at_s=record.requested_at_s,
        expected_ready_at_s=record.expected_ready_at_s,
        message=record.message,
        usd_per_hour=spec.usd_per_hour,
        tensor=spec.parallelism.tensor,
        data=spec.parallelism.data,
        expert=spec.parallelism.expert,
        ranks=tuple(
            _rank(index, record, answers.get(index)) for index in range(spec.parallelism.data)
        ),
    )


def _rank(index: int, record: GroupRecord, recent: Recent[RankInfo] | None) -> RankShown:
    node = None
    if index < len(record.members):
        node = record.members[index].rpartition("/")[0] or None
    info = None if recent is None else recent.last
    if recent is None or info is None:
        return RankShown(index, node)
    return RankShown(
        index=index,
        node=node,
        answered_at_s=recent.last_at_s,
        running=info.running,
        waiting=info.waiting,
        max_running=info.max_running,
        kv_usage=round(info.kv_usage, 4),
    )


def _model(
    config: ScalingConfig,
    decided: tuple[float, Decision] | None,
    groups: Iterable[GroupShown],
    doing: Mapping[str, GroupDoing],
) -> ModelShown:
    rules = config.rules
    shown = ModelShown(
        name=config.model,
        mode=rules.mode.value,
        min_groups=rules.min_groups,
        max_groups=rules.max_groups,
        budget_usd_per_hour=rules.usd_per_hour_budget,
        ttft_target_s=config.slo.ttft_s,
        tpot_target_s=config.slo.tpot_s,
        decided_at_s=None if decided is None else decided[0],
    )
    if decided is None:
        return shown
    at_s, decision = decided
    own = [group for group in groups if group.model == config.model]
    known = [doing[group.name] for group in own if group.name in doing]
    wait_s = decision.load.wait_s
    return ModelShown(
        name=shown.name,
        mode=shown.mode,
        min_groups=shown.min_groups,
        max_groups=shown.max_groups,
        budget_usd_per_hour=shown.budget_usd_per_hour,
        ttft_target_s=shown.ttft_target_s,
        tpot_target_s=shown.tpot_target_s,
        decided_at_s=at_s,
        reason=decision.reason,
        binding=decision.binding.value,
        pending=decision.pending,
        need=decision.need,
        wanted=decision.state.wanted,
        ready=sum(group.state == "ready" for group in own),
        coming=sum(group.state == "starting" for group in own),
        queued=decision.demand.queued,
        running=decision.demand.running,
        oldest_wait_s=decision.demand.oldest_wait_s,
        live_gateways=decision.demand.live_gateways,
        stale_gateways=decision.demand.stale_gateways,
        wait_s=round(wait_s, 3) if math.isfinite(wait_s) else None,
        load=decision.load.now,
        load_needed=decision.load.needed,
        load_ready=decision.load.ready,
        arrivals_per_s=decision.demand.flow.arrivals_per_s,
        output_tokens_per_s=decision.demand.flow.output_tokens_per_s,
        ttft_s=_slowest(what.ttft_s for what in known),
        tpot_s=_slowest(what.tpot_s for what in known),
        target=decision.target,
        advice=tuple(f"{one.kind.value} {one.group}: {one.why}" for one in decision.advice),
    )


def _slowest(times_s: Iterable[float | None]) -> float | None:
    return max((time_s for time_s in times_s if time_s is not None), default=None)
