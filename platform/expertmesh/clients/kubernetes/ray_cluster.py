"""What KubeRay says about the RayCluster; read only: Helm and Ray's autoscaler write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.clients.kubernetes.watch import ListWatchApi
from expertmesh.errors import UpstreamUnavailable


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    name: str
    pool: str | None
    """Its node label expertmesh.io/pool."""
    wanted: int
    """Replicas that the autoscaler asked for."""
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class RayCluster:
    name: str
    uid: str
    suspended: bool
    ready_workers: int
    available_workers: int
    wanted_workers: int
    problems: tuple[str, ...]
    """Conditions that say that something is wrong."""
    groups: tuple[WorkerGroup, ...]


async def read_ray_cluster(api: ListWatchApi, namespace: str, name: str) -> RayCluster | None:
    """None when there is no such cluster. Raises UpstreamUnavailable."""
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters/{name}"
    answer = await api.call("GET", path)
    if answer.status == 404:
        return None
    try:
        return ray_cluster_of(answer.body)
    except (LookupError, TypeError, ValueError) as error:
        raise UpstreamUnavailable(f"RayCluster {name}: cannot be read: {error}") from error


def ray_cluster_of(body: Mapping[str, Any]) -> RayCluster:
    """Raises LookupError, TypeError or ValueError for what is no RayCluster."""
    spec, status = body["spec"], body.get("status") or {}
    return RayCluster(
        name=str(body["metadata"]["name"]),
        uid=str(body["metadata"]["uid"]),
        suspended=bool(spec.get("suspend")),
        ready_workers=int(status.get("readyWorkerReplicas") or 0),
        available_workers=int(status.get("availableWorkerReplicas") or 0),
        wanted_workers=int(status.get("desiredWorkerReplicas") or 0),
        problems=tuple(
            f"{condition['type']}: {condition.get('message') or condition.get('reason')}"
            for condition in status.get("conditions") or []
            if _is_problem(condition)
        ),
        groups=tuple(_group(group) for group in spec.get("workerGroupSpecs") or []),
    )


def _is_problem(condition: Mapping[str, Any]) -> bool:
    kind, is_true = condition["type"], condition.get("status") == "True"
    return is_true if kind == "ReplicaFailure" else kind == "HeadPodReady" and not is_true


def _group(body: Mapping[str, Any]) -> WorkerGroup:
    return WorkerGroup(
        name=str(body["groupName"]),
        pool=(body.get("labels") or {}).get("expertmesh.io/pool"),
        wanted=int(body.get("replicas") or 0),
        least=int(body.get("minReplicas") or 0),
        most=int(body.get("maxReplicas") or 0),
    )
