"""To whom pods may connect when networkPolicy.egress is on."""

from typing import Any

import pytest
from tests.chart.connections import may_connect, may_leave
from tests.chart.rendering import PROFILES, Rendered, effective_values, render

pytestmark = pytest.mark.integration

ON: dict[str, Any] = {"networkPolicy.egress.enabled": True}
PRIVATE, PUBLIC, METADATA = "10.1.2.3", "203.0.113.7", "169.254.169.254"
EVERYTHING_OUTSIDE: dict[str, Any] = {
    **ON,
    "store.existingSecret": "expertmesh-store",
    "ray.redis.address": "redis:6379",
    "monitoring.traces.endpoint": "http://collector:4318",
    "platform.gateway.limits": {"store": "redis", "redis_url_variable": "REDIS_URL"},
    "platform.pools": [
        *effective_values()["platform"]["pools"],
        {
            "name": "api",
            "market": "external",
            "base_url": "https://api.example.com",
            "key_variable": "API_KEY",
        },
    ],
    "gateway.secretEnv": {
        "REDIS_URL": {"name": "redis", "key": "url"},
        "API_KEY": {"name": "providers", "key": "api"},
    },
    "models": [
        {
            **effective_values()["models"][0],
            "model": {"source": "Qwen/Qwen3-30B-A3B", "max_model_len": 1024},
        }
    ],
}
PODS = ("gateway", "controller", "ray-head", "ray-worker", "test")


@pytest.fixture(scope="module")
def closed() -> Rendered:
    """With the default model, which is a folder, and a store in a file."""
    return render(values=ON)


@pytest.fixture(scope="module")
def outside() -> Rendered:
    return render(values=EVERYTHING_OUTSIDE)


def test_it_is_off_by_default() -> None:
    for policy in render().all("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize("source", PODS)
def test_everybody_asks_the_cluster_s_dns_and_no_other(closed: Rendered, source: str) -> None:
    for protocol in ("UDP", "TCP"):
        assert may_leave(closed, source, "namespace/kube-system", 53, protocol)
        assert not may_leave(closed, source, PUBLIC, 53, protocol)
    assert not may_leave(closed, source, "namespace/kube-system", 8080)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("gateway", "ray-worker", 30000),
        ("gateway", "ray-head", 31000),
        ("gateway", "controller", 8090),
        ("controller", "ray-head", 8265),
        ("controller", "ray-worker", 30500),
        ("ray-worker", "ray-head", 6379),
        ("ray-worker", "ray-worker", 45678),
        ("test", "gateway", 8080),
    ],
)
def test_what_may_come_in_may_go_out(closed: Rendered, source: str, target: str, port: int) -> None:
    assert may_connect(closed, source, target, port)
    assert may_leave(closed, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("gateway", "ray-head", 8265),
        ("gateway", "ray-worker", 22),
        ("controller", "gateway", 8080),
        ("ray-worker", "controller", 8090),
        ("ray-worker", "gateway", 8080),
        ("test", "controller", 8090),
    ],
)
def test_nobody_goes_where_the_code_does_not(
    closed: Rendered, source: str, target: str, port: int
) -> None:
    assert not may_leave(closed, source, target, port)


@pytest.mark.parametrize("source", PODS)
def test_without_a_need_nobody_leaves_the_cluster(closed: Rendered, source: str) -> None:
    for port in (80, 4318, 5432, 6379):
        assert not may_leave(closed, source, PRIVATE, port)
        assert not may_leave(closed, source, PUBLIC, port)
    asks_kubernetes = source in ("controller", "ray-head")
    assert may_leave(closed, source, PRIVATE, 6443) == asks_kubernetes
    assert may_leave(closed, source, PRIVATE, 443) == asks_kubernetes


@pytest.mark.parametrize(
    ("target", "port", "sources"),
    [
        (PRIVATE, 5432, {"gateway", "controller"}),
        (PRIVATE, 6379, {"gateway", "ray-head"}),
        (PRIVATE, 4318, {"gateway", "controller"}),
        (PUBLIC, 443, {"gateway", "controller", "ray-head", "ray-worker"}),
        (METADATA, 80, set()),
        (PUBLIC, 80, set()),
    ],
    ids=["the store", "Redis", "traces", "the internet", "the cloud's metadata", "plain HTTP"],
)
def test_a_need_opens_what_it_needs_for_those_who_have_it(
    outside: Rendered, target: str, port: int, sources: set[str]
) -> None:
    assert {source for source in PODS if may_leave(outside, source, target, port)} == sources


def test_the_internet_is_not_the_network_around(outside: Rendered) -> None:
    """What a worker may reach on 443, a stolen token must not reach inside."""
    for address in (PRIVATE, "172.20.0.1", "192.168.1.1", METADATA, "fd00::1"):
        assert not may_leave(outside, "ray-worker", address, 443)
    assert may_leave(outside, "ray-worker", "2001:db8::1", 443)


def test_an_object_storage_inside_is_a_rule_of_one_s_own() -> None:
    rule = {
        "to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}],
        "ports": [{"protocol": "TCP", "port": 9000}],
    }
    rendered = render(values={**ON, "networkPolicy.egress.more.ray": [rule]})
    assert may_leave(rendered, "ray-worker", "10.9.1.1", 9000)
    assert not may_leave(rendered, "gateway", "10.9.1.1", 9000)
    assert not may_leave(rendered, "ray-worker", "10.8.1.1", 9000)


def test_addresses_can_be_named_instead_of_ports_alone() -> None:
    only = {"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [5433]}
    values = {**EVERYTHING_OUTSIDE, "networkPolicy.egress.store": only}
    rendered = render(values=values)
    assert may_leave(rendered, "gateway", PRIVATE, 5433)
    assert not may_leave(rendered, "gateway", "10.1.2.4", 5433)
    assert not may_leave(rendered, "gateway", PRIVATE, 5432)


def test_migrations_have_their_policy_before_they_run(outside: Rendered) -> None:
    policy = outside.one("NetworkPolicy", "-migrations-egress")
    job = outside.one("Job")["metadata"]["annotations"]
    own = policy["metadata"]["annotations"]
    assert own["helm.sh/hook"] == job["helm.sh/hook"]
    assert int(own["helm.sh/hook-weight"]) < int(job.get("helm.sh/hook-weight", 0))
    assert may_leave(outside, "migrations", PRIVATE, 5432)
    assert may_leave(outside, "migrations", "namespace/kube-system", 53, "UDP")
    assert not may_leave(outside, "migrations", PUBLIC, 443)


def test_spot_notices_by_url_are_asked_for() -> None:
    values = {**ON, "controller.spotNotices": ["https://notices.example.com"]}
    rendered = render(values=values)
    assert may_leave(rendered, "controller", PUBLIC, 443)
    assert not may_leave(rendered, "ray-worker", PUBLIC, 443)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_reach_their_model_and_their_store(profile: Any) -> None:
    rendered = render(profile=profile, values=ON)
    from_the_hub = profile.stem != "kind-cpu"
    assert may_leave(rendered, "ray-worker", PUBLIC, 443) == from_the_hub
    assert may_leave(rendered, "controller", PRIVATE, 5432) == from_the_hub
