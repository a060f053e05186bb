"""What an upgrade, a drain of a node or an eviction takes away, and how long it waits before."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.chart.connections import selects
from tests.chart.rendering import CHART, PROFILES, Rendered, effective_values, render

from expertmesh.gateway.limits import GatewayLimits

pytestmark = pytest.mark.integration

WORKERS = "ray.workerDefaults.podDisruptionBudget"


def profile(name: str) -> Path:
    return CHART / "profiles" / f"{name}.yaml"


def ray_budgets(rendered: Rendered) -> dict[str, dict[str, Any]]:
    """By what follows the release's name."""
    found = {
        each["metadata"]["name"].removeprefix("em-expertmesh-"): each["spec"]
        for each in rendered.all("PodDisruptionBudget")
    }
    return {name: spec for name, spec in found.items() if name not in ("gateway", "controller")}


def selected(rendered: Rendered, budget: dict[str, Any]) -> set[str]:
    return {
        where
        for where, template in rendered.pod_templates().items()
        if selects(budget["selector"], template["metadata"]["labels"])
    }


def may_evict(budget: dict[str, Any], running: int) -> int:
    """Pods of `running` ready ones that may be evicted now, where Kubernetes cannot ask their owner
    for a scale (kubernetes.io "Specifying a Disruption Budget", arbitrary workloads)."""
    assert "maxUnavailable" not in budget, (
        "Kubernetes would block every eviction, and say it failed"
    )
    assert type(budget["minAvailable"]) is int
    return max(0, running - budget["minAvailable"])


def test_by_default_ray_s_pods_have_none() -> None:
    assert ray_budgets(render()) == {}


def test_each_pool_s_workers_have_a_budget_of_their_own() -> None:
    rendered = render(values={f"{WORKERS}.enabled": True})
    budgets = ray_budgets(rendered)
    assert budgets.keys() == {"pool-cpu-small", "pool-cpu-large"}
    for name, budget in budgets.items():
        assert selected(rendered, budget) == {f"Ray workers {name.removeprefix('pool-')}"}
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_no_worker_of_a_full_pool_is_evicted() -> None:
    """A group holds several of them, and ends with any."""
    rendered = render(values={f"{WORKERS}.enabled": True})
    pools = {pool["name"]: pool for pool in effective_values()["platform"]["pools"]}
    for name, budget in ray_budgets(rendered).items():
        most = pools[name.removeprefix("pool-")]["nodes"]["max"]
        assert all(may_evict(budget, running) == 0 for running in range(most + 1))


def test_a_pool_without_bounds_has_one_node_and_keeps_it() -> None:
    values = {
        f"{WORKERS}.enabled": True,
        "platform.pools": [{"name": "cpu-small", "market": "local", "usd_per_node_hour": 1}],
        "models": [
            {
                **effective_values()["models"][0],
                "parallelism": {"expert": 1},
                "pools": ["cpu-small"],
            }
        ],
    }
    (budget,) = ray_budgets(render(values=values)).values()
    assert budget["minAvailable"] == 1


def test_a_pool_may_differ_from_the_others() -> None:
    own: dict[str, Any] = {"cpu-large": {"podDisruptionBudget": {"enabled": False}}}
    on = render(values={f"{WORKERS}.enabled": True, "ray.workers": own})
    assert ray_budgets(on).keys() == {"pool-cpu-small"}
    own = {"cpu-large": {"podDisruptionBudget": {"enabled": True, "minAvailable": 1}}}
    budgets = ray_budgets(render(values={"ray.workers": own}))
    assert budgets.keys() == {"pool-cpu-large"}
    assert may_evict(budgets["pool-cpu-large"], 3) == 2


