"""The money: what each request used, and what each group cost while it was held."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.metering.rating import exact_usd
from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.store.database import Database
from expertmesh.store.schema import capacity_holds, usage_records
from expertmesh.store.usage_rows import inserts


class Ledger:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_usage(self, records: Sequence[UsageRecord]) -> int:
        """All of the batch or nothing of it; ids that the ledger has are left as they are.

        So a caller that does not know whether a batch arrived sends it again. Returns the number
        of new rows.
        """
        if not records:
            return 0
        added = 0
        async with self._database.writing() as connection:
            for statement, values in inserts(connection.dialect, records):
                added += (await connection.exec_driver_sql(statement, values)).rowcount
        return added

    async def usage(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[UsageRecord, ...]:
        """Requests accepted at or after `since_s` and before `until_s`, in that order."""
        at_s = usage_records.c.at_s
        return await self._usage(_within(at_s, at_s, since_s, until_s))

    async def usage_in_flight(self, since_s: float, until_s: float) -> tuple[UsageRecord, ...]:
        """Requests accepted before `until_s` that ended at or after `since_s`."""
        columns = usage_records.c
        return await self._usage(_within(columns.finished_at_s, columns.at_s, since_s, until_s))

    async def hold_capacity(self, holds: Sequence[CapacityHold]) -> None:
        """Record that groups are held until now (`seen_at_s`), or were until `ended_at_s`.

        A hold is extended, never shortened, keeps its first price, and stays ended once it ended.
        A hold of the same group that starts while another is open continues that one; one that
        starts after the open one was last seen closes it there. No second is counted twice.
        """
        async with self._database.writing() as connection:
            for hold in holds:
                await self._hold(connection, hold)

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]:
        """Holds that overlap the time from `since_s` to `until_s`, in order of their start."""
        columns = capacity_holds.c
        held_until_s = func.coalesce(columns.ended_at_s, columns.seen_at_s)
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(capacity_holds)
                .where(*_within(held_until_s, columns.started_at_s, since_s, until_s))
                .order_by(columns.started_at_s, columns.group_name)
            )
            return tuple(_hold(row) for row in rows)

    async def span_s(self) -> tuple[float, float] | None:
        """First and last moment that the ledger knows of; None when it is empty."""
        held, used = capacity_holds.c, usage_records.c
        async with self._database.reading() as connection:
            bounds = (
                await connection.execute(
                    select(
                        select(func.min(held.started_at_s)).scalar_subquery(),
                        select(func.min(used.at_s)).scalar_subquery(),
                        select(func.max(held.seen_at_s)).scalar_subquery(),
                        select(func.max(held.ended_at_s)).scalar_subquery(),
                        select(func.max(used.finished_at_s)).scalar_subquery(),
                    )
                )
            ).one()
        known = [bound for bound in bounds if bound is not None]
        return (min(known), max(known)) if known else None

    async def _usage(self, conditions: list[ColumnElement[bool]]) -> tuple[UsageRecord, ...]:
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(usage_records)
                .where(*conditions)
                .order_by(usage_records.c.at_s, usage_records.c.request_id)
            )
            return tuple(_usage(row) for row in rows)

    async def _hold(self, connection: AsyncConnection, hold: CapacityHold) -> None:
        columns = capacity_holds.c
        rows = await connection.execute(
            select(capacity_holds)
            .where(
                columns.group_name == hold.group,
                (columns.ended_at_s.is_(None)) | (columns.started_at_s == hold.started_at_s),
            )
            .with_for_update()
        )
        known = {row.started_at_s: _hold(row) for row in rows}
        same = known.pop(hold.started_at_s, None)
        for open_hold in known.values():
            if hold.started_at_s <= open_hold.seen_at_s:
                same = open_hold
            else:
                await _update(connection, open_hold, ended_at_s=open_hold.seen_at_s)
        if same is None:
            await connection.execute(insert(capacity_holds).values(**_hold_row(hold)))
        elif same.ended_at_s is None:
            await _update(
                connection,
                same,
                seen_at_s=max(same.seen_at_s, hold.seen_at_s),
                ended_at_s=hold.ended_at_s,
            )


async def _update(connection: AsyncConnection, hold: CapacityHold, **values: float | None) -> None:
    await connection.execute(
        update(capacity_holds)
        .where(
            capacity_holds.c.group_name == hold.group,
            capacity_holds.c.started_at_s == hold.started_at_s,
        )
        .values(**values)
    )


def _within(
    ends: ColumnElement[Any],
    starts: ColumnElement[Any],
    since_s: float | None,
    until_s: float | None,
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if since_s is not None:
        conditions.append(ends >= since_s)
    if until_s is not None:
        conditions.append(starts < until_s)
    return conditions


def _usage(row: Row[Any]) -> UsageRecord:
    return UsageRecord(
        request_id=row.request_id,
        at_s=row.at_s,
        tenant=row.tenant,
        key_id=row.key_id,
        model=row.model,
        group=row.group_name,
        pool=row.pool,
        endpoint=row.endpoint,
        outcome=Outcome(row.outcome),
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        completion_tokens=row.completion_tokens,
        queue_s=row.queue_s,
        ttft_s=row.ttft_s,
        duration_s=row.duration_s,
        tariff_usd=row.tariff_usd,
    )


def _hold_row(hold: CapacityHold) -> dict[str, Any]:
    row = asdict(hold)
    row["group_name"] = row.pop("group")
    row["usd_per_hour"] = exact_usd(hold.usd_per_hour)
    return row


def _hold(row: Row[Any]) -> CapacityHold:
    return CapacityHold(
        group=row.group_name,
        model=row.model,
        pool=row.pool,
        usd_per_hour=float(row.usd_per_hour),
        started_at_s=row.started_at_s,
        seen_at_s=row.seen_at_s,
        ended_at_s=row.ended_at_s,
    )
