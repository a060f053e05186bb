"""What the controller may do in Kubernetes: as much as its code does, which is run to see it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.chart.rendering import Rendered, render
from tests.clients.kubernetes_server import (
    NAMESPACE,
    RAY_CLUSTERS,
    KubernetesServer,
    kubernetes_server,
)

from expertmesh.clients.kubernetes.events import Saying
from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.launch.kubernetes import kubernetes_parts

pytestmark = pytest.mark.integration

CLUSTER = "em-expertmesh-ray"
LEASE = "kubernetes-controller"
Right = tuple[str, str, str]
"""API group, resource, verb."""
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "WATCH": "watch"}


def rights_of(rendered: Rendered, *kinds: str) -> set[Right]:
    return {
        (group, resource, verb)
        for kind in kinds
        for role in rendered.all(kind)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right_of(method: str, path: str) -> Right:
    parts = path.strip("/").split("/")
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    if rest[0] == "namespaces":
        assert rest[1] == NAMESPACE
        rest = rest[2:]
    return group, rest[0], _VERBS.get(method) or ("get" if len(rest) > 1 else "list")


async def used_rights(server: KubernetesServer) -> set[Right]:
    """Of a controller that leads, tells of a decision twice and looks for spot notices."""
    server.put(RAY_CLUSTERS, CLUSTER, apiVersion="ray.io/v1", kind="RayCluster", spec={})
    async with kubernetes_parts("a test", server.kubeconfig, CLUSTER) as parts:
        lease = parts.lease(LEASE)
        first = await lease.write(
            LeaseRecord("a", "http://a", 15.0, 0, (await lease.read()).version)
        )
        assert first is not None
        assert await lease.write(first) is not None
        recorder = parts.events()
        for _ in range(2):
            recorder.say(Saying("Scaled", "because"))
        parts.notices()
        async with asyncio.timeout(10):
            while server.watches < 2 or "PATCH" not in {method for method, _ in server.requests}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    return {right_of(method, path) for method, path in server.requests}


async def test_the_controller_has_the_rights_that_it_uses_and_no_others(tmp_path: Path) -> None:
    async with kubernetes_server(tmp_path) as server:
        used = await used_rights(server)
    rendered = render()
    assert rights_of(rendered, "Role", "ClusterRole") == used
    assert {resource for _, resource, _ in rights_of(rendered, "ClusterRole")} == {"nodes"}


def test_nobody_may_write_the_ray_cluster_or_read_secrets() -> None:
    rights = rights_of(render(), "Role", "ClusterRole")
    assert {verb for _, resource, verb in rights if resource == "rayclusters"} == {"get"}
    assert {resource for _, resource, _ in rights} == {
        "leases", "events", "rayclusters", "pods", "nodes",
    }  # fmt: skip


def test_named_objects_are_those_of_this_release() -> None:
    rules = render().one("Role")["rules"]
    names = {
        rule["resources"][0]: rule["resourceNames"] for rule in rules if "resourceNames" in rule
    }
    assert names == {"leases": [LEASE], "rayclusters": [CLUSTER]}


def test_roles_are_bound_to_the_controller_s_own_account() -> None:
    rendered = render()
    account = rendered.one("Deployment", "-controller")["spec"]["template"]["spec"][
        "serviceAccountName"
    ]
    for kind in ("Role", "ClusterRole"):
        role, binding = rendered.one(kind), rendered.one(f"{kind}Binding")
        assert binding["roleRef"] == {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind,
            "name": role["metadata"]["name"],
        }
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["name"]) == ("ServiceAccount", account)
        assert subject["namespace"] == "models"


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"controller.lease": "database"}, {"leases"}),
        ({"controller.spotNotices": []}, {"pods", "nodes"}),
        ({"controller.rbac.clusterRole": False}, {"nodes"}),
        ({"controller.rbac.create": False}, {"leases", "events", "rayclusters", "pods"}),
    ],
    ids=["a lease in the store", "no notices", "no right to create a ClusterRole", "own roles"],
)
def test_what_is_not_used_is_not_granted(values: dict[str, Any], missing: set[str]) -> None:
    kinds = ("Role", "ClusterRole")
    before = {resource for _, resource, _ in rights_of(render(), *kinds)}
    after = {resource for _, resource, _ in rights_of(render(values=values), *kinds)}
    assert before - after == missing


def test_notices_come_from_where_the_values_say() -> None:
    values = {"controller.spotNotices": ["https://notices.example.com/spot", "kubernetes"]}
    container = render(values=values).one("Deployment", "-controller")["spec"]["template"]["spec"][
        "containers"
    ][0]
    arguments = container["args"]
    given = [arguments[n + 1] for n, each in enumerate(arguments) if each == "--spot-notices"]
    assert given == values["controller.spotNotices"]
