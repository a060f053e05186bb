"""The life of one group: which state follows which, and what must be seen for it.

| from     | to       | when                                                             |
|----------|----------|------------------------------------------------------------------|
| -        | starting | the policy asks for it, or it is found running (adopted)         |
| starting | ready    | all ranks run, answer for this group and know the full world size |
| starting | draining | not wanted any more; it never served, so it is removed at once   |
| starting | lost     | its start failed or took too long, or its pool has lost its room |
| ready    | draining | not wanted any more: gateways stop routing to it                 |
| ready    | lost     | a rank stopped answering, its node died, Serve calls it unhealthy |
|          |          | or failed, or Serve restarts its gang                            |
| draining | ready    | wanted again before it was removed                               |
| draining | lost     | as for ready                                                     |
| draining | gone     | removed, and its application and placement group disappeared     |
| lost     | starting | Serve restarts its gang, or all ranks answer again: same name    |
| lost     | gone     | removed, and its application and placement group disappeared     |
| any      | gone     | a new controller finds neither its application nor its ranks     |

A lost group is waited for while its pool has room for its workers: Serve restarts the gang there by
itself. It is removed, and replaced where there is room, when the pool has no room (its host died),
when its start failed, when it is not wanted any more, or when Serve does not restart it in time.
"""

from dataclasses import dataclass, replace

from expertmesh.core.domain.fleet import GroupState, Rank
from expertmesh.core.scaling.contract import (
    GroupRecord,
    GroupSeen,
    Observation,
    RankSeen,
    ScalingConfig,
    Timing,
)

LEGAL: dict[GroupState, frozenset[GroupState]] = {
    GroupState.STARTING: frozenset(
        {GroupState.READY, GroupState.DRAINING, GroupState.LOST, GroupState.GONE}
    ),
    GroupState.READY: frozenset({GroupState.DRAINING, GroupState.LOST, GroupState.GONE}),
    GroupState.DRAINING: frozenset({GroupState.READY, GroupState.LOST, GroupState.GONE}),
    GroupState.LOST: frozenset({GroupState.STARTING, GroupState.GONE}),
    GroupState.GONE: frozenset(),
}

# Serve's words, see its ApplicationStatus and ReplicaState.
_FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
_LEAVING_REPLICA = frozenset({"STOPPING", "STOPPED"})
_RUNNING_REPLICA = "RUNNING"
_STARTING_REPLICA = "STARTING"


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a group's pool holds its workers, beside the groups that come before it."""

    possible: bool | None
    """With all the nodes that the pool may have; None: not known."""
    now: bool | None
    """With the nodes that it has; None: not known."""


@dataclass(frozen=True, slots=True)
class Removal:
    """The lifecycle wants the group out of the set of applications."""

    why: str


def enter(record: GroupRecord, state: GroupState, now_s: float, message: str) -> GroupRecord:
    assert state in LEGAL[record.state], f"{record.spec.name}: {record.state} -> {state}"
    return replace(record, state=state, since_s=now_s, message=message)


def advance(
    config: ScalingConfig,
    record: GroupRecord,
    seen: GroupSeen,
    observation: Observation,
    room: Room,
    now_s: float,
) -> tuple[GroupRecord, Removal | None]:
    """At most one step."""
    if observation.first_look and _has_ended(seen, observation):
        return enter(record, GroupState.GONE, now_s, "ended before this controller started"), None
    if record.removed_at_s is not None:
        return _leave(record, seen, observation, now_s), None
    match record.state:
        case GroupState.STARTING:
            return _start(config, record, seen, observation, room, now_s), None
        case GroupState.READY | GroupState.DRAINING:
            failure = _failure(config.timing, record, seen, observation)
            if failure is not None:
                return enter(record, GroupState.LOST, now_s, failure), None
            return record, None
        case GroupState.LOST:
            return _lose(config, record, seen, observation, room, now_s)
    return record, None


def _has_ended(seen: GroupSeen, observation: Observation) -> bool:
    """Serve's list alone is not enough: it is empty while Serve itself starts."""
    return (
        observation.serve_answers
        and seen.application is None
        and all(rank.index is None for rank in seen.ranks)
    )


def is_complete(record: GroupRecord, seen: GroupSeen) -> bool:
    """Every rank answers as a member of this group and knows the full world size."""
    world = record.spec.parallelism.data
    answering = [rank for rank in seen.ranks if rank.index is not None]
    return len(answering) == world and all(
        rank.index == index and rank.world_size == world
        for index, rank in enumerate(sorted(answering, key=_index))
    )


def _index(rank: RankSeen) -> int:
    return -1 if rank.index is None else rank.index


def _members(seen: GroupSeen) -> tuple[str, ...]:
    replicas = seen.application.replicas if seen.application else ()
    return tuple(sorted(replica.member for replica in replicas if replica.member))


def _runs(record: GroupRecord, seen: GroupSeen) -> bool:
    if seen.application is None or seen.application.status in _FAILED:
        return False
    running = sum(replica.state == _RUNNING_REPLICA for replica in seen.application.replicas)
    return running == record.spec.parallelism.data and is_complete(record, seen)


