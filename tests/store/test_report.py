from decimal import Decimal

import pytest
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.metering.report import IDLE, By, UsageReport
from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report

_DAY_S = 86_400
_MIDNIGHT_S = NOON_S + _DAY_S / 2
_GROUP = "em-tiny-moe-cpu-0"


async def _fill(ledger: Ledger) -> None:
    """A group held over two midnights and a bit, with a request across the first of them."""
    await ledger.hold_capacity(
        [capacity_hold(_GROUP, NOON_S, NOON_S + 2 * _DAY_S + 0.123457, usd_per_hour=0.123457)]
    )
    await ledger.add_usage(
        [
            usage_record("across", _MIDNIGHT_S - 1, tenant="acme", duration_s=3),
            usage_record("later", _MIDNIGHT_S + _DAY_S + 5, tenant="zoo", duration_s=2),
        ]
    )


async def test_days_are_cut_at_midnight_and_lose_nothing(database: Database) -> None:
    ledger = Ledger(database)
    await _fill(ledger)
    by_day = await usage_report(ledger, By.DAY)

    assert list(by_day.rows) == ["2026-01-01", "2026-01-02", "2026-01-03"]
    first, second, third = by_day.rows.values()
    assert (first.requests, second.requests, third.requests) == (1, 0, 1)
    # One second of the request before midnight and two after it, at 0.123457 $ an hour.
    assert first.attributed_nano_usd == pytest.approx(0.123457 / 3600 * 1e9, abs=1)
    assert second.attributed_nano_usd == pytest.approx(0.123457 / 3600 * 2e9, abs=1)
    exact_nano_usd = int(Decimal("0.123457") * (2 * _DAY_S * 1_000_000 + 123_457) / Decimal("3.6"))
    assert by_day.total.capacity_nano_usd == exact_nano_usd


@pytest.mark.parametrize("by", [By.TENANT, By.MODEL, By.POOL])
async def test_every_grouping_has_the_same_total(database: Database, by: By) -> None:
    ledger = Ledger(database)
    await _fill(ledger)
    assert (await usage_report(ledger, by)).total == (await usage_report(ledger, By.DAY)).total


async def test_idle_time_has_no_tenant(database: Database) -> None:
    ledger = Ledger(database)
    await _fill(ledger)
    rows = (await usage_report(ledger, By.TENANT)).rows
    assert list(rows) == [IDLE, "acme", "zoo"]
    assert rows[IDLE].attributed_nano_usd == 0 and rows[IDLE].idle_nano_usd > 0
    assert rows["acme"].idle_nano_usd == 0 and rows["acme"].attributed_nano_usd > 0


async def test_adjacent_windows_add_up(database: Database) -> None:
    ledger = Ledger(database)
    await _fill(ledger)
    cut_s = _MIDNIGHT_S + 0.333
    before = await usage_report(ledger, By.MODEL, until_s=cut_s)
    after = await usage_report(ledger, By.MODEL, since_s=cut_s)
    whole = (await usage_report(ledger, By.MODEL)).total
    both = before.total + after.total
    assert (both.requests, both.tariff_usd) == (whole.requests, whole.tariff_usd)
    assert both.capacity_nano_usd == whole.capacity_nano_usd


async def test_nothing_recorded_is_an_empty_report(database: Database) -> None:
    assert await usage_report(Ledger(database), By.DAY) == UsageReport(By.DAY, None, None, {})


async def test_a_window_with_nothing_in_it_is_empty(database: Database) -> None:
    ledger = Ledger(database)
    await _fill(ledger)
    assert (await usage_report(ledger, By.DAY, since_s=NOON_S + 9 * _DAY_S)).rows == {}
    assert (await usage_report(ledger, By.DAY, until_s=NOON_S - 9 * _DAY_S)).rows == {}
