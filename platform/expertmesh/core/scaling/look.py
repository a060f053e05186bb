"""What there is: groups are adopted and followed through their lives, spot zones watched."""

from dataclasses import replace

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.capacity import capacity_workers
from expertmesh.core.scaling.contract import Backoff, GroupRecord, GroupSeen
from expertmesh.core.scaling.kinds import option_name
from expertmesh.core.scaling.lifecycle import Room, advance
from expertmesh.core.scaling.naming import number_of
from expertmesh.core.scaling.spot import Zone
from expertmesh.core.scaling.turn import Turn, age_key

_START_AVERAGE_WEIGHT = 0.3
"""Weight of the newest start in an option's moving average."""
_SERVING = (GroupState.READY, GroupState.DRAINING)


def adopt(turn: Turn) -> None:
    """Take over running groups of this model that the state does not know.

    What Serve runs counts, not what was recorded: another spec would restart the group.
    """
    for seen in turn.observation.groups:
        if seen.spec is None or seen.application is None:
            continue
        known = turn.groups.get(seen.name)
        if known is not None:
            turn.groups[seen.name] = replace(known, spec=seen.spec)
            continue
        leaving = seen.application.status == "DELETING"
        record = GroupRecord(
            spec=seen.spec,
            state=GroupState.DRAINING if leaving else GroupState.STARTING,
            since_s=turn.now_s,
            requested_at_s=turn.now_s if seen.held_since_s is None else seen.held_since_s,
            expected_ready_at_s=None if leaving else turn.now_s,
            adopted=True,
            removed_at_s=turn.now_s if leaving else None,
        )
        turn.keep(record, None, "adopted: it runs and belongs to this model")
        turn.next_n = max(turn.next_n, number_of(seen.name) + 1)


def advance_groups(turn: Turn) -> None:
    # Newest first: when a pool has become too small, the newest group gives way.
    for record in sorted(turn.groups.values(), key=age_key, reverse=True):
        seen = turn.seen.get(record.spec.name, GroupSeen(record.spec.name, None))
        leaving_at_s = _earliest_s(record, seen)
        if leaving_at_s != record.leaving_at_s:
            record = replace(record, leaving_at_s=leaving_at_s)
        after, removal = advance(
            turn.config, record, seen, turn.observation, _room_for(turn, record), turn.now_s
        )
        if after.state is not record.state:
            turn.keep(after, record.state, after.message)
            _learn_start(turn, record, after)
        else:
            turn.groups[record.spec.name] = after
        _watch_zone(turn, after, seen)
        if after.state is GroupState.GONE:
            del turn.groups[record.spec.name]
        elif removal is not None and turn.may_act() and turn.observation.settled:
            turn.remove(after, removal.why)
        if after.state is GroupState.LOST and after.removed_at_s is None:
            turn.wakes_s.append(after.since_s + turn.timing.restart_grace_s)
        if after.state is GroupState.STARTING:
            turn.wakes_s.append(after.since_s + turn.config.start_deadline_s(after.spec))


def _watch_zone(turn: Turn, record: GroupRecord, seen: GroupSeen) -> None:
    zone_name = turn.zone_of(record.spec.pool)
    if zone_name is None:
        return
    zone = turn.zones.get(zone_name, Zone(up_since_s=turn.now_s))
    dead = seen.application is not None and any(
        replica.node_alive is False for replica in seen.application.replicas
    )
    if dead or record.leaving_at_s is not None:
        zone = zone.lost(turn.now_s)
    elif record.state is GroupState.READY:
        share = sum(
            turn.zone_of(other.spec.pool) == zone_name and other.state is GroupState.READY
            for other in turn.groups.values()
        )
        zone = zone.watched(turn.over_s / max(1, share), turn.now_s)
    turn.zones[zone_name] = zone


def _room_for(turn: Turn, record: GroupRecord) -> Room:
    """The groups that come before it are those that serve, and the older ones."""
    name = record.spec.pool
    seen = turn.pools_seen.get(name)
    used = seen.staying_elsewhere if seen else 0
    used += sum(
        turn.held_workers(other)
        for other in turn.groups.values()
        if other.spec.pool == name
        and other.spec.name != record.spec.name
        and other.removed_at_s is None
        and (other.state in _SERVING or age_key(other) < age_key(record))
    )
    needed = used + turn.held_workers(record)
    pool = turn.pools.get(name)
    limit = capacity_workers(pool, seen) if pool else None
    live = seen.live_workers if seen else None
    return Room(
        possible=None if limit is None else needed <= limit,
        now=None if live is None else needed <= live,
    )


def _learn_start(turn: Turn, before: GroupRecord, after: GroupRecord) -> None:
    """Start durations and failures, from a state that has just been entered."""
    pool, option = after.spec.pool, option_name(after.spec)
    if before.state is not GroupState.STARTING:
        if after.state is GroupState.STARTING:
            planned = (o.start_s for o in turn.config.options if o.name == option)
            expected_s = turn.now_s + turn.start_s.get(option, next(planned, 0.0))
            turn.groups[after.spec.name] = replace(after, expected_ready_at_s=expected_s)
        return
    if after.state is GroupState.READY:
        turn.backoff.pop(pool, None)
        if not before.adopted and not before.served:
            took_s = turn.now_s - before.requested_at_s
            known_s = turn.start_s.get(option, took_s)
            turn.start_s[option] = known_s + _START_AVERAGE_WEIGHT * (took_s - known_s)
    elif after.failed_start:
        known = turn.backoff.get(pool)
        failures = (known.failures if known else 0) + 1
        wait_s = min(turn.timing.backoff_max_s, turn.timing.backoff_first_s * 2 ** (failures - 1))
        turn.backoff[pool] = Backoff(failures, turn.now_s + wait_s)


def _earliest_s(record: GroupRecord, seen: GroupSeen) -> float | None:
    """A notice that is given again moves nothing; one that is withdrawn is forgotten."""
    if seen.leaving_at_s is None or record.leaving_at_s is None:
        return seen.leaving_at_s
    return min(seen.leaving_at_s, record.leaving_at_s)
