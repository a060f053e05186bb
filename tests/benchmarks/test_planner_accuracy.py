"""The accuracy tables: energy out of sample, honest classes, and a document that is up to date."""

from functools import cache
from statistics import median

import pytest
from benchmarks.planner_accuracy import (
    DOCUMENT,
    EnergyError,
    energy_figure,
    energy_report,
    energy_rows,
    errors_figure,
    published_rows,
    rates_figure,
    report,
)


@cache
def energies() -> tuple[EnergyError, ...]:
    return tuple(energy_report(published_rows()[0], energy_rows()))


def test_energy_from_predicted_rates_is_right_within_a_third_in_the_median() -> None:
    assert median(abs(one.committed) for one in energies()) <= 0.25
    assert median(abs(one.row_out) for one in energies()) <= 0.33


def test_the_worst_energies_are_those_of_small_models_on_one_h100() -> None:
    poor = {one.row.label for one in energies() if abs(one.row_out) > 0.5}
    assert poor and all("1 GPU" in label and "H100" in label for label in poor)


def test_leaving_rows_out_leaves_out_their_own_runs() -> None:
    series = {row.series for row in published_rows()[0]}
    assert all(one.row.without <= series for one in energies())
    assert any(one.row_out != pytest.approx(one.committed) for one in energies())


def test_no_batch_is_larger_than_the_cache() -> None:
    rows = energy_rows()
    assert all(1 <= row.batch() <= row.batch_per_rank for row in rows)
    assert any(row.batch() < row.batch_per_rank for row in rows)


def test_only_a_mean_of_live_traffic_is_no_measure() -> None:
    rows, _ = published_rows()
    live = [row for row in rows if row.live]
    assert [row.number for row in live] == [1] and not live[0].fitted and live[0].why


def test_the_document_has_these_tables() -> None:
    rows, skipped = published_rows()
    found = report(rows)
    figures = (errors_figure(found), rates_figure(found, skipped), energy_figure(energies()))
    text = DOCUMENT.read_text()
    for figure in figures:
        assert figure.to_markdown() in text, (
            "run: python -m benchmarks.planner_accuracy --write-docs"
        )
