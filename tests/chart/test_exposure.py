"""Who reaches which pod, how the gateways are published, and what keeps them there."""

import pytest
from tests.chart.connections import may_connect, pods, selects
from tests.chart.rendering import EVERYTHING, Rendered, render

pytestmark = pytest.mark.integration


RANK, DASHBOARD, GCS = 30000, 8265, 6379


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("gateway", "ray-worker", RANK, True),
        ("gateway", "ray-worker", 31000, True),
        ("controller", "ray-worker", RANK, True),
        ("test", "ray-worker", RANK, False),
        ("elsewhere", "ray-worker", RANK, False),
        ("ray-worker", "ray-worker", 45678, True),
        ("ray-worker", "ray-head", GCS, True),
        ("gateway", "ray-head", GCS, False),
        ("controller", "ray-head", DASHBOARD, True),
        ("gateway", "ray-head", DASHBOARD, False),
        ("elsewhere", "ray-head", DASHBOARD, False),
        ("elsewhere", "ray-head", 10001, False),
        ("controller", "ray-worker", 52365, False),
        ("elsewhere", "ray-worker", 8080, True),
        ("elsewhere", "ray-head", 44217, True),
        ("gateway", "controller", 8090, True),
        ("ray-worker", "controller", 8090, False),
        ("elsewhere", "gateway", 8080, True),
        ("ray-worker", "gateway", 22, False),
    ],
)
def test_connections(source: str, target: str, port: int, allowed: bool) -> None:
    assert may_connect(render(), source, target, port) is allowed


def test_metrics_are_for_those_whom_the_values_name() -> None:
    rendered = render(values={"networkPolicy.metricsFrom": []})
    assert not may_connect(rendered, "elsewhere", "ray-worker", 8080)
    assert not may_connect(rendered, "elsewhere", "controller", 8090)
    assert may_connect(rendered, "gateway", "controller", 8090)


def test_a_closed_gateway_still_answers_helm_test() -> None:
    closed = render(values={"networkPolicy.gatewayFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]})
    assert not may_connect(closed, "ray-worker", "gateway", 8080)
    assert may_connect(closed, "test", "gateway", 8080)


def test_without_policies_the_cluster_s_own_rules_count() -> None:
    rendered = render(values={"networkPolicy.enabled": False})
    assert not rendered.all("NetworkPolicy")
    assert may_connect(rendered, "elsewhere", "ray-worker", RANK)


def test_every_policy_is_for_pods_of_the_chart(rendered_everything: Rendered) -> None:
    everybody = pods(rendered_everything).values()
    for policy in rendered_everything.all("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        assert any(selects(selector, labels) for labels in everybody), policy["metadata"]["name"]


@pytest.fixture(scope="module")
def rendered_everything() -> Rendered:
    return render(values=EVERYTHING)


def test_budgets_of_services_never_keep_a_node_from_being_drained(
    rendered_everything: Rendered,
) -> None:
    everybody = pods(rendered_everything)
    for name in ("gateway", "controller"):
        spec = rendered_everything.one("PodDisruptionBudget", f"-{name}")["spec"]
        assert spec["maxUnavailable"] >= 1
        assert "minAvailable" not in spec
        assert selects(spec["selector"], everybody[name])


def test_the_gateways_are_scaled_by_their_own_queue(rendered_everything: Rendered) -> None:
    (scaler,) = rendered_everything.all("HorizontalPodAutoscaler")
    spec = scaler["spec"]
    workload = rendered_everything.one("StatefulSet", "-gateway")
    assert spec["scaleTargetRef"] == {
        "apiVersion": workload["apiVersion"],
        "kind": workload["kind"],
        "name": workload["metadata"]["name"],
    }
    assert "replicas" not in workload["spec"]
    pods_metrics = {
        each["pods"]["metric"]["name"]: each["pods"]["target"]["averageValue"]
        for each in spec["metrics"]
        if each["type"] == "Pods"
    }
    assert pods_metrics == {"em_gateway_queued_requests": "20", "em_gateway_open_requests": "400"}
    (cpu,) = (each["resource"] for each in spec["metrics"] if each["type"] == "Resource")
    assert cpu == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}


def test_the_metrics_are_the_gateway_s_own(rendered_everything: Rendered) -> None:
    from expertmesh.telemetry import metrics

    known = {value.name for value in vars(metrics).values() if hasattr(value, "name")}
    (scaler,) = rendered_everything.all("HorizontalPodAutoscaler")
    for each in scaler["spec"]["metrics"]:
        if each["type"] == "Pods":
            assert each["pods"]["metric"]["name"] in known


def test_ingress_and_route_lead_to_the_gateway_s_service(rendered_everything: Rendered) -> None:
    service = rendered_everything.one("Service", "-gateway")
    name, (port,) = service["metadata"]["name"], service["spec"]["ports"]
    (rule,) = rendered_everything.one("Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (rule["host"], path["path"], path["pathType"]) == ("llm.example.com", "/", "Prefix")
    assert path["backend"]["service"] == {"name": name, "port": {"name": port["name"]}}
    route = rendered_everything.one("HTTPRoute")["spec"]
    assert route["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
    assert route["hostnames"] == ["llm.example.com"]
    (rule,) = route["rules"]
    assert rule["backendRefs"] == [{"name": name, "port": port["port"]}]
    assert rule["timeouts"] == {"request": "0s"}
