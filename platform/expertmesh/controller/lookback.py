"""What decisions were worth, once it is known: their cost beside the least, hopes beside facts.

Looked at now and then; what takes long to compute runs in a thread.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from expertmesh.controller.journal import DECISION, JournalStore
from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.controller.money import LAG_S
from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.scaling.calibration import Calibration, calibrate
from expertmesh.core.scaling.contract import ModelState, ScalingConfig
from expertmesh.core.scaling.hindsight import Regret, Served, hindsight
from expertmesh.core.scaling.replay import DecisionRecord, read_record
from expertmesh.errors import ExpertMeshError

_log = logging.getLogger(__name__)

DAY_S: Final = 86_400.0
BIN_S: Final = 60.0
_HOUR_S: Final = 3600.0
_RECORDS: Final = 120
"""Of the journal, at most, for each model: reading them takes the loop some milliseconds."""
_FIRST_S: Final = 60.0
_SHARE: Final = 8.0
"""A new look when what has been looked at is longer by one part of so many, an hour at most."""

ReadServed = Callable[[float, float, float], Awaitable[Mapping[tuple[str, str, int], Served]]]
"""From one Unix time to another, in bins of so many seconds: by model, pool and number of the bin.
Raises UpstreamUnavailable."""


class HoldsView(Protocol):
    """Raises UpstreamUnavailable."""

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]: ...


Models = Mapping[str, tuple[ScalingConfig, ModelState]]


class Lookback:
    def __init__(
        self,
        served: ReadServed,
        holds: HoldsView,
        journal: JournalStore,
        metrics: ControllerMetrics,
    ) -> None:
        self._served = served
        self._holds = holds
        self._journal = journal
        self._metrics = metrics
        self._failing = False
        self.regrets: dict[str, Regret] = {}
        """By model, as of the last look."""

    async def look(self, models: Models, now_s: float) -> None:
        """Never raises for a store that does not answer: what was known before stays."""
        until_s = (now_s - LAG_S) // BIN_S * BIN_S
        try:
            holds = await self._holds.capacity(until_s - DAY_S, until_s)
            since_s = _since_s(holds, until_s)
            served = await self._served(since_s, until_s, BIN_S) if since_s < until_s else {}
            found: dict[str, Regret] = {}
            for model, (config, state) in sorted(models.items()):
                own = [hold for hold in holds if hold.model == model]
                work = _bins(served, config, since_s, until_s)
                regret = await asyncio.to_thread(_regret, config, state, own, work, until_s)
                calibration = await self._calibration(model, now_s)
                self._metrics.looked_back(model, regret, calibration)
                if regret is not None:
                    found[model] = regret
        except ExpertMeshError as error:
            if not self._failing:
                _log.error("decisions cannot be looked back on: %s", error)
            self._failing = True
            return
        self._failing = False
        self.regrets = found

    async def run(self, models: Callable[[], Models], now_s: Callable[[], float]) -> None:
        """For ever."""
        wait_s = _FIRST_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                await self.look(models(), now_s())
            except Exception:
                _log.exception("decisions cannot be looked back on")
            spans_s = [each.until_s - each.since_s for each in self.regrets.values()]
            wait_s = min(_HOUR_S, max(_FIRST_S, max(spans_s, default=0.0) / _SHARE))

    async def _calibration(self, model: str, now_s: float) -> Calibration | None:
        entries = await self._journal.read(limit=_RECORDS, model=model, newest=True)
        young = [
            entry.payload
            for entry in entries
            if entry.kind == DECISION and entry.at_s >= now_s - _HOUR_S
        ]
        return await asyncio.to_thread(_calibrated, young)


def _since_s(holds: Sequence[CapacityHold], until_s: float) -> float:
    """The first whole minute: in a part of one, the least would pay for all of it."""
    first_s = min((hold.started_at_s for hold in holds), default=until_s)
    return max(until_s - DAY_S, min(until_s, math.ceil(first_s / BIN_S) * BIN_S))


def _bins(
    served: Mapping[tuple[str, str, int], Served],
    config: ScalingConfig,
    since_s: float,
    until_s: float,
) -> list[Served]:
    """Of the model's own groups; providers are paid by the token, whatever was decided."""
    bins = [Served()] * max(0, round((until_s - since_s) / BIN_S))
    providers = {route.pool for route in config.external}
    for (model, pool, number), work in served.items():
        if model == config.model and pool not in providers and number < len(bins):
            bins[number] += work
    return bins


def _regret(
    config: ScalingConfig,
    state: ModelState,
    holds: Sequence[CapacityHold],
    work: Sequence[Served],
    until_s: float,
) -> Regret | None:
    """None when there was no group, or there is no least cost."""
    since_s = _since_s(holds, until_s)
    bins = round((until_s - since_s) / BIN_S)
    if bins <= 0:
        return None
    least = hindsight(config, state, work[-bins:], BIN_S)
    spent_usd = sum(
        hold.usd_per_hour
        * max(0.0, min(hold.held_until_s, until_s) - max(hold.started_at_s, since_s))
        for hold in holds
    )
    return None if least is None else Regret(since_s, until_s, spent_usd / _HOUR_S, least)


def _calibrated(payloads: Sequence[dict[str, object]]) -> Calibration | None:
    records: list[DecisionRecord] = []
    for payload in payloads:
        try:
            records.append(read_record(payload))
        except msgspec.ValidationError:
            # Another version wrote it in another form.
            continue
    found = calibrate(records)
    return found[0] if found else None
