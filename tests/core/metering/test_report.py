from decimal import Decimal

import pytest
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.metering.report import IDLE, By, UsageReport, UsageRow, summarise

_UNTIL_S = NOON_S + 100
# A second of each group costs a thousandth of a dollar.
_HOLDS = (
    capacity_hold("g", NOON_S, NOON_S + 10, model="one", pool="spot", usd_per_hour=3.6),
    capacity_hold("h", NOON_S, NOON_S + 10, model="two", pool="own", usd_per_hour=3.6),
)
_REQUESTS = (
    usage_record("a", NOON_S, tenant="acme", model="one", group="g", pool="spot", duration_s=2),
    usage_record("b", NOON_S, tenant="acme", model="two", group="h", pool="own", duration_s=3),
    usage_record("c", NOON_S + 3, tenant="zoo", model="two", group="h", pool="own", duration_s=1),
)
_MILLI = 1_000_000


def _money(by: By) -> dict[str, tuple[int, int, int]]:
    rows = summarise(by, "2026-01-01", NOON_S, _UNTIL_S, _HOLDS, _REQUESTS)
    return {
        key: (row.requests, row.attributed_nano_usd // _MILLI, row.idle_nano_usd // _MILLI)
        for key, row in rows.items()
    }


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (By.TENANT, {"acme": (2, 5, 0), "zoo": (1, 1, 0), IDLE: (0, 0, 14)}),
        (By.MODEL, {"one": (1, 2, 8), "two": (2, 4, 6)}),
        (By.POOL, {"spot": (1, 2, 8), "own": (2, 4, 6)}),
        (By.DAY, {"2026-01-01": (3, 6, 14)}),
    ],
)
def test_rows(by: By, expected: dict[str, tuple[int, int, int]]) -> None:
    assert _money(by) == expected


@pytest.mark.parametrize("by", By)
def test_every_grouping_adds_up_to_the_same_total(by: By) -> None:
    rows = summarise(by, "2026-01-01", NOON_S, _UNTIL_S, _HOLDS, _REQUESTS)
    total = UsageReport(by, NOON_S, _UNTIL_S, rows).total
    assert total == UsageRow(3, 300, 120, 60, Decimal("0.0000444"), 6 * _MILLI, 14 * _MILLI)
    assert total.capacity_nano_usd == 20 * _MILLI


def test_a_request_from_before_costs_but_is_not_counted_again() -> None:
    early = usage_record("a", NOON_S - 5, group="g", model="one", duration_s=7)
    rows = summarise(By.MODEL, "2026-01-01", NOON_S, _UNTIL_S, _HOLDS[:1], [early])
    assert rows == {"one": UsageRow(attributed_nano_usd=2 * _MILLI, idle_nano_usd=8 * _MILLI)}


def test_nothing_gives_no_rows() -> None:
    assert summarise(By.TENANT, "2026-01-01", NOON_S, _UNTIL_S, (), ()) == {}
    assert UsageReport(By.TENANT, None, None, {}).total == UsageRow()
