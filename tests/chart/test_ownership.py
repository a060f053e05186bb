"""Every field has one writer: Helm, Ray's autoscaler, the HPA or the controller.

Helm 3, and Helm 4 with --server-side=false, patch a custom resource by the difference between the
old and the new render, and an object of Kubernetes by that and the live one.
"""

import copy
from typing import Any

import pytest
from tests.chart.rendering import EVERYTHING, PROFILES, render

pytestmark = pytest.mark.integration

Json = dict[str, Any]


def merge_patch(old: Any, new: Any) -> Any:
    """RFC 7386: what turns `old` into `new`; lists are whole values."""
    assert isinstance(old, dict) and isinstance(new, dict)
    patch: Json = {key: None for key in old.keys() - new.keys()}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            inner = merge_patch(old[key], value)
            if inner:
                patch[key] = inner
        elif old.get(key) != value:
            patch[key] = value
    return patch


def three_way(old: Json, live: Json, new: Json) -> Json:
    """What Helm sends for an object of Kubernetes, with lists as whole values: more than it
    would, so that nothing is missed."""
    added = {k: v for k, v in _without_lists(merge_patch(live, new)).items() if v is not None}
    return {**_only_set(added), **{k: v for k, v in merge_patch(old, new).items() if v is None}}


def _without_lists(patch: Json) -> Json:
    return {
        key: _without_lists(value) if isinstance(value, dict) else value
        for key, value in patch.items()
        if not isinstance(value, list)
    }


def _only_set(patch: Json) -> Json:
    kept = {k: _only_set(v) if isinstance(v, dict) else v for k, v in patch.items()}
    return {k: v for k, v in kept.items() if v is not None and v != {}}


def after_a_day_of_scaling(cluster: Json) -> Json:
    """As Ray's autoscaler leaves it (autoscaler/_private/kuberay/node_provider.py)."""
    live = copy.deepcopy(cluster)
    for number, group in enumerate(live["spec"]["workerGroupSpecs"]):
        group["replicas"] = group["minReplicas"] + number % (group["maxReplicas"] + 1)
        group["scaleStrategy"] = {"workersToDelete": [f"pod-{number}"]}
    return live


@pytest.mark.parametrize("profile", [None, *PROFILES], ids=lambda p: p.stem if p else "defaults")
def test_an_upgrade_with_the_same_values_changes_nothing_of_the_ray_cluster(profile: Any) -> None:
    old, new = (render(profile=profile).one("RayCluster") for _ in range(2))
    live = after_a_day_of_scaling(old)
    assert merge_patch(old, new) == {}
    assert live["spec"]["workerGroupSpecs"] != old["spec"]["workerGroupSpecs"]


def test_an_upgrade_with_the_same_values_leaves_the_gateways_that_the_scaler_made() -> None:
    old, new = (render(values=EVERYTHING).one("StatefulSet", "-gateway") for _ in range(2))
    live = copy.deepcopy(old)
    live["spec"]["replicas"] = 7
    live["status"] = {"replicas": 7}
    assert three_way(old, live, new) == {}


def test_the_check_sees_a_field_that_helm_would_take_back() -> None:
    old = render(values={**EVERYTHING, "gateway.autoscaling.enabled": False}).one(
        "StatefulSet", "-gateway"
    )
    live = copy.deepcopy(old)
    live["spec"]["replicas"] = 7
    assert three_way(old, live, old) == {"spec": {"replicas": 3}}


def test_a_render_depends_on_its_values_alone() -> None:
    """Neither a date nor a random value: GitOps would see a change in each of them."""
    first, second = render(values=EVERYTHING), render(values=EVERYTHING)
    assert first.objects == second.objects


def test_fields_of_others_are_rendered_nowhere() -> None:
    rendered = render(values=EVERYTHING)
    for group in rendered.one("RayCluster")["spec"]["workerGroupSpecs"]:
        assert not {"replicas", "scaleStrategy", "suspend"} & group.keys()
    assert "replicas" not in rendered.one("StatefulSet", "-gateway")["spec"]
    # The controller makes these two: the applications, and the lease.
    assert not {"Lease", "RayService", "RayJob"} & {each["kind"] for each in rendered.objects}
    assert "serveConfigV2" not in rendered.one("RayCluster")["spec"]
    # And KubeRay keeps what it owns to itself.
    assert all("status" not in each for each in rendered.objects)


def test_only_one_object_has_a_name() -> None:
    seen = [(each["kind"], each["metadata"]["name"]) for each in render(values=EVERYTHING).objects]
    assert len(seen) == len(set(seen))


def server_side_conflicts(rendered: Json, live: Json, where: str = "") -> list[str]:
    """Fields that a server-side apply would take from whoever wrote them since: those it sets
    otherwise than they are. A list without keys in its schema is one field, as in a RayCluster."""
    found = []
    for key, value in rendered.items():
        path, now = f"{where}.{key}".lstrip("."), live.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            found += server_side_conflicts(value, now, path)
        elif value != now:
            found.append(path)
    return found


def test_by_server_side_apply_the_worker_groups_alone_would_conflict() -> None:
    """Which is why NOTES ask for --server-side=false, and nothing else needs it."""
    rendered = render(values=EVERYTHING)
    cluster, gateway = rendered.one("RayCluster"), rendered.one("StatefulSet", "-gateway")
    assert server_side_conflicts(cluster, after_a_day_of_scaling(cluster)) == [
        "spec.workerGroupSpecs"
    ]
    live = copy.deepcopy(gateway)
    live["spec"]["replicas"] = 7
    assert server_side_conflicts(gateway, live) == []


def test_a_changed_bound_replaces_the_worker_groups_as_a_whole() -> None:
    """So Ray's autoscaler has to write its numbers again, as operations.md says."""
    pools = [
        {"name": name, "market": "local", "usd_per_node_hour": 1, "nodes": {"min": 2, "max": most}}
        for name, most in (("cpu-small", 2), ("cpu-large", 3))
    ]
    old, new = (
        render().one("RayCluster"),
        render(values={"platform.pools": pools}).one("RayCluster"),
    )
    patch = merge_patch(old, new)
    assert patch.keys() == {"spec"}
    assert patch["spec"].keys() == {"workerGroupSpecs"}