def _start(
    config: ScalingConfig,
    record: GroupRecord,
    seen: GroupSeen,
    observation: Observation,
    room: Room,
    now_s: float,
) -> GroupRecord:
    if _runs(record, seen):
        ranks = tuple(
            Rank(index=rank.index, base_url=rank.base_url)
            for rank in sorted(seen.ranks, key=_index)
            if rank.index is not None
        )
        ready = enter(record, GroupState.READY, now_s, "")
        return replace(
            ready, ranks=ranks, members=_members(seen), served=True, expected_ready_at_s=None
        )
    application = seen.application
    pool = record.spec.pool
    failure = None
    if application is not None:
        if application.status == "DEPLOY_FAILED" or (
            # A gang that Serve restarts is unhealthy until it is back.
            application.status == "UNHEALTHY" and not record.served
        ):
            failure = (
                f"start failed: Serve says {application.status}: {_short(application.message)}"
            )
        elif application.status == "DELETING":
            failure = "start failed: Serve is deleting its application"
    deadline_s = config.start_deadline_s(record.spec)
    if failure is None and now_s - record.since_s >= deadline_s:
        failure = f"start failed: not ready after {deadline_s:g} s"
    if failure is not None:
        return replace(enter(record, GroupState.LOST, now_s, failure), failed_start=True)
    if room.possible is False:
        return enter(record, GroupState.LOST, now_s, f"no room in pool {pool}")
    if not observation.serve_answers:
        return record
    replicas = application.replicas if application else ()
    if not replicas:
        message = "asked for" if application is None else "Serve builds its application"
    elif application is not None and "failed to start" in application.message:
        message = _short(application.message)
    elif any(replica.member is not None for replica in replicas):
        message = "loading"
    elif room.now is False:
        message = f"pending: no room in pool {pool}"
    else:
        message = "waiting for its processes"
    return replace(record, message=message)


def _failure(
    timing: Timing, record: GroupRecord, seen: GroupSeen, observation: Observation
) -> str | None:
    """Why a serving group is lost, or None."""
    for rank in seen.ranks:
        if rank.failures >= timing.probe_failures:
            who = next(
                (
                    f"rank {known.index}"
                    for known in record.ranks
                    if known.base_url == rank.base_url
                ),
                "a rank",
            )
            return f"{who} at {rank.base_url} did not answer {rank.failures} probes in a row"
    application = seen.application
    if application is None:
        return None
    if application.status in _FAILED or application.status == "DELETING":
        return f"Serve says {application.status}: {_short(application.message)}"
    dead = [replica for replica in application.replicas if replica.node_alive is False]
    if dead:
        return f"the node of {len(dead)} of its {record.spec.parallelism.data} ranks is dead"
    if _gang_restarted(record, seen):
        return "Serve restarts its gang"
    return None


def _gang_restarted(record: GroupRecord, seen: GroupSeen) -> bool:
    """A member leaves, or one that was not there when the group was ready has appeared.

    Replicas that Serve merely recovers after its own restart keep their processes.
    """
    replicas = seen.application.replicas if seen.application else ()
    known = set(record.members)
    return any(
        replica.state in _LEAVING_REPLICA
        or (replica.member is not None and replica.member not in known)
        for replica in replicas
    )


def _lose(
    config: ScalingConfig,
    record: GroupRecord,
    seen: GroupSeen,
    observation: Observation,
    room: Room,
    now_s: float,
) -> tuple[GroupRecord, Removal | None]:
    if not observation.serve_answers:
        return record, None
    if record.failed_start:
        return record, Removal(record.message)
    if room.possible is False:
        return record, Removal(f"no room in pool {record.spec.pool} to restart it")
    application = seen.application
    if application is None:
        return record, Removal("its application has disappeared")
    if application.status in ("DEPLOY_FAILED", "DELETING"):
        return record, Removal(f"Serve says {application.status}")
    if not record.served:
        # Lost while starting for want of room, and there is room again.
        return enter(record, GroupState.STARTING, now_s, "starting again"), None
    fresh = set(_members(seen)) - set(record.members)
    if fresh or any(replica.state == _STARTING_REPLICA for replica in application.replicas):
        restarted = enter(record, GroupState.STARTING, now_s, "Serve restarts its gang")
        return replace(restarted, ranks=()), None
    if _runs(record, seen):
        return enter(record, GroupState.STARTING, now_s, "all ranks answer again"), None
    if now_s - record.since_s >= config.timing.restart_grace_s:
        return record, Removal(
            f"Serve has not restarted it within {config.timing.restart_grace_s:g} s"
        )
    return record, None


def _leave(
    record: GroupRecord, seen: GroupSeen, observation: Observation, now_s: float
) -> GroupRecord:
    if observation.serve_answers and seen.application is None and seen.placement_group is False:
        return enter(record, GroupState.GONE, now_s, "its placement group has disappeared")
    return record


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
