"""What today has cost and brought in so far, read from the ledger now and then."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from expertmesh.core.admission.window import day_of, day_start_s
from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.report import By, Tally, UsageRow, group_by

_READ_EVERY_S = 15.0
_PICO_USD_PER_USD = 10**12
_NANO_USD_PER_USD = 10**9


class DayLedger(Protocol):
    """Raises UpstreamUnavailable."""

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]: ...

    async def nodes(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[NodeHold, ...]: ...


class DaySpend(Protocol):
    """Raises UpstreamUnavailable."""

    async def spend(
        self, day_start_s: float, month_start_s: float
    ) -> Mapping[str, tuple[int, int]]: ...


@dataclass(frozen=True, slots=True)
class Today:
    """Since midnight, UTC."""

    at_s: float
    day_start_s: float
    capacity_usd: float
    """Of our groups and nodes; providers' bills are not in it."""
    idle_nodes_usd: float
    """The part of it that no group occupied."""
    tariff_usd: float
    """Revenue of the requests accepted today."""
    by_pool: dict[str, float]


class TodayReader:
    """One reading serves all who ask within some seconds."""

    def __init__(self, ledger: DayLedger, spend: DaySpend, now_s: Callable[[], float]) -> None:
        self._ledger = ledger
        self._spend = spend
        self._now_s = now_s
        self._last: Today | None = None
        self._lock = asyncio.Lock()

    async def read(self) -> Today:
        """Raises UpstreamUnavailable."""
        async with self._lock:
            now_s = self._now_s()
            if self._last is None or not 0 <= now_s - self._last.at_s < _READ_EVERY_S:
                self._last = await self._read(now_s)
            return self._last

    async def _read(self, now_s: float) -> Today:
        start_s = float(day_start_s(day_of(now_s)))
        holds = await self._ledger.capacity(start_s, now_s)
        nodes = await self._ledger.nodes(start_s, now_s)
        spent = await self._spend.spend(start_s, start_s)
        pools = _cost(start_s, now_s, holds, nodes)
        total = sum(pools.values(), start=UsageRow())
        tariff = sum(day for account, (day, _) in spent.items() if account.startswith("tenant:"))
        return Today(
            at_s=now_s,
            day_start_s=start_s,
            capacity_usd=total.capacity_nano_usd / _NANO_USD_PER_USD,
            idle_nodes_usd=total.idle_nodes_nano_usd / _NANO_USD_PER_USD,
            tariff_usd=tariff / _PICO_USD_PER_USD,
            by_pool={
                name: row.capacity_nano_usd / _NANO_USD_PER_USD for name, row in pools.items()
            },
        )


def _cost(
    since_s: float, until_s: float, holds: Sequence[CapacityHold], nodes: Sequence[NodeHold]
) -> dict[str, UsageRow]:
    """Whom it is attributed to does not matter here, so no request is looked at."""
    if not since_s < until_s:
        return {}
    tally = Tally()
    tally.add("", since_s, until_s, holds, (), nodes)
    return group_by(By.POOL, tally.cells())
