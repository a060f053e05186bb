from collections.abc import Sequence
from decimal import Decimal

import pytest
from tests.store.records import NOON_S, capacity_hold, node_hold, usage_record

from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
from expertmesh.core.metering.providers import ProviderTariff, ProviderTariffs
from expertmesh.core.metering.report import (
    IDLE,
    By,
    Cell,
    Tally,
    UsageReport,
    UsageRow,
    group_by,
)
from expertmesh.core.metering.usage import UsageRecord

_UNTIL_S = NOON_S + 100
_DAY = "2026-01-01"
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


def cells(
    holds: Sequence[CapacityHold],
    requests: Sequence[UsageRecord],
    nodes: Sequence[NodeHold] = (),
    tariffs: Sequence[ProviderTariff] = (),
) -> dict[Cell, UsageRow]:
    tally = Tally()
    tally.add(_DAY, NOON_S, _UNTIL_S, holds, requests, nodes, ProviderTariffs(tariffs))
    return tally.cells()


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (By.TENANT, {"acme": (2, 5, 0), "zoo": (1, 1, 0), IDLE: (0, 0, 14)}),
        (By.KEY, {"key_1": (3, 6, 0), IDLE: (0, 0, 14)}),
        (By.MODEL, {"one": (1, 2, 8), "two": (2, 4, 6)}),
        (By.POOL, {"spot": (1, 2, 8), "own": (2, 4, 6)}),
        (By.DAY, {_DAY: (3, 6, 14)}),
    ],
)
def test_rows(by: By, expected: dict[str, tuple[int, int, int]]) -> None:
    rows = group_by(by, cells(_HOLDS, _REQUESTS))
    assert list(rows) == sorted(rows)
    assert {
        key: (row.requests, row.attributed_nano_usd // _MILLI, row.idle_nano_usd // _MILLI)
        for key, row in rows.items()
    } == expected


@pytest.mark.parametrize("by", By)
def test_every_grouping_adds_up_to_the_same_total(by: By) -> None:
    rows = group_by(by, cells(_HOLDS, _REQUESTS))
    total = UsageReport(by, NOON_S, _UNTIL_S, rows).total
    assert total == UsageRow(
        requests=3,
        prompt_tokens=300,
        cached_tokens=120,
        completion_tokens=60,
        tariff_usd=Decimal("0.0000444"),
        attributed_nano_usd=6 * _MILLI,
        idle_nano_usd=14 * _MILLI,
        idle_us=14 * _MILLI,
        energy_uj=None,
    )
    assert total.capacity_nano_usd == 20 * _MILLI


def test_a_request_from_before_costs_but_is_not_counted_again() -> None:
    early = usage_record("a", NOON_S - 5, group="g", model="one", pool="spot", duration_s=7)
    (row,) = group_by(By.MODEL, cells(_HOLDS[:1], [early])).values()
    assert (row.requests, row.prompt_tokens, row.tariff_usd) == (0, 0, Decimal(0))
    assert (row.attributed_nano_usd, row.idle_nano_usd) == (2 * _MILLI, 8 * _MILLI)


def test_what_serves_nobody_has_a_column_for_each_reason() -> None:
    hold = capacity_hold(
        "g", NOON_S, NOON_S + 10, usd_per_hour=3.6, start_s=3, draining_at_s=NOON_S + 8
    )
    nodes = [node_hold(WHOLE_POOL, usd_per_hour=0), node_hold(usd_per_hour=7.2)]
    rows = group_by(By.MODEL, cells([hold], [], nodes))
    busy, free = rows["tiny-moe"], rows[IDLE]
    assert (busy.starting_nano_usd, busy.idle_nano_usd) == (3 * _MILLI, 5 * _MILLI)
    assert busy.draining_nano_usd == 2 * _MILLI
    assert busy.unattributed_nano_usd == busy.capacity_nano_usd == 10 * _MILLI
    assert (busy.starting_us, busy.idle_us, busy.draining_us) == (3_000_000, 5_000_000, 2_000_000)
    # The node costs two thousandths a second for a minute; the group had half for 10 s.
    assert free.idle_nodes_nano_usd == 110 * _MILLI
    assert free.idle_nodes_us == 55_000_000


def test_a_provider_costs_what_its_tariff_says() -> None:
    tariffs = [
        ProviderTariff("m", "api", NOON_S + 50, 2.0, 1.0, 8.0),
        ProviderTariff("m", "api", NOON_S - 50, 1.0, 0.5, 4.0),
    ]

    def asked(request_id: str, at_s: float, **others: str) -> UsageRecord:
        fields = {"model": "m", "pool": "api", "group": "api", **others}
        return usage_record(request_id, at_s, **fields, tariff_usd=Decimal("0.001"))  # type: ignore[arg-type]

    requests = [
        asked("a", NOON_S),
        asked("b", NOON_S + 50),
        asked("elsewhere", NOON_S, pool="other"),
        asked("other model", NOON_S, model="n"),
        asked("before", NOON_S - 1),
    ]
    row = group_by(By.POOL, cells([], requests, tariffs=tariffs))["api"]
    # 60 uncached, 40 cached and 20 output tokens.
    first, second = 60 * 1000 + 40 * 500 + 20 * 4000, 60 * 2000 + 40 * 1000 + 20 * 8000
    assert row.external_nano_usd == row.attributed_nano_usd == first + second
    assert row.prefill_nano_usd == 80_000 + 160_000
    assert row.decode_nano_usd == 80_000 + 160_000
    assert (row.requests, row.energy_uj) == (3, 0)
    assert row.margin_usd == Decimal("0.003") - Decimal("0.00048")


def test_the_first_tariff_also_holds_for_the_time_before_it() -> None:
    tariffs = ProviderTariffs([ProviderTariff("m", "api", NOON_S, 1.0, 1.0, 1.0)])
    cost = tariffs.cost(usage_record(at_s=NOON_S - 9, model="m", pool="api"))
    assert cost is not None and cost.nano_usd == 120_000


def test_cost_per_million_tokens_is_told_apart_where_the_rates_are_known() -> None:
    hold = capacity_hold("g", NOON_S, NOON_S + 10, usd_per_hour=3.6, tokens_per_s=(100.0, 10.0))
    request = usage_record("a", NOON_S, group="g", duration_s=10)
    row = group_by(By.MODEL, cells([hold], [request]))["tiny-moe"]
    # 60 uncached tokens take 0.6 s, 20 output tokens 2 s.
    assert row.attributed_nano_usd == 10 * _MILLI
    assert row.prefill_nano_usd == pytest.approx(10 * _MILLI * 0.6 / 2.6, abs=2)
    assert row.prefill_nano_usd + row.decode_nano_usd == row.attributed_nano_usd
    assert row.usd_per_mtok == Decimal("83.333333")
    assert row.usd_per_mtok_in == Decimal("23.076920")
    assert row.usd_per_mtok_out == Decimal("384.615400")

    unknown = group_by(By.MODEL, cells(_HOLDS, _REQUESTS))["one"]
    assert unknown.usd_per_mtok_in is None and unknown.usd_per_mtok_out is None
    assert unknown.usd_per_mtok is not None
    assert UsageRow().usd_per_mtok is None


def test_energy_is_that_of_busy_and_of_resting_accelerators() -> None:
    hold = capacity_hold("g", NOON_S, NOON_S + 10, watts=(100.0, 500.0), usd_per_hour=3.6)
    request = usage_record("a", NOON_S, tenant="acme", group="g", duration_s=4)
    nodes = [node_hold(WHOLE_POOL), node_hold(usd_per_hour=7.2, idle_watts=400.0)]
    rows = group_by(By.TENANT, cells([hold], [request], nodes))
    assert rows["acme"].energy_uj == 4 * 500 * 1_000_000
    # Six seconds of the group at rest, 55 of the rest of its node.
    assert rows[IDLE].energy_uj == (6 * 100 + 55 * 400) * 1_000_000
    assert rows["acme"].energy_wh == pytest.approx(2000 / 3600)


def test_energy_that_is_not_known_of_a_part_is_not_told_of_the_whole() -> None:
    known = capacity_hold("g", model="one", watts=(100.0, 500.0))
    rows = group_by(By.POOL, cells([known, capacity_hold("h", model="two")], []))
    assert rows["cpu"].energy_wh is None
    assert (
        cells([known], [], [node_hold(pool="other")])[
            Cell(_DAY, "other", IDLE, IDLE, IDLE)
        ].energy_uj
        is None
    )


def test_nothing_gives_no_rows() -> None:
    assert cells((), ()) == {}
    assert UsageReport(By.TENANT, None, None, {}).total == UsageRow()
