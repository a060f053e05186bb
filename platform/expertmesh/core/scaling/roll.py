"""Another version of the model, or another way to run it: groups change over one after the other.

Where there is room a new group is started beside the old ones, and when it is ready one of them
drains. Where there is none, one makes way first, as long as the others carry the load.
"""

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import GroupRecord, workers_of
from expertmesh.core.scaling.kinds import Kind, option_name
from expertmesh.core.scaling.question import why_held_back
from expertmesh.core.scaling.release import drain, release_key
from expertmesh.core.scaling.start import start, why_not_start
from expertmesh.core.scaling.turn import CENT_OF_A_CENT_USD, Turn


def roll(turn: Turn) -> None:
    older = [r for r in turn.active() if not turn.config.is_current(r.spec)]
    if not older or turn.why_unseen() is not None:
        return
    # What starts is left to finish: a group of the old version soon is better than none.
    moving = (GroupState.STARTING, GroupState.DRAINING)
    if turn.actions or any(turn.in_state(state) for state in moving):
        return
    ready = [r for r in older if r.state is GroupState.READY]
    if ready and turn.kinds.unit is not None:
        _change(turn, min(ready, key=release_key))


def _change(turn: Turn, old: GroupRecord) -> None:
    others = [
        each
        for each in turn.in_state(GroupState.READY)
        if each.spec.name != old.spec.name and each.leaving_at_s is None
    ]
    capacity = sum(turn.kinds.capacity(turn.kind_of(each)) for each in others)
    # One quiet moment is no reason to go below what the last while needed.
    needed = turn.carried(max(turn.load.needed, turn.load.held))
    suffice = capacity >= needed - 1e-9 and (bool(others) or (needed <= 0 and turn.is_idle()))
    name = old.spec.name
    if suffice and len(others) >= turn.rules.min_groups:
        drain(turn, old, "it runs an older version of the model, and the others carry the load")
        return
    barriers = []
    may_make_way = False
    for kind in _by_likeness(turn, old):
        held_back = why_held_back(turn, kind)
        barrier = held_back or why_not_start(turn, kind) or _why_not_granted(turn, kind)
        if barrier is None:
            start(turn, kind, f"to replace {name}, which runs an older version of the model")
            return
        barriers.append(barrier)
        may_make_way = may_make_way or (held_back is None and _would_fit(turn, kind, old))
    if suffice and may_make_way:
        drain(turn, old, "it makes way for one of the new version of the model")
    elif barriers:
        reason = "and the others would not carry the load" if may_make_way else "so it stays"
        turn.notes.append(
            f"{name} runs an older version of the model and cannot be replaced: {barriers[0]}, "
            f"{reason}"
        )


def _by_likeness(turn: Turn, old: GroupRecord) -> list[Kind]:
    """What may be started instead: the same option, else one of the same pool."""
    option, pool = option_name(old.spec), old.spec.pool
    offered = (kind for kind in turn.kinds.all if kind.is_offered)
    return sorted(offered, key=lambda kind: (kind.name != option, kind.option.pool != pool))


def _why_not_granted(turn: Turn, kind: Kind) -> str | None:
    """Where models share pools or a budget, the group beside is not to be taken from others."""
    grant, option = turn.observation.grant, kind.option
    if grant is None:
        return None
    active = turn.active()
    used = sum(workers_of(r.spec.parallelism) for r in active if r.spec.pool == option.pool)
    usd_per_hour = sum(record.spec.usd_per_hour for record in turn.groups.values())
    limit = grant.usd_per_hour
    if used + option.workers > grant.workers.get(option.pool, used + option.workers) or (
        limit is not None and usd_per_hour + option.usd_per_hour > limit + CENT_OF_A_CENT_USD
    ):
        return grant.why or f"other models have the rest of pool {option.pool}"
    return None


def _would_fit(turn: Turn, kind: Kind, old: GroupRecord) -> bool:
    """Whether a group of the kind could be started as soon as the old one is gone."""
    pool = turn.pools.get(kind.option.pool)
    room = turn.room_in(pool) if pool is not None else None
    if room is None:
        return False
    if old.spec.pool == kind.option.pool:
        room += workers_of(old.spec.parallelism)
    limit = turn.usd_per_hour_limit
    others_usd = sum(r.spec.usd_per_hour for r in turn.groups.values()) - old.spec.usd_per_hour
    fits_budget = (
        limit is None or others_usd + kind.option.usd_per_hour <= limit + CENT_OF_A_CENT_USD
    )
    return room >= kind.option.workers and fits_budget
