"""What the controller needs of Kubernetes, put together; only imported where it is asked for."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.clients.kubernetes.api import KubernetesApi, open_kubernetes
from expertmesh.clients.kubernetes.events import About, EventRecorder
from expertmesh.clients.kubernetes.lease import KubernetesLease
from expertmesh.clients.kubernetes.nodes import KubernetesNode, node_of
from expertmesh.clients.kubernetes.pods import PlacedPod, placed_pod
from expertmesh.clients.kubernetes.ray_cluster import read_ray_cluster
from expertmesh.clients.kubernetes.watch import Watched
from expertmesh.controller.notices import KubernetesNotices
from expertmesh.errors import SetupError

_NODES = "/api/v1/nodes"


@dataclass(slots=True)
class KubernetesParts:
    """Watches run from their first use until the parts are closed."""

    api: KubernetesApi
    ray_cluster: str | None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def lease(self, name: str) -> KubernetesLease:
        return KubernetesLease(self.api, self.api.namespace, name)

    def notices(self) -> KubernetesNotices:
        nodes: Watched[KubernetesNode] = Watched(self.api, _NODES, node_of)
        selector = f"ray.io/cluster={self.ray_cluster}" if self.ray_cluster else "ray.io/cluster"
        path = f"/api/v1/namespaces/{self.api.namespace}/pods"
        pods: Watched[PlacedPod] = Watched(self.api, path, placed_pod, selector)
        self._tasks += [asyncio.create_task(nodes.run()), asyncio.create_task(pods.run())]
        return KubernetesNotices(nodes, pods)

    def events(self) -> EventRecorder:
        recorder = EventRecorder(self.api, self._about, socket.gethostname())
        self._tasks.append(asyncio.create_task(recorder.run()))
        return recorder

    async def _about(self) -> About | None:
        """The RayCluster if one is named, else this pod."""
        namespace = self.api.namespace
        if self.ray_cluster is not None:
            cluster = await read_ray_cluster(self.api, namespace, self.ray_cluster)
            if cluster is None:
                return None
            return About("ray.io/v1", "RayCluster", namespace, cluster.name, cluster.uid)
        name = socket.gethostname()
        answer = await self.api.call("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")
        if not answer.is_done:
            return None
        return About("v1", "Pod", namespace, name, str(answer.body["metadata"]["uid"]))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.api.close()


@asynccontextmanager
async def kubernetes_parts(
    wanted_for: str, kubeconfig: Path | None, ray_cluster: str | None
) -> AsyncIterator[KubernetesParts]:
    """`wanted_for`: the option that needs it; SetupError names it outside of a cluster."""
    api = await open_kubernetes(kubeconfig)
    if api is None:
        raise SetupError(
            f"{wanted_for}: this is no pod of Kubernetes with a service account; run it in one, "
            "or name a file with --kubeconfig"
        )
    parts = KubernetesParts(api, ray_cluster)
    try:
        yield parts
    finally:
        await parts.close()
