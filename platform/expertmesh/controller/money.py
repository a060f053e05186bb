"""The ledger's cost as growing counters: who was served, and what stood idle, as money."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.errors import ExpertMeshError
from expertmesh.store.report import UsageCells

_log = logging.getLogger(__name__)

LAG_S: Final = 120.0
"""Usage reaches the ledger when a request has ended: of one that takes longer, the first part is
counted as idle time. The ledger's own report knows better."""
_EVERY_S: Final = 15.0

ReadUsage = Callable[[float, float], Awaitable[UsageCells]]
"""From one Unix time to another. Raises UpstreamUnavailable."""


class MoneyCounter:
    def __init__(self, read: ReadUsage, metrics: ControllerMetrics, since_s: float) -> None:
        """Counts from `since_s` on."""
        self._read = read
        self._metrics = metrics
        self._until_s = since_s
        self._failing = False

    async def count(self, now_s: float) -> None:
        """What has not been counted yet and is old enough; never raises."""
        until_s = now_s - LAG_S
        if until_s <= self._until_s:
            return
        try:
            found = await self._read(self._until_s, until_s)
        except ExpertMeshError as error:
            if not self._failing:
                _log.error("the ledger's cost cannot be counted: %s", error)
            self._failing = True
            return
        self._failing = False
        self._metrics.counted_money(found.cells, until_s)
        self._until_s = until_s

    async def run(self, now_s: Callable[[], float]) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.count(now_s())
            except Exception:
                _log.exception("the ledger's cost cannot be counted")
