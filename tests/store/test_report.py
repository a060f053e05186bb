from decimal import Decimal
from random import Random

import pytest
from tests.store.records import NOON_S, capacity_hold, node_hold, usage_record

from expertmesh.core.metering.attribution import attribute
from expertmesh.core.metering.capacity import WHOLE_POOL
from expertmesh.core.metering.providers import ProviderTariff
from expertmesh.core.metering.rating import total_usd
from expertmesh.core.metering.report import IDLE, By, UsageReport, UsageRow
from expertmesh.store.database import Database
from expertmesh.store.focus import focus_rows
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_cells, usage_report

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
    assert abs(by_day.total.capacity_nano_usd - exact_nano_usd) <= 1


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


async def _fill_all(ledger: Ledger) -> None:
    """Two pools, one with known nodes; starts, drains, a provider, requests across hours."""
    await ledger.hold_capacity(
        [
            capacity_hold(
                *("g", NOON_S, NOON_S + 9000.123457, NOON_S + 9000.123457),
                usd_per_hour=1 / 3,
                start_s=100.5,
                draining_at_s=NOON_S + 8000,
                tokens_per_s=(100.0, 10.0),
            ),
            capacity_hold("h", NOON_S + 1, NOON_S + 7000, usd_per_hour=2 / 3, start_s=None),
            capacity_hold("i", NOON_S, NOON_S + 5000, pool="spot", model="other"),
        ],
        [
            node_hold(WHOLE_POOL, NOON_S + 10, NOON_S + 8500, usd_per_hour=0),
            node_hold("n1", NOON_S + 10, NOON_S + 8500, usd_per_hour=1.1),
            node_hold("n2", NOON_S + 4000, NOON_S + 8500, usd_per_hour=1.1),
        ],
    )
    await ledger.set_provider_tariffs([ProviderTariff("tiny-moe", "api", NOON_S, 1.0, 0.5, 3.0)])
    random = Random(3)
    await ledger.add_usage(
        [
            usage_record(
                f"r{number:03}",
                NOON_S + random.uniform(0, 9000),
                tenant=random.choice(("acme", "zoo")),
                group=group,
                pool={"g": "cpu", "h": "cpu", "i": "spot", "api": "api"}[group],
                model="other" if group == "i" else "tiny-moe",
                duration_s=random.expovariate(1 / 300),
                completion_tokens=random.randrange(500),
            )
            for number in range(300)
            for group in (random.choice(("g", "h", "i", "api")),)
        ]
    )


async def test_a_report_has_a_place_for_every_nano_dollar(database: Database) -> None:
    ledger = Ledger(database)
    await _fill_all(ledger)
    found = await usage_cells(ledger)
    totals = [found.grouped(by).total for by in By]
    assert all(total == totals[0] for total in totals)
    total = totals[0]
    parts = (
        total.attributed_nano_usd,
        total.idle_nano_usd,
        total.starting_nano_usd,
        total.draining_nano_usd,
        total.idle_nodes_nano_usd,
    )
    assert min(parts) > 0 and sum(parts) == total.capacity_nano_usd
    assert 0 < total.external_nano_usd < total.attributed_nano_usd
    assert total.requests == 300

    holds, nodes = await ledger.capacity(), await ledger.nodes()
    whole = attribute(holds, await ledger.usage(), NOON_S + 10_000, NOON_S, nodes)
    assert whole.cost_nano_usd + total.external_nano_usd == total.capacity_nano_usd
    assert sum(held.starting_nano_usd for held in whole.holds) == total.starting_nano_usd
    assert whole.idle_nodes_nano_usd == total.idle_nodes_nano_usd


@pytest.mark.parametrize("cut_s", [0.25, 3599.999999, 3600, 4321.987654, 8999])
async def test_two_windows_add_up_to_one_in_every_pool_and_model(
    database: Database, cut_s: float
) -> None:
    ledger = Ledger(database)
    await _fill_all(ledger)
    cut_s += NOON_S
    before, after = await usage_cells(ledger, until_s=cut_s), await usage_cells(ledger, cut_s)
    whole = await usage_cells(ledger)
    for by in (By.POOL, By.MODEL, By.DAY):
        one, other = before.grouped(by).rows, after.grouped(by).rows
        for key, row in whole.grouped(by).rows.items():
            both = one.get(key, UsageRow()) + other.get(key, UsageRow())
            for name in _WHOLE_AMOUNTS:
                assert getattr(both, name) == getattr(row, name), (key, name)
    both = before.grouped(By.TENANT).total + after.grouped(By.TENANT).total
    assert both.capacity_nano_usd == whole.grouped(By.TENANT).total.capacity_nano_usd


_WHOLE_AMOUNTS = (
    "requests",
    "tariff_usd",
    "capacity_nano_usd",
    "attributed_nano_usd",
    "external_nano_usd",
    "idle_nano_usd",
    "starting_nano_usd",
    "draining_nano_usd",
    "idle_nodes_nano_usd",
    "idle_us",
)


async def test_focus_bills_what_the_ledger_cost(database: Database) -> None:
    ledger = Ledger(database)
    await _fill_all(ledger)
    found = await usage_cells(ledger)
    assert found.since_s is not None and found.until_s is not None
    rows = list(focus_rows(found.cells, found.since_s, found.until_s))
    billed = total_usd(Decimal(str(row["BilledCost"])) for row in rows)
    assert billed == found.grouped(By.DAY).total.capacity_usd
    states = {row["x_CapacityState"] for row in rows}
    assert states == {"attributed", "external", "idle", "starting", "draining", "idle nodes"}
