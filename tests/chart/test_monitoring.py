"""What Prometheus and Grafana are given; their files come from `python -m dashboards.build`."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.rendering import CHART, EVERYTHING, Rendered, render

from expertmesh.telemetry.traces import Tracing

pytestmark = pytest.mark.integration

ALERTS = """
# written by a test
groups:
  - name: gateway
    rules:
      - alert: QueueIsLong
        expr: sum by (model) (em_gateway_queued_requests) > 100
        for: 5m
        labels: {severity: warning}
        annotations: {summary: "{{ $labels.model }} waits: {{ $value }}"}
"""


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """A chart with files of its own, so that nothing depends on the generated ones."""
    copied = shutil.copytree(CHART, tmp_path / "expertmesh")
    shutil.rmtree(copied / "files", ignore_errors=True)
    (copied / "files" / "dashboards").mkdir(parents=True)
    (copied / "files" / "alerts.yaml").write_text(ALERTS)
    for name in ("overview", "cost_by_pool"):
        dashboard = {"title": name, "uid": name, "legend": "{{model}}", "regex": "$pool"}
        (copied / "files" / "dashboards" / f"{name}.json").write_text(json.dumps(dashboard))
    return copied


def test_dashboards_are_shipped_as_they_are(chart: Path) -> None:
    rendered = render(chart=chart, values={"monitoring.dashboards.enabled": True})
    found = {
        each["metadata"]["name"]: each
        for each in rendered.all("ConfigMap")
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
    }
    assert set(found) == {
        "em-expertmesh-dashboard-overview",
        "em-expertmesh-dashboard-cost-by-pool",
    }
    for path in (chart / "files" / "dashboards").iterdir():
        shown = found[f"em-expertmesh-dashboard-{path.stem.replace('_', '-')}"]["data"]
        assert json.loads(shown[f"em-{path.name}"]) == json.loads(path.read_text())


def test_alerts_are_shipped_as_they_are(chart: Path) -> None:
    rendered = render(
        chart=chart, values={"monitoring.prometheusRule": {"enabled": True, "labels": {"a": "b"}}}
    )
    rule = rendered.one("PrometheusRule")
    assert rule["spec"] == yaml.safe_load(ALERTS)
    assert rule["metadata"]["labels"]["a"] == "b"


@pytest.mark.parametrize("own", [True, False], ids=["the test's alerts", "the chart's alerts"])
def test_prometheus_takes_the_rules(chart: Path, own: bool, tmp_path: Path) -> None:
    values = {"monitoring.prometheusRule.enabled": True}
    rendered = render(chart=chart if own else CHART, values=values)
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rendered.one("PrometheusRule")["spec"]))
    program = shutil.which("promtool")
    assert program, "promtool is missing: run scripts/install-tools.sh"
    done = subprocess.run(
        [program, "check", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_link_to_the_page_that_the_values_name() -> None:
    page = "https://wiki.example/expertmesh"
    values = {"monitoring.prometheusRule": {"enabled": True, "runbooks": page}}
    groups = render(values=values).one("PrometheusRule")["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        link = alert["annotations"]["runbook_url"]
        assert link == f"{page}#{alert['alert'].lower()}"
    assert alerts


def test_every_file_of_the_chart_s_own_is_shipped() -> None:
    rendered = render(values={"monitoring.dashboards.enabled": True})
    shipped = [
        name
        for each in rendered.all("ConfigMap")
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name in each["data"]
    ]
    files = (CHART / "files" / "dashboards").glob("*.json")
    assert sorted(shipped) == sorted(f"em-{path.name}" for path in files)


def test_nothing_is_shipped_unless_it_is_asked_for(chart: Path) -> None:
    rendered = render(chart=chart)
    assert not rendered.all("PrometheusRule")
    assert len(rendered.all("ConfigMap")) == 1


@pytest.fixture(scope="module")
def everything() -> Rendered:
    return render(values=EVERYTHING)


def test_gateways_and_controllers_are_asked_with_the_mesh_token(everything: Rendered) -> None:
    monitors = everything.all("ServiceMonitor")
    assert len(monitors) == 2
    for monitor in monitors:
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        (service,) = (
            each
            for each in everything.all("Service")
            if monitor["spec"]["selector"]["matchLabels"].items()
            <= each["metadata"]["labels"].items()
        )
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert endpoint["authorization"] == {
            "type": "Bearer",
            "credentials": {"name": "expertmesh-tokens", "key": "mesh_token"},
        }


def test_ray_s_pods_are_asked_on_ports_that_they_have(everything: Rendered) -> None:
    spec = everything.one("PodMonitor")["spec"]
    templates = {
        where: template
        for where, template in everything.pod_templates().items()
        if where.startswith("Ray")
    }
    (expression,) = spec["selector"]["matchExpressions"]
    for where, template in everything.pod_templates().items():
        labels = template["metadata"]["labels"]
        assert (labels[expression["key"]] in expression["values"]) == (where in templates)
    ports = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
    names = {
        where: {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        for where, template in templates.items()
    }
    assert set(ports) <= names["Ray head"]
    assert all("metrics" in each for each in names.values())
    for endpoint in spec["podMetricsEndpoints"]:
        assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"pool", "market"}


def variables_of(service: str, values: dict[str, Any]) -> dict[str, str]:
    pod = render(values=values).one("Deployment", f"-{service}")["spec"]["template"]["spec"]
    return {each["name"]: each.get("value", "") for each in pod["containers"][0]["env"]}


def traced(variables: dict[str, str], requests: int) -> int:
    """Of requests whose clients have not decided, as the gateway itself reads its variables."""
    tracing = Tracing.from_environment(variables)
    try:
        assert tracing.on
        return sum(tracing.begin(None) is not None for _ in range(requests))
    finally:
        tracing.close(0.0)


def test_traces_are_off_until_a_collector_is_named() -> None:
    for service in ("gateway", "controller"):
        assert not any(name.startswith("OTEL_") for name in variables_of(service, {}))


def test_one_request_in_a_hundred_is_traced_unless_the_values_say_otherwise() -> None:
    endpoint = {"monitoring.traces.endpoint": "http://127.0.0.1:1"}
    variables = variables_of("gateway", endpoint)
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:1"
    assert variables["OTEL_TRACES_SAMPLER"] == "parentbased_traceidratio"
    assert variables["OTEL_TRACES_SAMPLER_ARG"] == "0.01"
    assert 0 < traced(variables, 10_000) < 200
    all_of_them = variables_of("gateway", {**endpoint, "monitoring.traces.ratio": 1})
    assert traced(all_of_them, 100) == 100


def test_the_controller_sends_its_decisions_to_the_same_collector() -> None:
    endpoint = {"monitoring.traces.endpoint": "http://127.0.0.1:1"}
    variables = variables_of("controller", endpoint)
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:1"


def test_an_endpoint_for_traces_alone_has_the_same_share() -> None:
    alone = {"gateway.env": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}}
    variables = variables_of("gateway", alone)
    assert variables["OTEL_TRACES_SAMPLER_ARG"] == "0.01"
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in variables
