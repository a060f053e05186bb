"""The columns that FOCUS 1.2 asks of every data set, and what it says of their values."""

import json
import re
from datetime import datetime
from decimal import Decimal

import pytest
from tests.store.records import NOON_S

from expertmesh.core.metering.rating import total_usd
from expertmesh.core.metering.report import IDLE, Cell, UsageRow
from expertmesh.store.focus import COLUMNS, MANDATORY, FocusRow, focus_rows

_DAY_S = 86_400
_USED = Cell("2026-01-01", "h200", "big", "acme", "key_1")
_REST = Cell("2026-01-01", "h200", "big", IDLE, IDLE)
_NODES = Cell("2026-02-28", "h200", IDLE, IDLE, IDLE)
_BOUGHT = Cell("2026-01-01", "api", "big", "acme", "key_1")
_CELLS = {
    _USED: UsageRow(
        *(3, 700, 100, 50, Decimal("0.000001234")),
        attributed_nano_usd=1_500_000_000_001,
        energy_uj=3_600_000_000,
    ),
    _REST: UsageRow(
        idle_nano_usd=2,
        starting_nano_usd=30,
        draining_nano_usd=400,
        idle_us=3_600_000_000,
        starting_us=1_800_000_000,
        draining_us=1,
        energy_uj=None,
    ),
    _NODES: UsageRow(idle_nodes_nano_usd=5, idle_nodes_us=60_000_000),
    _BOUGHT: UsageRow(1, 10, 0, 1, attributed_nano_usd=70, external_nano_usd=70),
}
_NOT_NULL = set(MANDATORY) - {"ChargeClass", "BillingAccountName"}


@pytest.fixture
def rows() -> list[FocusRow]:
    return list(focus_rows(_CELLS, NOON_S, NOON_S + 90 * _DAY_S))


def test_every_mandatory_column_is_there_and_filled_where_it_must_be(rows: list[FocusRow]) -> None:
    assert len(MANDATORY) == 21 and len(set(COLUMNS)) == len(COLUMNS)
    for row in rows:
        assert tuple(row) == COLUMNS
        assert [name for name in _NOT_NULL if row[name] is None] == []
        assert row["ChargeClass"] is None


def test_columns_of_our_own_are_marked_as_such() -> None:
    ours = set(COLUMNS) - set(MANDATORY) - _CONDITIONAL
    assert ours and all(name.startswith("x_") for name in ours)


_CONDITIONAL = {
    "ChargeFrequency",
    "ConsumedQuantity",
    "ConsumedUnit",
    "PricingCategory",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceSubcategory",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
}


def test_costs_add_up_to_those_of_the_report(rows: list[FocusRow]) -> None:
    capacity = sum(row.capacity_nano_usd for row in _CELLS.values())
    billed = total_usd(Decimal(str(row["BilledCost"])) for row in rows)
    assert billed == Decimal(capacity).scaleb(-9) == Decimal("1500.000000508")
    for row in rows:
        costs = {
            row[name] for name in ("BilledCost", "EffectiveCost", "ContractedCost", "ListCost")
        }
        assert len(costs) == 1


def test_each_reason_is_a_charge_of_its_own(rows: list[FocusRow]) -> None:
    found = {
        str(row["x_CapacityState"]): (row["PricingQuantity"], row["PricingUnit"]) for row in rows
    }
    assert found == {
        "attributed": (Decimal(750), "Tokens"),
        "idle": (Decimal(1), "Hours"),
        "starting": (Decimal("0.5"), "Hours"),
        "draining": (Decimal(0), "Hours"),
        "idle nodes": (Decimal("0.016667"), "Hours"),
        "external": (Decimal(11), "Tokens"),
    }


def test_a_tenant_is_a_sub_account_and_idle_time_has_none(rows: list[FocusRow]) -> None:
    for row in rows:
        tenant = "acme" if row["x_CapacityState"] in ("attributed", "external") else None
        assert row["SubAccountId"] == row["SubAccountName"] == tenant
        assert (row["SubAccountType"] is None) == (tenant is None)
        tags = json.loads(str(row["Tags"]))
        assert tags == {
            name: value
            for name, value in (("model", row["x_Model"]), ("key", row["x_KeyId"]))
            if value is not None
        }


def test_who_provides_it(rows: list[FocusRow]) -> None:
    providers = {str(row["x_CapacityState"]): row["ProviderName"] for row in rows}
    assert providers.pop("external") == "api"
    assert set(providers.values()) == {"ExpertMesh"}


def test_periods_are_months_and_days_in_utc(rows: list[FocusRow]) -> None:
    by_state = {str(row["x_CapacityState"]): row for row in rows}
    # The first day from noon on, as asked for.
    used = by_state["attributed"]
    assert (used["ChargePeriodStart"], used["ChargePeriodEnd"]) == (
        "2026-01-01T12:00:00Z",
        "2026-01-02T00:00:00Z",
    )
    assert (used["BillingPeriodStart"], used["BillingPeriodEnd"]) == (
        "2026-01-01T00:00:00Z",
        "2026-02-01T00:00:00Z",
    )
    february = by_state["idle nodes"]
    assert (february["ChargePeriodStart"], february["ChargePeriodEnd"]) == (
        "2026-02-28T00:00:00Z",
        "2026-03-01T00:00:00Z",
    )
    assert february["BillingPeriodEnd"] == "2026-03-01T00:00:00Z"
    december = Cell("2025-12-31", "p", "m", "t", "k")
    (row,) = focus_rows({december: UsageRow(1)}, NOON_S - 9 * _DAY_S, NOON_S)
    assert row["BillingPeriodEnd"] == "2026-01-01T00:00:00Z"
    for row in rows:
        for name in ("BillingPeriodStart", "BillingPeriodEnd", "ChargePeriodStart"):
            assert datetime.fromisoformat(str(row[name])).utcoffset() is not None
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(row[name]))


def test_nothing_gives_no_rows() -> None:
    assert list(focus_rows({}, NOON_S, NOON_S)) == []
