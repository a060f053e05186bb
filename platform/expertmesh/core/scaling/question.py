"""What a decision chooses among: the groups that can be had, their price, and the bounds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.core.domain.fleet import ExternalUse, GroupState
from expertmesh.core.scaling.contract import Binding, Load, workers_of
from expertmesh.core.scaling.kinds import Kind, Kinds, miss_usd_per_hour, offer
from expertmesh.core.scaling.mix import Bounds, Need, Offer
from expertmesh.core.scaling.spot import Zone
from expertmesh.core.scaling.target import (
    Obstacle,
    Problem,
    with_offers,
    with_workers,
    without_budget,
    without_grant,
    without_max_groups,
)
from expertmesh.core.scaling.turn import Turn

_ANY_WORKERS = 1 << 30


@dataclass(frozen=True, slots=True)
class Question:
    """What a decision answers; all by the order of `kinds`."""

    problem: Problem
    obstacles: tuple[Obstacle, ...]
    kinds: Kinds
    load: Load
    ready: tuple[int, ...]
    """Of the active groups."""
    held_back: Mapping[str, str]
    """By option, why none is started of it now."""
    usd_per_hour_limit: float | None
    """Of the model's budgets by the hour and by the day."""


def question_of(turn: Turn) -> Question:
    reasons = {kind.name: why_held_back(turn, kind) for kind in turn.kinds.all}
    return Question(
        problem=problem_of(turn),
        obstacles=lifts_of(turn),
        kinds=turn.kinds,
        load=turn.load,
        ready=tuple(
            sum(r.state is GroupState.READY for r in turn.active_of(kind.name))
            for kind in turn.kinds.all
        ),
        held_back={name: why for name, why in reasons.items() if why is not None},
        usd_per_hour_limit=turn.usd_per_hour_limit,
    )


def problem_of(turn: Turn) -> Problem:
    kinds, rules = turn.kinds, turn.rules
    hours = kinds.horizon_s / 3600.0
    miss_usd = _miss_usd_per_hour(turn)
    losses_per_hour = _losses_per_hour(turn)
    risk = max(
        (
            losses_per_hour[kind.zone] * kind.start_s / 3600.0
            for kind in kinds.all
            if kind.zone is not None
        ),
        default=0.0,
    )
    external_usd, overflows = _external(turn, hours)
    grant = turn.observation.grant
    limits = [
        limit
        for limit in (turn.usd_per_hour_limit, grant.usd_per_hour if grant else None)
        if limit is not None
    ]
    counts = turn.counts_of(turn.active())
    turn.there = tuple(counts[kind.name] for kind in kinds.all)
    in_use = turn.planned_load > 0 or turn.load.held > 0
    return Problem(
        offers=_offers(turn, held_back=True),
        need=Need(
            load=turn.planned_load,
            cover=min(turn.load.expected, turn.planned_load),
            short_usd=miss_usd * hours,
            uncovered_usd=miss_usd * hours * risk,
        ),
        held_load=turn.load.held,
        active=turn.there,
        bounds=Bounds(
            min_groups=min(rules.max_groups, max(rules.min_groups, int(in_use))),
            max_groups=rules.max_groups,
            workers=_workers(turn, granted=True),
            usd_per_hour=min(limits, default=None),
        ),
        may_be_empty=rules.min_groups == 0,
        external_usd=external_usd,
        overflows=overflows,
    )


def _offers(turn: Turn, *, held_back: bool) -> tuple[Offer, ...]:
    """`held_back`: not from pools where starts failed lately or zones that were just lost."""
    load = turn.load
    late = max(0.0, min(1.0, max(load.now, load.needed) - load.ready - load.coming))
    miss_usd_per_hour = _miss_usd_per_hour(turn)
    external_usd, _ = _external(turn, 1.0)
    if external_usd is not None:
        # Until a group is ready, a provider serves what would wait.
        miss_usd_per_hour = min(miss_usd_per_hour, external_usd)
    late_usd_per_hour = late * miss_usd_per_hour
    losses_per_hour = _losses_per_hour(turn)
    kept = turn.counts_of([*turn.active(), *turn.recallable()])
    return tuple(
        offer(
            turn.kinds,
            kind,
            kept[kind.name],
            losses_per_hour[kind.zone] if kind.zone is not None else 0.0,
            late_usd_per_hour,
            may_start=not held_back or why_held_back(turn, kind) is None,
        )
        for kind in turn.kinds.all
    )


def _miss_usd_per_hour(turn: Turn) -> float:
    return miss_usd_per_hour(turn.kinds, turn.config.slo)


def why_held_back(turn: Turn, kind: Kind) -> str | None:
    pool = kind.option.pool
    backoff = turn.backoff.get(pool)
    if backoff is not None and turn.now_s < backoff.until_s:
        turn.wakes_s.append(backoff.until_s)
        return (
            f"pool {pool} is left alone for {backoff.until_s - turn.now_s:.0f} s "
            f"after {backoff.failures} failed starts"
        )
    zone = turn.zones.get(kind.zone) if kind.zone is not None else None
    if zone is not None and not zone.is_admitted(turn.now_s):
        return f"spot zone {kind.zone} was lost lately"
    return None


def _losses_per_hour(turn: Turn) -> dict[str, float]:
    """By spot zone."""
    new = Zone(up_since_s=turn.now_s)
    return {
        name: turn.zones.get(name, new).losses_per_hour(turn.now_s)
        for name in {kind.zone for kind in turn.kinds.all}
        if name is not None
    }


def _workers(turn: Turn, *, granted: bool) -> dict[str, int]:
    """By pool, for all groups of this model that stay: theirs and what is free.

    Of a pool that cannot be seen, what they have.
    """
    workers: dict[str, int] = {}
    grant = turn.observation.grant
    own: Counter[str] = Counter()
    for record in [*turn.active(), *turn.recallable()]:
        own[record.spec.pool] += workers_of(record.spec.parallelism)
    for name in {kind.option.pool for kind in turn.kinds.all}:
        pool = turn.pools.get(name)
        room = turn.room_in(pool) if pool else None
        workers[name] = max(0, own[name] + (room or 0))
        if granted and grant is not None and name in grant.workers:
            workers[name] = min(workers[name], grant.workers[name])
    return workers


def lifts_of(turn: Turn) -> tuple[Obstacle, ...]:
    unlimited = {kind.option.pool: _ANY_WORKERS for kind in turn.kinds.all}
    return (
        Obstacle(
            Binding.BACKOFF,
            lambda problem: with_offers(_offers(turn, held_back=False))(problem),
        ),
        Obstacle(
            Binding.GRANT,
            lambda problem: without_grant(_workers(turn, granted=False), turn.usd_per_hour_limit)(
                problem
            ),
        ),
        Obstacle(Binding.BUDGET, without_budget),
        Obstacle(Binding.MAX_GROUPS, without_max_groups),
        Obstacle(Binding.ROOM, with_workers(unlimited)),
    )


def _external(turn: Turn, hours: float) -> tuple[float | None, bool]:
    """What a provider would take for a load of 1 over the horizon."""
    unit = turn.kinds.unit
    if not turn.config.external or unit is None or not unit.seconds:
        return None, False
    prompt, output = turn.work.prompt_tokens, turn.work.output_tokens
    usd, overflows = min(
        (
            (prompt * route.usd_per_mtok_in + output * route.usd_per_mtok_out) / 1e6,
            route.use is ExternalUse.OVERFLOW,
        )
        for route in turn.config.external
    )
    return usd / unit.seconds * 3600.0 * hours, overflows
