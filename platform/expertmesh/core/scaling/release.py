"""Groups that are to go: drains end, nodes that will be taken are left, what is too much drains."""

import math

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import ActionKind, Binding, GroupRecord, workers_of
from expertmesh.core.scaling.demand import is_drained
from expertmesh.core.scaling.kinds import option_name
from expertmesh.core.scaling.lifecycle import enter
from expertmesh.core.scaling.naming import number_of
from expertmesh.core.scaling.turn import CENT_OF_A_CENT_USD, Turn, age_key

_LONG_REQUEST = 3.0
"""Times the mean request at its targets: nearly all are shorter."""


def end_drains(turn: Turn) -> None:
    for record in turn.in_state(GroupState.DRAINING):
        deadline_s = record.since_s + turn.rules.drain_deadline_s
        if record.leaving_at_s is not None:
            deadline_s = min(deadline_s, max(record.leaving_at_s, record.since_s))
        name = record.spec.name
        if is_drained(
            name,
            record.since_s,
            turn.observation.gateways,
            turn.now_s,
            stale_s=turn.timing.gateway_stale_s,
            forget_s=turn.timing.gateway_forget_s,
        ):
            why = "every gateway reports nothing in flight"
        elif turn.now_s >= deadline_s:
            left = turn.in_flight(record)
            why = f"{left} in flight at the deadline of {deadline_s - record.since_s:g} s"
        else:
            turn.wakes_s.append(deadline_s)
            continue
        if turn.may_act() and turn.observation.settled:
            turn.remove(record, why)


def leave_taken_nodes(turn: Turn) -> None:
    """Groups whose nodes will be taken serve on while the others do not carry the load, as long
    as what runs there can still be finished."""
    serving = turn.in_state(GroupState.READY)
    capacity = sum(turn.kinds.capacity(turn.kind_of(record)) for record in serving)
    in_use = turn.load.held > 0 or turn.rules.min_groups > 0
    for record in sorted(serving, key=lambda each: (each.leaving_at_s or 0.0, age_key(each))):
        if record.leaving_at_s is None:
            continue
        left_s = max(0.0, record.leaving_at_s - turn.now_s)
        finish_at_s = record.leaving_at_s - _finish_s(turn)
        rest = capacity - turn.kinds.capacity(turn.kind_of(record))
        alone = in_use and len(serving) == 1
        if turn.now_s < finish_at_s and (alone or rest < turn.load.needed - 1e-9):
            turn.wakes_s.append(finish_at_s)
            turn.notes.append(
                f"{record.spec.name} serves on until others carry its load: a node of it will "
                f"be taken away in {left_s:.0f} s"
            )
            continue
        serving.remove(record)
        capacity = rest
        drain(turn, record, f"a node of it will be taken away in {left_s:.0f} s")


def _finish_s(turn: Turn) -> float:
    """That requests which run need at most, so that none is cut."""
    longest_s = turn.rules.drain_deadline_s
    if not turn.work.is_known:
        return longest_s
    mean_s = turn.config.slo.ttft_s + turn.work.output_tokens * turn.config.slo.tpot_s
    return min(longest_s, _LONG_REQUEST * mean_s)


def release(turn: Turn) -> None:
    """Let go of what is not to be kept, while the ready groups that stay carry the load."""
    forced = _is_beyond_bounds(turn)
    growing = _is_starting_more(turn)
    if not forced and turn.why_unseen() is not None:
        return
    surplus = {
        name: there - keep
        for (name, keep), there in zip(turn.target.kept.items(), turn.there, strict=True)
    }
    fresh = {action.group for action in turn.actions}
    rolls = any(not turn.config.is_current(record.spec) for record in turn.active())
    for record in sorted(turn.active(), key=release_key):
        name = turn.kind_name(record)
        if surplus[name] <= 0 or record.spec.name in fresh:
            continue
        broken = record.state is GroupState.LOST
        if rolls and not forced and not broken and turn.config.is_current(record.spec):
            # It came to replace an older one, which is the one to go.
            continue
        if not forced and not broken and (growing or not _is_dispensable(turn, record)):
            continue
        surplus[name] -= 1
        _let_go(turn, _unready_like(turn, record, fresh) if forced else record, forced)


