"""What tenants and keys have spent, from the ledger, as limits need it after a start."""

from collections.abc import AsyncIterator, Mapping
from decimal import ROUND_CEILING, Context, Decimal, Inexact
from typing import Final

from sqlalchemy import case, func, select

from expertmesh.store.database import Database
from expertmesh.store.schema import usage_records

_EXACT = Context(prec=4000, traps=[Inexact])
_PICO_EXPONENT = 12
_NOTHING = Decimal(0)

_Part = tuple[str, str, Decimal, Decimal]
"""Tenant, key, and USD of some of its requests: those of the day, and all."""


class LedgerSpend:
    def __init__(self, database: Database) -> None:
        self._database: Final = database

    async def spend(
        self, day_start_s: float, month_start_s: float
    ) -> Mapping[str, tuple[int, int]]:
        """By account (`tenant:<name>`, `key:<id>`), in 1e-12 USD, rounded up: of the requests that
        were accepted since the start of the day and of the month, which starts no later.

        Raises UpstreamUnavailable.
        """
        if self._database.engine.dialect.name == "postgresql":
            parts = self._sums(day_start_s, month_start_s)
        else:
            parts = self._amounts(day_start_s, month_start_s)
        spent: dict[str, tuple[Decimal, Decimal]] = {}
        async for tenant, key_id, day_usd, month_usd in parts:
            for account in (f"tenant:{tenant}", f"key:{key_id}"):
                day, month = spent.get(account, (_NOTHING, _NOTHING))
                spent[account] = _EXACT.add(day, day_usd), _EXACT.add(month, month_usd)
        return {account: (_pico(day), _pico(month)) for account, (day, month) in spent.items()}

    async def _sums(self, day_start_s: float, month_start_s: float) -> AsyncIterator[_Part]:
        """PostgreSQL adds exactly."""
        columns = usage_records.c
        usd = func.sum(columns.tariff_usd)
        statement = (
            select(
                columns.tenant,
                columns.key_id,
                usd.filter(columns.at_s >= day_start_s).label("day_usd"),
                usd.label("month_usd"),
            )
            .where(columns.at_s >= month_start_s)
            .group_by(columns.tenant, columns.key_id)
        )
        async with self._database.reading() as connection:
            for row in await connection.execute(statement):
                yield row.tenant, row.key_id, row.day_usd or _NOTHING, row.month_usd

    async def _amounts(self, day_start_s: float, month_start_s: float) -> AsyncIterator[_Part]:
        """SQLite would add binary fractions: it counts equal amounts, and they are added here."""
        columns = usage_records.c
        statement = (
            select(
                columns.tenant,
                columns.key_id,
                case((columns.at_s >= day_start_s, 1), else_=0).label("today"),
                columns.tariff_usd,
                func.count().label("times"),
            )
            .where(columns.at_s >= month_start_s)
            .group_by(columns.tenant, columns.key_id, "today", columns.tariff_usd)
        )
        async with self._database.reading() as connection:
            async for row in await connection.stream(statement):
                usd = _EXACT.multiply(row.tariff_usd, row.times)
                yield row.tenant, row.key_id, usd if row.today else _NOTHING, usd


def _pico(usd: Decimal) -> int:
    scaled = _EXACT.scaleb(usd, _PICO_EXPONENT)
    return int(scaled.to_integral_value(ROUND_CEILING))
