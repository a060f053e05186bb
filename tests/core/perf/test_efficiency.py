"""The committed efficiencies are the fitted ones, and predict what was published."""

from dataclasses import replace
from functools import cache
from statistics import median

import pytest
from benchmarks.planner_accuracy import (
    ERAS,
    MEDIAN_GOAL,
    WORST_GOAL,
    Row,
    as_efficiency,
    fit,
    published_rows,
    wrong_orders,
)

from expertmesh.core.domain.accelerator import Era
from expertmesh.core.perf.efficiency import EFFICIENCIES, Efficiency, efficiency


@cache
def rows() -> tuple[Row, ...]:
    return tuple(published_rows()[0])


def errors(era: Era | None = None) -> list[float]:
    return [
        abs(row.error(EFFICIENCIES[row.era]))
        for row in rows()
        if row.fitted and row.number is not None and era in (None, row.era)
    ]


@pytest.mark.parametrize("era", ERAS)
def test_the_fit_gives_the_committed_numbers(era: Era) -> None:
    own = [row for row in rows() if row.era is era and row.fitted]
    found, committed = as_efficiency(fit(own)), EFFICIENCIES[era]
    assert committed.rows == len(own)
    for name in (
        "memory",
        "experts_memory",
        "compute",
        "fixed_s_per_layer",
        "fixed_s_per_sequence",
    ):
        assert getattr(committed, name) == pytest.approx(getattr(found, name), rel=0.01)


def test_published_rates_are_met_within_the_goals() -> None:
    assert median(errors()) <= MEDIAN_GOAL
    assert max(errors()) <= WORST_GOAL


@pytest.mark.parametrize("era", ERAS)
def test_an_era_is_predicted_with_the_numbers_of_the_other(era: Era) -> None:
    other = next(one for one in ERAS if one is not era)
    borrowed = [
        abs(row.error(EFFICIENCIES[other])) for row in rows() if row.era is era and row.fitted
    ]
    assert median(borrowed) <= 0.25


def test_the_planner_takes_the_right_side_on_expert_parallelism() -> None:
    assert wrong_orders(rows(), EFFICIENCIES) == []
    # Had the slowest been the fastest, it would have been told.
    flipped = [replace(row, published=1 / row.published) for row in rows()]
    assert wrong_orders(flipped, EFFICIENCIES)


def test_most_rows_lie_in_the_range() -> None:
    inside = [
        found.low <= row.published <= found.high
        for row in rows()
        if row.fitted
        for found in [EFFICIENCIES[row.era].rate(row.predicted(EFFICIENCIES[row.era]))]
    ]
    assert sum(inside) >= 0.75 * len(inside)


def test_rows_are_told_apart_and_say_where_they_are_from() -> None:
    labels = [row.label for row in rows()]
    assert len(labels) == len(set(labels))
    assert all(row.source and row.published > 0 for row in rows())
    assert all(row.fitted or row.why for row in rows())
    _, skipped = published_rows()
    assert {row.number for row in rows()} | {one.number for one in skipped} >= {
        1, 2, 3, 4, 5, 8, 11, 16, 19, 21, 23, 25,
    }  # fmt: skip


@pytest.mark.parametrize("era", list(Era))
def test_every_era_has_sane_numbers(era: Era) -> None:
    found = efficiency(era)
    assert 0 < found.memory <= 1
    assert 0 < found.experts_memory <= 1
    assert 0 < found.compute <= 1
    assert found.rate_low <= 1 <= found.rate_high
    assert (found.rows > 0) == (era in EFFICIENCIES)


def test_borrowed_numbers_have_the_wider_range() -> None:
    own, borrowed = efficiency(Era.HOPPER), efficiency(Era.AMPERE)
    assert borrowed.compute == own.compute
    assert borrowed.rate_low < own.rate_low
    assert borrowed.rate_high > own.rate_high


def test_ranges_of_rates_and_times_mirror_each_other() -> None:
    found = Efficiency(0.8, 0.5, 0.6, 0.0, 0.0, 0.5, 2.0, 1)
    rate, time = found.rate(100.0), found.time(0.01)
    assert (rate.low, rate.expected, rate.high) == (50.0, 100.0, 200.0)
    assert (time.low, time.expected, time.high) == (0.005, 0.01, 0.02)