def test_spot_pools_have_none() -> None:
    rendered = render(profile=profile("h200-gke"), values={f"{WORKERS}.enabled": True})
    assert ray_budgets(rendered).keys() >= {"pool-h200-od"}
    assert "pool-h200-spot" not in ray_budgets(rendered)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_keep_groups_of_several_nodes_together(path: Path) -> None:
    values = effective_values(path)
    pools = {pool["name"]: pool for pool in values["platform"]["pools"]}
    wide = {
        f"pool-{name}"
        for model in values["models"]
        for name in model["pools"]
        if pools[name].get("accelerators_per_node", 0) < model["parallelism"]["expert"]
        and pools[name]["market"] == "on-demand"
    }
    budgets = ray_budgets(render(profile=path))
    assert budgets.keys() >= wide
    if wide:
        assert "ray-head" in budgets


def test_the_head_stays_where_it_is_with_its_budget() -> None:
    rendered = render(values={"ray.head.podDisruptionBudget.enabled": True})
    (budget,) = ray_budgets(rendered).values()
    assert selected(rendered, budget) == {"Ray head"}
    assert may_evict(budget, 1) == 0


def test_an_upgrade_never_stops_all_gateways_or_controllers() -> None:
    controller = render().one("Deployment", "-controller")["spec"]
    assert controller["replicas"] > controller["strategy"]["rollingUpdate"]["maxUnavailable"]
    # A Deployment's own default, a quarter of the pods rounded down, is none of one gateway.
    assert "strategy" not in render().one("Deployment", "-gateway")["spec"]


def stopping(rendered: Rendered) -> tuple[int, dict[str, str], int]:
    """Seconds before SIGTERM, options of the gateway, seconds until SIGKILL."""
    spec = rendered.one("Deployment", "-gateway")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    arguments = container["args"]
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    return int(seconds), options, spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("delay_s", "timeout_s"), [(5, 120), (0, 1), (30, 1800)], ids=["default", "short", "long"]
)
def test_a_gateway_is_killed_only_after_its_streams_and_its_ledger(
    delay_s: int, timeout_s: int
) -> None:
    drain = {"delaySeconds": delay_s, "timeoutSeconds": timeout_s}
    before_s, options, grace_s = stopping(render(values={"gateway.drain": drain}))
    assert before_s == delay_s
    assert options["--drain-timeout-s"] == str(timeout_s)
    assert grace_s >= delay_s + timeout_s + GatewayLimits().flush_timeout_s + 10


def test_the_gateway_s_own_default_is_the_chart_s() -> None:
    assert effective_values()["gateway"]["drain"]["timeoutSeconds"] == (
        GatewayLimits().drain_timeout_s
    )


def test_a_longer_grace_period_is_taken_as_it_is() -> None:
    *_, grace_s = stopping(render(values={"gateway.terminationGracePeriodSeconds": 3600}))
    assert grace_s == 3600
    *_, grace_s = stopping(render(values={"gateway.terminationGracePeriodSeconds": 140}))
    assert grace_s == 140


def test_a_digest_is_the_image_of_every_pod_and_wins_over_the_tag() -> None:
    gateway, ray = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
    values = {
        "store.existingSecret": "expertmesh-store",
        "images.gateway": {"repository": "r.example.com/g", "tag": "1.2.3", "digest": gateway},
        "images.ray": {"repository": "r.example.com/ray", "digest": ray},
    }
    images = {
        where: {container["image"] for container in template["spec"]["containers"]}
        for where, template in render(values=values).pod_templates().items()
    }
    assert len(images) == 7
    for where, found in images.items():
        expected = (
            f"r.example.com/ray@{ray}"
            if where.startswith("Ray")
            else (f"r.example.com/g@{gateway}")
        )
        assert found == {expected}, where


def test_a_pool_may_have_an_image_of_its_own() -> None:
    own = {"repository": "r.example.com/arm", "digest": f"sha256:{'c' * 64}"}
    rendered = render(values={"ray.workers": {"cpu-large": {"image": own}}})
    text = {
        group["groupName"]: json.dumps(group)
        for group in rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    }
    assert f"r.example.com/arm@sha256:{'c' * 64}" in text["cpu-large"]
    assert "r.example.com/arm" not in text["cpu-small"]
