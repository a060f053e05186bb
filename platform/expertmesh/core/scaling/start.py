"""Groups that are missing: what drains is recalled, what is not there is started."""

from expertmesh.core.domain.fleet import GroupSpec, GroupState
from expertmesh.core.scaling.contract import Action, ActionKind, Binding, GroupRecord
from expertmesh.core.scaling.kinds import Kind
from expertmesh.core.scaling.lifecycle import enter
from expertmesh.core.scaling.naming import next_free_name, number_of
from expertmesh.core.scaling.question import why_held_back
from expertmesh.core.scaling.turn import CENT_OF_A_CENT_USD, Turn
from expertmesh.core.scaling.wording import groups

_SHORTAGES = (
    Binding.BACKOFF,
    Binding.GRANT,
    Binding.BUDGET,
    Binding.MAX_GROUPS,
    Binding.ROOM,
)


def fill(turn: Turn) -> None:
    """Recall what drains, then start what is missing."""
    for name, count in turn.target.counts.items():
        if not count:
            continue
        kind = turn.kinds.named(name)
        missing = count - len(turn.active_of(name))
        draining = [r for r in turn.recallable() if turn.kind_name(r) == name]
        for record in sorted(draining, key=_price_key):
            if missing > 0:
                _recall(turn, record)
                missing -= 1
        for _ in range(missing):
            problem = why_not_start(turn, kind)
            if problem is not None:
                turn.obstacles.append(problem)
                break
            why = f"the cheapest that can be had, ${kind.option.usd_per_hour:.2f}/h"
            if turn.target.replaces:
                why = f"cheaper than what there is, ${kind.option.usd_per_hour:.2f}/h"
            start(turn, kind, why)
    if turn.target.binding in _SHORTAGES:
        _explain_shortage(turn)


def _recall(turn: Turn, record: GroupRecord) -> None:
    turn.act(ActionKind.RECALL, record, "wanted again while draining")
    turn.keep(enter(record, GroupState.READY, turn.now_s, ""), record.state, "recalled")


def why_not_start(turn: Turn, kind: Kind) -> str | None:
    """What draining groups still occupy and cost, the target does not know."""
    option = kind.option
    staying = sum(
        record.removed_at_s is None and record.leaving_at_s is None
        for record in turn.groups.values()
    )
    if staying >= turn.rules.max_groups:
        return f"{groups(staying)} of at most {turn.rules.max_groups} are still there"
    pool = turn.pools.get(option.pool)
    room = turn.room_in(pool) if pool is not None else None
    if room is None:
        return f"the nodes of pool {option.pool} could not be listed"
    if room < option.workers:
        free = max(0, room)
        return f"no room in pool {option.pool} ({free} of {option.workers} workers free)"
    limit = turn.usd_per_hour_limit
    cost = sum(record.spec.usd_per_hour for record in turn.groups.values())
    if limit is not None and cost + option.usd_per_hour > limit + CENT_OF_A_CENT_USD:
        return (
            f"a group in pool {option.pool} at ${option.usd_per_hour:.2f}/h exceeds the "
            f"budget of ${limit:.2f}/h"
        )
    return None


def _explain_shortage(turn: Turn) -> None:
    for kind in sorted(turn.kinds.all, key=lambda kind: _unit_usd(turn, kind)):
        why = why_held_back(turn, kind) or why_not_start(turn, kind)
        if why is not None and kind.is_offered and why not in turn.obstacles:
            turn.obstacles.append(why)
    grant = turn.observation.grant
    if turn.binding in (Binding.GRANT, Binding.ROOM) and grant is not None and grant.why:
        # Who has the rest comes first: it explains what follows.
        turn.obstacles.insert(0, grant.why)
    if not turn.obstacles and not turn.config.options:
        turn.obstacles.append("the model has no pool")


def start(turn: Turn, kind: Kind, why: str) -> None:
    option = kind.option
    pool = turn.pools[option.pool]
    name, n = next_free_name(
        turn.config.model,
        pool.name,
        turn.next_n,
        {*turn.observation.names_elsewhere, *turn.groups},
    )
    turn.next_n = n + 1
    spec = GroupSpec(
        name=name,
        model=turn.config.model,
        model_source=turn.config.source,
        pool=pool.name,
        parallelism=option.parallelism,
        max_model_len=turn.config.max_model_len,
        usd_per_hour=option.usd_per_hour,
        accelerator=pool.accelerator,
        engine=option.engine,
    )
    record = GroupRecord(
        spec=spec,
        state=GroupState.STARTING,
        since_s=turn.now_s,
        requested_at_s=turn.now_s,
        expected_ready_at_s=turn.now_s + kind.start_s,
        message="asked for",
    )
    turn.actions.append(Action(ActionKind.START, name, why, spec))
    turn.keep(record, None, why)
    turn.wakes_s.append(turn.now_s + turn.config.start_deadline_s(spec))


def _unit_usd(turn: Turn, kind: Kind) -> float:
    return kind.option.usd_per_hour / turn.kinds.capacity(kind)


def _price_key(record: GroupRecord) -> tuple[float, str, float, int]:
    pool = record.spec.pool
    n = number_of(record.spec.name)
    return (record.spec.usd_per_hour, pool, record.requested_at_s, n)
