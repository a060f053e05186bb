"""Holds of groups and nodes as rows: extended, never shortened, never two open of one thing."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.rating import exact_usd
from expertmesh.store.schema import capacity_holds, node_holds


async def extend_group(connection: AsyncConnection, hold: CapacityHold) -> None:
    columns = capacity_holds.c
    rows = await connection.execute(
        select(capacity_holds)
        .where(columns.group_name == hold.group, _touches(capacity_holds, hold))
        .with_for_update()
    )
    known = [group_of(row) for row in rows]
    same = next((each for each in known if each.started_at_s == hold.started_at_s), None)
    for other in known:
        if other is same or other.ended_at_s is not None:
            continue
        if hold.started_at_s <= other.seen_at_s:
            same = other
        else:
            await _update(connection, capacity_holds, _group_key(other), ended_at_s=other.seen_at_s)
    if same is None:
        start_s = _free_from_s(hold, known)
        if start_s is not None:
            row = asdict(replace(hold, started_at_s=start_s))
            row["group_name"] = row.pop("group")
            await _insert(connection, capacity_holds, row)
    elif same.ended_at_s is None:
        await _update(
            connection,
            capacity_holds,
            _group_key(same),
            seen_at_s=max(same.seen_at_s, hold.seen_at_s),
            ended_at_s=hold.ended_at_s,
            # Draining can be taken back; what else became known once stays as it was.
            draining_at_s=hold.draining_at_s,
            **{name: _first(getattr(same, name), getattr(hold, name)) for name in _KNOWN_ONCE},
        )


async def extend_node(connection: AsyncConnection, hold: NodeHold) -> None:
    columns = node_holds.c
    rows = await connection.execute(
        select(node_holds)
        .where(
            columns.pool == hold.pool,
            columns.node_id == hold.node_id,
            _touches(node_holds, hold),
        )
        .with_for_update()
    )
    known = [node_of(row) for row in rows]
    opened = next((each for each in known if each.ended_at_s is None), None)
    if opened is not None:
        key = {name: getattr(opened, name) for name in ("pool", "node_id", "started_at_s")}
        seen_at_s = max(opened.seen_at_s, hold.seen_at_s)
        await _update(connection, node_holds, key, seen_at_s=seen_at_s, ended_at_s=hold.ended_at_s)
        return
    start_s = _free_from_s(hold, known)
    if start_s is not None:
        await _insert(connection, node_holds, asdict(replace(hold, started_at_s=start_s)))


def _touches(table: Table, hold: CapacityHold | NodeHold) -> ColumnElement[bool]:
    """Open, of the same start, or of a time that is the new hold's too."""
    columns = table.c
    return or_(
        columns.ended_at_s.is_(None),
        columns.started_at_s == hold.started_at_s,
        columns.ended_at_s > hold.started_at_s,
    )


def _free_from_s(
    hold: CapacityHold | NodeHold, known: Iterable[CapacityHold | NodeHold]
) -> float | None:
    """From when on the hold is new: what was written already may come again, from a controller
    that was not told so and knows another start. None: nothing of it is new."""
    if any(each.started_at_s == hold.started_at_s for each in known):
        return None
    ends_s = [each.ended_at_s for each in known if each.ended_at_s is not None]
    start_s = max([hold.started_at_s, *ends_s])
    ended = hold.ended_at_s is not None and start_s > hold.started_at_s
    return None if ended and hold.held_until_s <= start_s else start_s


def group_of(row: Row[Any]) -> CapacityHold:
    return CapacityHold(
        group=row.group_name,
        model=row.model,
        pool=row.pool,
        usd_per_hour=float(row.usd_per_hour),
        started_at_s=row.started_at_s,
        seen_at_s=row.seen_at_s,
        ended_at_s=row.ended_at_s,
        ready_at_s=row.ready_at_s,
        draining_at_s=row.draining_at_s,
        prefill_tokens_per_s=row.prefill_tokens_per_s,
        decode_tokens_per_s=row.decode_tokens_per_s,
        idle_watts=row.idle_watts,
        busy_watts=row.busy_watts,
    )


def node_of(row: Row[Any]) -> NodeHold:
    return NodeHold(
        pool=row.pool,
        node_id=row.node_id,
        usd_per_hour=float(row.usd_per_hour),
        started_at_s=row.started_at_s,
        seen_at_s=row.seen_at_s,
        ended_at_s=row.ended_at_s,
        idle_watts=row.idle_watts,
    )


_KNOWN_ONCE = (
    "ready_at_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "idle_watts",
    "busy_watts",
)


def _first(known: float | None, new: float | None) -> float | None:
    return new if known is None else known


def _group_key(hold: CapacityHold) -> dict[str, Any]:
    return {"group_name": hold.group, "started_at_s": hold.started_at_s}


async def _insert(connection: AsyncConnection, table: Table, row: dict[str, Any]) -> None:
    values = {**row, "usd_per_hour": exact_usd(row["usd_per_hour"])}
    await connection.execute(insert(table).values(**values))


async def _update(
    connection: AsyncConnection, table: Table, key: dict[str, Any], **values: float | None
) -> None:
    conditions = (table.c[name] == value for name, value in key.items())
    await connection.execute(update(table).where(*conditions).values(**values))