def _unready_like(turn: Turn, record: GroupRecord, fresh: set[str]) -> GroupRecord:
    """In place of one that serves, one that takes as much and only starts: an older version and
    the one that is to replace it are of two kinds."""
    if record.state is not GroupState.READY:
        return record
    starting = (
        other
        for other in turn.active()
        if other.state is GroupState.STARTING
        and option_name(other.spec) == option_name(record.spec)
        and other.spec.name not in fresh
    )
    return next(starting, record)


def _is_starting_more(turn: Turn) -> bool:
    """Never up and down in one decision, unless dearer groups make way for cheaper ones."""
    started = any(a.kind in (ActionKind.START, ActionKind.RECALL) for a in turn.actions)
    return started and not turn.target.replaces


def _is_beyond_bounds(turn: Turn) -> bool:
    active = turn.active()
    limit = turn.usd_per_hour_limit
    grant = turn.observation.grant
    if grant is not None and grant.usd_per_hour is not None:
        limit = min(limit if limit is not None else math.inf, grant.usd_per_hour)
    cost = sum(record.spec.usd_per_hour for record in active)
    if len(active) > turn.rules.max_groups:
        return turn.why_unseen() is None
    if limit is not None and cost > limit + CENT_OF_A_CENT_USD:
        turn.notes.append(f"the groups cost ${cost:.2f}/h of ${limit:.2f}/h")
        return True
    if grant is None:
        return False
    return any(
        sum(workers_of(r.spec.parallelism) for r in active if r.spec.pool == pool) > workers
        for pool, workers in grant.workers.items()
    )


def _is_dispensable(turn: Turn, record: GroupRecord) -> bool:
    """Whether it has been there for long enough, and the ready groups that would stay carry
    the load of now and are not too few."""
    if turn.now_s - record.since_s < turn.hold_s() and not turn.is_idle():
        return False
    if record.state is not GroupState.READY or turn.target.binding is Binding.EXTERNAL:
        return True
    rest = [
        other
        for other in turn.in_state(GroupState.READY)
        if other.spec.name != record.spec.name and other.leaving_at_s is None
    ]
    capacity = sum(turn.kinds.capacity(turn.kind_of(other)) for other in rest)
    least = max(turn.rules.min_groups, int(turn.load.held > 0))
    return (
        len(rest) >= least
        and capacity >= min(turn.carried(turn.load.needed), turn.load.ready) - 1e-9
    )


def _let_go(turn: Turn, record: GroupRecord, forced: bool) -> None:
    price = f"${record.spec.usd_per_hour:.2f}/h in pool {record.spec.pool}"
    if forced:
        why = f"the groups cost more than they may or are too many, {price}"
        if turn.observation.grant is not None:
            why = f"it makes way, {price}: {turn.observation.grant.why}"
    else:
        left = sum(turn.target.kept.values())
        why = f"{left} groups carry a load of {turn.load.held:.2f}, {price}"
    match record.state:
        case GroupState.READY:
            drain(turn, record, why)
        case GroupState.STARTING:
            draining = enter(record, GroupState.DRAINING, turn.now_s, "no longer needed")
            turn.keep(draining, record.state, why)
            turn.remove(draining, why)
        case _:
            turn.remove(record, why)


def drain(turn: Turn, record: GroupRecord, why: str) -> None:
    turn.act(ActionKind.DRAIN, record, why)
    draining = enter(record, GroupState.DRAINING, turn.now_s, "no longer needed")
    turn.keep(draining, record.state, why)


def release_key(record: GroupRecord) -> tuple[int, float, float, int]:
    """Broken ones first, then those that start, then the dearest and of these the youngest."""
    order = {GroupState.LOST: 0, GroupState.STARTING: 1}
    n = number_of(record.spec.name)
    dear = record.spec.usd_per_hour
    return (order.get(record.state, 2), -dear, -record.requested_at_s, -n)
