"""The dashboards' own form: committed as generated, and fit to be read."""

import itertools
import re

import pytest
from dashboards.build import GENERATED, dashboards, to_json
from dashboards.queries import flat_panels, label_values, panel_queries, queries, series
from grafana_foundation_sdk.models.dashboard import Dashboard

from expertmesh.telemetry import metrics

BOARDS = dashboards()
SUFFIX = {"histogram": "_bucket"}
EXPORTED = {f"{metric.name}{SUFFIX.get(metric.kind, '')}" for metric in metrics.ALL}


@pytest.fixture(params=BOARDS.values(), ids=list(BOARDS))
def board(request: pytest.FixtureRequest) -> Dashboard:
    chosen: Dashboard = request.param
    return chosen


def test_the_committed_files_are_the_generated_ones() -> None:
    committed = {path.stem: path.read_text() for path in GENERATED.glob("*.json")}
    generated = {name: to_json(board) for name, board in BOARDS.items()}
    assert committed == generated, "run: python -m dashboards.build"


def test_every_panel_says_what_it_shows_and_in_what_unit(board: Dashboard) -> None:
    panels = flat_panels(board)
    assert len(panels) >= 10
    for panel in panels:
        assert panel.title
        assert panel.description.endswith("."), panel.title
        assert panel.field_config.defaults.unit, panel.title
        assert panel.datasource.uid == "${datasource}", panel.title
        assert panel.targets, panel.title
        for target in panel.targets:
            assert target.legend_format, panel.title
    titles = [panel.title for panel in panels]
    assert len(set(titles)) == len(titles)


def test_queries_of_a_panel_and_panels_of_a_board_can_be_told_apart(board: Dashboard) -> None:
    ids = [panel.id_val for panel in board.panels]
    assert len(set(ids)) == len(ids)
    for panel in flat_panels(board):
        letters = [target.ref_id for target in panel.targets]
        assert all(letters)
        assert len(set(letters)) == len(letters), panel.title


def test_panels_fill_the_grid_and_do_not_overlap(board: Dashboard) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in board.panels:
        place = panel.grid_pos
        assert place.x + place.w <= 24, panel.title
        own = set(
            itertools.product(range(place.x, place.x + place.w), range(place.y, place.y + place.h))
        )
        assert not own & cells, panel.title
        cells |= own
    assert len(cells) == 24 * (1 + max(y for _, y in cells))


def test_every_query_asks_for_metrics_that_are_exported(board: Dashboard) -> None:
    for expression in queries(board):
        asked = set(re.findall(r"\bem_\w+", expression))
        assert asked
        assert asked <= EXPORTED, expression


def test_queries_are_whole_and_their_variables_filled_in(board: Dashboard) -> None:
    shown = sum(len(panel.targets) for panel in flat_panels(board))
    assert len(queries(board)) == shown + 2  # the variables model and pool
    assert not any("$" in expression for expression in queries(board))
    windows = panel_queries(board, rate_interval="7s", window="9m")
    assert any("[7s]" in query.expression for query in windows)
    assert any("[9m]" in query.expression for query in windows)


def test_the_overview_shows_what_it_is_for() -> None:
    titles = {panel.title for panel in flat_panels(BOARDS["overview"])}
    assert titles >= {
        "Spend rate by model and pool",
        "Spend by model and pool",
        "Tariff revenue against cost",
        "Groups by state",
        "Queue",
        "Requests by status",
        "Tokens",
        "Time to first token",
        "Time per output token",
        "Expert imbalance by group",
    }
    for title in ("Time to first token", "Time per output token"):
        (panel,) = (each for each in flat_panels(BOARDS["overview"]) if each.title == title)
        assert [target.legend_format for target in panel.targets] == ["p50", "p95", "p99"]


def test_a_label_that_a_metric_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="em_gateway_queued_requests has no label pool"):
        series(metrics.GATEWAY_QUEUED, pool="cpu-small")
    with pytest.raises(ValueError, match="em_controller_loop_seconds has no label model"):
        label_values(metrics.CONTROLLER_LOOP_DURATION, "model")


def test_a_metric_is_filtered_by_the_chosen_labels_that_it_has() -> None:
    assert series(metrics.CONTROLLER_LOOP_DURATION) == "em_controller_loop_seconds_bucket"
    assert series(metrics.GATEWAY_QUEUED) == 'em_gateway_queued_requests{model=~"$model"}'
    assert series(metrics.CONTROLLER_GROUPS, state="ready") == (
        'em_controller_groups{model=~"$model", pool=~"$pool", state="ready"}'
    )
