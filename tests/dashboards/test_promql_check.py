"""Every query of every dashboard on a real Prometheus, and proof that a broken one is found.

The metrics come from stand_in_exporter.py; the same check runs against the real gateway and
controller in the end-to-end test.
"""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dashboards.alerts import alerts, recordings, rules
from dashboards.build import dashboards
from dashboards.queries import PanelQuery, panel_queries
from tests.dashboards import promql_check
from tests.dashboards.promql_check import (
    PrometheusError,
    PrometheusServer,
    Target,
    check_dashboard,
    prometheus,
)

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Exporter:
    address: str
    token: str

    def target(self, token: str | None = None) -> Target:
        return Target("stand-in", self.address, bearer_token=token or self.token)


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    token = secrets.token_hex(16)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.dashboards.stand_in_exporter"],
        cwd=REPOSITORY,
        env=os.environ | {"EXPERTMESH_MESH_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, "the exporter ended before it listened"
            yield Exporter(f"127.0.0.1:{port}", token)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(exporter: Exporter) -> Iterator[PrometheusServer]:
    with prometheus([exporter.target()], rules=rules()) as running:
        running.wait_for_scrapes(3, timeout_s=30)
        yield running


@pytest.mark.parametrize("name", dashboards())
def test_every_query_is_answered(name: str, server: PrometheusServer) -> None:
    problems = server.wait_for_answers(panel_queries(dashboards()[name]), timeout_s=20)
    assert problems == (), "\n".join(map(str, problems))


def test_every_rule_is_evaluated_and_every_expression_of_an_alert_can_be(
    server: PrometheusServer,
) -> None:
    recorded = [PanelQuery(each.record, each.record) for each in recordings()]
    problems = server.wait_for_answers(recorded, timeout_s=20)
    assert problems == (), "\n".join(map(str, problems))
    assert server.rule_problems() == ()
    for alert in alerts():
        server.samples(alert.expr)  # raises when Prometheus refuses it
        # What it compares exists, whichever way the comparison goes.
        for side in re.split(r" (?:and|or|unless) on \(.*?\) | or | unless ", alert.expr):
            left = re.split(r" (?:>=|>|==|<) ", side)[0]
            if "em_" in left and left.count("(") == left.count(")"):
                assert server.samples(left), f"{alert.name}: {left}"


def test_a_rule_that_cannot_be_evaluated_is_reported(exporter: Exporter) -> None:
    broken = {
        "groups": [
            {
                "name": "g",
                "rules": [
                    {"record": "a:b:c", "expr": "em_controller_leads / on () em_controller_groups"},
                ],
            }
        ]
    }
    with prometheus([exporter.target()], rules=broken) as running:
        running.wait_for_scrapes(2, timeout_s=30)
        deadline_s = time.monotonic() + 10
        while not (found := running.rule_problems()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
    assert [each.partition(":c")[0] for each in found] == ["a:b"] and "many-to-many" in found[0]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("sum(em_gateway_request_total)", "empty"),
        ('em_controller_groups{state="redy"}', "empty"),
        ("sum by (le (em_gateway_ttft_seconds_bucket)", "refused (invalid parameter"),
        ("histogram_quantile(0.5, sum(rate(em_gateway_ttft_seconds_bucket[1m])))", "empty"),
        ("sum(em_controller_demand_requests) * 0 / 0", "no number (NaN)"),
    ],
    ids=[
        "a wrong metric name",
        "a wrong label value",
        "a syntax error",
        "a quantile without its buckets",
        "a result that is no number",
    ],
)
def test_a_broken_query_is_reported_with_its_panel(
    expression: str, problem: str, server: PrometheusServer
) -> None:
    good = PanelQuery("a good panel", "sum(em_controller_groups)")
    broken = PanelQuery("a broken panel", expression)
    (found,) = server.problems([good, broken])
    assert (found.panel, found.expression) == ("a broken panel", expression)
    assert found.problem.startswith(problem)
    assert str(found).startswith("a broken panel: ")


def test_a_dashboard_with_a_wrong_metric_name_is_reported(exporter: Exporter) -> None:
    board = dashboards()["overview"]
    (panel,) = (each for each in board.panels if each.title == "Queue")
    panel.targets[0].expr = panel.targets[0].expr.replace("queued_requests", "waiting_requests")
    (found,) = check_dashboard(board, [exporter.target()], answer_timeout_s=2)
    assert (found.panel, found.problem) == ("Queue", "empty")
    assert "em_gateway_waiting_requests" in found.expression


def test_traffic_is_made_until_every_query_is_answered(server: PrometheusServer) -> None:
    rounds = []
    once = PanelQuery("an empty panel", "em_no_such_metric")
    problems = server.wait_for_answers([once], timeout_s=1, traffic=lambda: rounds.append(1))
    assert [each.problem for each in problems] == ["empty"]
    assert len(rounds) > 1


def test_a_target_that_refuses_the_token_is_named(exporter: Exporter) -> None:
    with (
        prometheus([exporter.target(token="wrong")]) as running,
        pytest.raises(PrometheusError, match=r"stand-in \(127.0.0.1:\d+\): .*401"),
    ):
        running.wait_for_scrapes(1, timeout_s=10)


def test_prometheus_and_its_data_are_gone_afterwards(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promql_check.tempfile, "tempdir", str(tmp_path))
    with prometheus([exporter.target()]) as running:
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "data").is_dir()
        assert running.samples("vector(1)")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        running.samples("vector(1)")


def test_a_prometheus_that_cannot_start_says_why(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        promql_check, "scrape_config", lambda targets, interval: {"scrape_configs": "none"}
    )
    with (
        pytest.raises(PrometheusError, match=r"(?s)ended with status 2.*scrape_configs|unmarshal"),
        prometheus([exporter.target()]),
    ):
        pass
