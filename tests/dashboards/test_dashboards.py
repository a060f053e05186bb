"""The dashboards' own form: committed as generated, and fit to be read."""

import itertools
import json
import re

import pytest
from dashboards.alerts import alerts, recordings
from dashboards.build import GENERATED, dashboards, to_json
from dashboards.queries import flat_panels, label_values, panel_queries, queries, series
from grafana_foundation_sdk.models.dashboard import Dashboard

from expertmesh.telemetry import metrics, ray_metrics

BOARDS = dashboards()
SUFFIXES = {"histogram": ("_bucket", "_count")}
EXPORTED = {
    f"{metric.name}{suffix}"
    for metric in metrics.ALL
    for suffix in SUFFIXES.get(metric.kind, ("",))
}
RAY = {metric.name for metric in ray_metrics.ALL}
RECORDED = {each.record for each in recordings()}


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


def asked_of(expression: str) -> set[str]:
    recorded = set(re.findall(r"\b\w+:em_\w+:\w+", expression))
    assert recorded <= RECORDED, expression
    return set(re.findall(r"(?<![:\w])(?:em|ray)_\w+", expression)) | recorded


def test_every_query_asks_for_metrics_that_are_exported(board: Dashboard) -> None:
    for expression in queries(board):
        asked = asked_of(expression)
        assert asked
        assert asked <= EXPORTED | RECORDED | RAY, expression


def test_every_metric_is_shown_or_guarded() -> None:
    asked = {name for made in BOARDS.values() for each in queries(made) for name in asked_of(each)}
    for rule in (*alerts(), *recordings()):
        asked |= asked_of(rule.expr)
    unused = {name.removesuffix("_bucket").removesuffix("_count") for name in asked}
    # A term is told by the log, and the time of the ledger's count by its own age.
    known = {"em_controller_term", "em_controller_ledger_timestamp_seconds"}
    assert {metric.name for metric in metrics.ALL} - unused == known
    assert asked >= RAY


def test_queries_are_whole_and_their_variables_filled_in(board: Dashboard) -> None:
    shown = sum(len(panel.targets) for panel in flat_panels(board))
    variables = [each for each in board.templating.list_val if each.type_val == "query"]
    annotations = board.annotations.list_val or () if board.annotations else ()
    assert {"model", "pool"} <= {each.name for each in variables}
    assert len(queries(board)) == shown + len(variables) + len(annotations)
    assert not any("$" in expression for expression in queries(board))
    windows = panel_queries(board, rate_interval="7s", window="9m")
    assert any("[7s]" in query.expression for query in windows)
    asks_for_range = any("$__range" in t.expr for p in flat_panels(board) for t in p.targets)
    assert any("[9m]" in query.expression for query in windows) is asks_for_range


def test_every_number_about_experts_says_who_counts_them() -> None:
    names = ("em_expert_", "em_rank_expert_")
    counted = [
        panel
        for board in BOARDS.values()
        for panel in flat_panels(board)
        if any(name in target.expr for target in panel.targets for name in names)
    ]
    assert len(counted) >= 10
    for panel in counted:
        assert "ounted by CPU workers alone" in panel.description, panel.title


def test_every_board_leads_to_the_others(board: Dashboard) -> None:
    (link,) = board.links
    assert link.tags == board.tags == ["expertmesh"]
    assert link.include_vars and link.keep_time
    assert len({each.uid for each in BOARDS.values()}) == len(BOARDS) == 7


def test_decisions_are_marks_with_what_bound_them() -> None:
    (written,) = json.loads(to_json(BOARDS["autoscaler"]))["annotations"]["list"]
    assert "binding" in written["textFormat"] and "action" in written["titleFormat"]
    assert "em_controller_decisions_total" in written["expr"]


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
