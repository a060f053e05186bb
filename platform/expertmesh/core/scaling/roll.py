"""Another version of the model, or another way to run it: groups change over one after the other.

Where there is room a new group is started beside the old ones, and when it is ready one of them
drains. Where there is none, one makes way first, as long as the others carry the load.
"""

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.core.scaling.question import why_held_back
from expertmesh.core.scaling.release import drain, release_key
from expertmesh.core.scaling.start import start, why_not_start
from expertmesh.core.scaling.turn import Turn


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
    in_use = turn.load.needed > 0
    suffice = capacity >= turn.load.needed - 1e-9 and len(others) >= int(in_use)
    name = old.spec.name
    if suffice and len(others) >= turn.rules.min_groups:
        drain(turn, old, "it runs an older version of the model, and the others carry the load")
        return
    offered = [kind for kind in turn.kinds.all if kind.is_offered]
    own = [kind for kind in offered if kind.option.pool == old.spec.pool]
    barriers = []
    for kind in own + [kind for kind in offered if kind not in own]:
        barrier = why_held_back(turn, kind) or why_not_start(turn, kind)
        if barrier is None:
            start(turn, kind, f"to replace {name}, which runs an older version of the model")
            return
        barriers.append(barrier)
    if suffice:
        drain(turn, old, "it makes way for one of the new version of the model")
    elif barriers:
        turn.notes.append(
            f"{name} runs an older version of the model and cannot be replaced: {barriers[0]}, "
            "and the others would not carry the load"
        )
