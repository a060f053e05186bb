"""The usage report, read from the ledger day by day so that a long one fits in memory."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from expertmesh.core.metering.report import By, UsageReport, UsageRow, summarise
from expertmesh.store.ledger import Ledger


async def usage_report(
    ledger: Ledger, by: By, since_s: float | None = None, until_s: float | None = None
) -> UsageReport:
    """All that the ledger holds, or the part at or after `since_s` and before `until_s`."""
    span_s = await ledger.span_s()
    if span_s is None:
        return UsageReport(by, None, None, {})
    first_s, last_s = span_s
    start_s = first_s if since_s is None else max(first_s, since_s)
    end_s = math.nextafter(last_s, math.inf)
    if until_s is not None:
        end_s = min(end_s, until_s)
    rows: dict[str, UsageRow] = {}
    for day, day_start_s, day_end_s in _days(start_s, end_s):
        holds = await ledger.capacity(day_start_s, day_end_s)
        requests = await ledger.usage_in_flight(day_start_s, day_end_s)
        for key, row in summarise(by, day, day_start_s, day_end_s, holds, requests).items():
            rows[key] = rows.get(key, UsageRow()) + row
    return UsageReport(by, start_s, max(start_s, end_s), dict(sorted(rows.items())))


def _days(start_s: float, end_s: float) -> Iterator[tuple[str, float, float]]:
    """The UTC days from start to end, the first and last cut to fit."""
    while start_s < end_s:
        day = datetime.fromtimestamp(start_s, UTC).date()
        next_day = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC)
        yield day.isoformat(), start_s, min(end_s, next_day.timestamp())
        start_s = next_day.timestamp()
