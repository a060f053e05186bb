"""The usage report, read from the ledger hour by hour so that a long one fits in memory."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from expertmesh.core.metering.providers import ProviderTariffs
from expertmesh.core.metering.report import By, Cell, Tally, UsageReport, UsageRow, group_by
from expertmesh.core.metering.usage import UsageRecord
from expertmesh.store.ledger import Ledger

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class UsageCells:
    """A report before it is grouped."""

    since_s: float | None = None
    """None, like `until_s`, when there is nothing to report."""
    until_s: float | None = None
    cells: Mapping[Cell, UsageRow] = field(default_factory=dict)

    def grouped(self, by: By) -> UsageReport:
        return UsageReport(by, self.since_s, self.until_s, group_by(by, self.cells))


async def usage_report(
    ledger: Ledger, by: By, since_s: float | None = None, until_s: float | None = None
) -> UsageReport:
    """All that the ledger holds, or the part at or after `since_s` and before `until_s`."""
    return (await usage_cells(ledger, since_s, until_s)).grouped(by)


async def usage_cells(
    ledger: Ledger, since_s: float | None = None, until_s: float | None = None
) -> UsageCells:
    span_s = await ledger.span_s()
    if span_s is None:
        return UsageCells()
    first_s, last_s = span_s
    start_s = first_s if since_s is None else max(first_s, since_s)
    end_s = math.nextafter(last_s, math.inf)
    if until_s is not None:
        end_s = min(end_s, until_s)
    tally = Tally()
    if start_s < end_s:
        await _count(ledger, tally, start_s, end_s)
    return UsageCells(start_s, max(start_s, end_s), tally.cells())


async def _count(ledger: Ledger, tally: Tally, start_s: float, end_s: float) -> None:
    providers = ProviderTariffs(await ledger.provider_tariffs())
    in_flight = await ledger.usage_across(start_s)
    for day, day_start_s, day_end_s in _days(start_s, end_s):
        holds = await ledger.capacity(day_start_s, day_end_s)
        nodes = await ledger.nodes(day_start_s, day_end_s)
        for hour_start_s, hour_end_s in _hours(day_start_s, day_end_s):
            requests = (*in_flight, *await ledger.usage(hour_start_s, hour_end_s))
            tally.add(
                day,
                hour_start_s,
                hour_end_s,
                [h for h in holds if h.started_at_s < hour_end_s and h.held_until_s > hour_start_s],
                requests,
                [n for n in nodes if n.started_at_s < hour_end_s and n.held_until_s > hour_start_s],
                providers,
            )
            in_flight = _ending_after(requests, hour_end_s)


def _ending_after(requests: tuple[UsageRecord, ...], at_s: float) -> tuple[UsageRecord, ...]:
    return tuple(request for request in requests if request.finished_at_s > at_s)


def _days(start_s: float, end_s: float) -> Iterator[tuple[str, float, float]]:
    """The UTC days from start to end, the first and last cut to fit."""
    while start_s < end_s:
        day = datetime.fromtimestamp(start_s, UTC).date()
        next_day = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC)
        yield day.isoformat(), start_s, min(end_s, next_day.timestamp())
        start_s = next_day.timestamp()


def _hours(start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
    """Cut where a clock strikes, so that the same hours are counted alike in every report."""
    while start_s < end_s:
        next_s = min(end_s, (start_s // _HOUR_S + 1) * _HOUR_S)
        yield start_s, next_s
        start_s = next_s
