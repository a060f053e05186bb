"""The money: what each request used, and what each group cost while it was held."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, func, insert, select

from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.providers import ProviderTariff
from expertmesh.core.metering.rating import exact_usd
from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.store.database import Database
from expertmesh.store.hold_rows import extend_group, extend_node, group_of, node_of
from expertmesh.store.schema import capacity_holds, node_holds, provider_tariffs, usage_records
from expertmesh.store.usage_rows import inserts

LONGEST_REQUEST_S: Final = 86_400.0
"""No request is in flight for longer: bounds how far back one is looked for."""
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}
_COLUMNS: Final = tuple(
    usage_records.c["group_name" if name == "group" else name]
    for name in UsageRecord.__struct_fields__
)


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

    async def usage_across(self, at_s: float) -> tuple[UsageRecord, ...]:
        """Requests accepted before that moment that had not ended then."""
        columns = usage_records.c
        return await self._usage(
            [
                columns.at_s < at_s,
                columns.at_s >= at_s - LONGEST_REQUEST_S,
                columns.finished_at_s > at_s,
            ]
        )

    async def hold_capacity(
        self, holds: Sequence[CapacityHold], nodes: Sequence[NodeHold] = ()
    ) -> None:
        """Record that groups and nodes are held until now (`seen_at_s`), or were until
        `ended_at_s`: all of them or none.

        A hold is extended, never shortened, keeps its first price, and stays ended once it ended.
        A hold of the same group that starts while another is open continues that one; one that
        starts after the open one was last seen closes it there. No second is counted twice. A node
        that is seen again was there in between: its open hold goes on.
        """
        async with self._database.writing() as connection:
            for hold in holds:
                await extend_group(connection, hold)
            for node in nodes:
                await extend_node(connection, node)

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
            return tuple(group_of(row) for row in rows)

    async def nodes(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[NodeHold, ...]:
        """As `capacity`."""
        columns = node_holds.c
        held_until_s = func.coalesce(columns.ended_at_s, columns.seen_at_s)
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(node_holds)
                .where(*_within(held_until_s, columns.started_at_s, since_s, until_s))
                .order_by(columns.started_at_s, columns.pool, columns.node_id)
            )
            return tuple(node_of(row) for row in rows)

    async def open_nodes(self) -> tuple[NodeHold, ...]:
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(node_holds).where(node_holds.c.ended_at_s.is_(None))
            )
            return tuple(node_of(row) for row in rows)

    async def set_provider_tariffs(self, tariffs: Sequence[ProviderTariff]) -> None:
        """Adds those that differ from the newest ones of their model and pool."""
        async with self._database.writing() as connection:
            rows = await connection.execute(
                select(provider_tariffs).order_by(provider_tariffs.c.since_s)
            )
            newest = {(row.model, row.pool): _tariff(row) for row in rows}
            for tariff in sorted(tariffs, key=lambda each: each.since_s):
                known = newest.get((tariff.model, tariff.pool))
                if known is not None and known.prices == tariff.prices:
                    continue
                if known is not None and known.since_s >= tariff.since_s:
                    continue
                newest[tariff.model, tariff.pool] = tariff
                await connection.execute(insert(provider_tariffs).values(**_tariff_row(tariff)))

    async def provider_tariffs(self) -> tuple[ProviderTariff, ...]:
        """In the order of time."""
        columns = provider_tariffs.c
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(provider_tariffs).order_by(columns.since_s, columns.model, columns.pool)
            )
            return tuple(_tariff(row) for row in rows)

    async def span_s(self) -> tuple[float, float] | None:
        """First and last moment that the ledger knows of; None when it is empty."""
        held, used, nodes = capacity_holds.c, usage_records.c, node_holds.c
        async with self._database.reading() as connection:
            bounds = (
                await connection.execute(
                    select(
                        select(func.min(held.started_at_s)).scalar_subquery(),
                        select(func.min(used.at_s)).scalar_subquery(),
                        select(func.min(nodes.started_at_s)).scalar_subquery(),
                        select(func.max(nodes.seen_at_s)).scalar_subquery(),
                        select(func.max(nodes.ended_at_s)).scalar_subquery(),
                        select(func.max(held.seen_at_s)).scalar_subquery(),
                        select(func.max(held.ended_at_s)).scalar_subquery(),
                        select(func.max(used.finished_at_s)).scalar_subquery(),
                    )
                )
            ).one()
        known = [bound for bound in bounds if bound is not None]
        return (min(known), max(known)) if known else None

    async def _usage(self, conditions: list[ColumnElement[bool]]) -> tuple[UsageRecord, ...]:
        statement = (
            select(*_COLUMNS)
            .where(*conditions)
            .order_by(usage_records.c.at_s, usage_records.c.request_id)
        )
        async with self._database.reading() as connection:
            return tuple(_usage(await connection.execute(statement)))


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


def _usage(rows: Iterable[Any]) -> list[UsageRecord]:
    """Equal names become one string: there are few, and many rows."""
    known: dict[str, str] = {}
    one = known.setdefault
    records = []
    for row in rows:
        request_id, at_s, tenant, key_id, model, group, pool, endpoint, outcome, *rest = row
        records.append(
            UsageRecord(
                request_id,
                at_s,
                one(tenant, tenant),
                one(key_id, key_id),
                one(model, model),
                one(group, group),
                one(pool, pool),
                one(endpoint, endpoint),
                _OUTCOMES[outcome],
                *rest,
            )
        )
    return records


def _tariff_row(tariff: ProviderTariff) -> dict[str, Any]:
    row = asdict(tariff)
    for name in ("usd_per_mtok_in", "usd_per_mtok_cached", "usd_per_mtok_out"):
        row[name] = exact_usd(row[name])
    return row


def _tariff(row: Row[Any]) -> ProviderTariff:
    prices = (row.usd_per_mtok_in, row.usd_per_mtok_cached, row.usd_per_mtok_out)
    return ProviderTariff(row.model, row.pool, row.since_s, *map(float, prices))
