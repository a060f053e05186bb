"""The processes of the rendered pods, with Ray nodes of this machine in place of Ray's pods.

Real: the controller, the gateway, the commands of the notes and of `helm test`, Ray, Serve and the
engine with the tiny model. Kubernetes' API is the mock of the client's tests.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.chart.local_pods import POD_IP, Cluster, LocalPod
from tests.chart.rendering import CHART, Rendered, render
from tests.clients.kubernetes_server import (
    EVENTS,
    LEASES,
    RAY_CLUSTERS,
    KubernetesServer,
    kubernetes_server,
)
from tests.integration.running_system import free_ports

from expertmesh.launch.our_processes import MARKER_VARIABLE, end_processes

pytestmark = [pytest.mark.integration, pytest.mark.slow]

_MARKER = "emtest-pods"
"""Short, because the paths of Ray's sockets may have 107 bytes."""
_TOKENS = {"mesh_token": "a mesh token", "auth_token": "r" * 64}
_NODES_S = 180.0
_GROUP_S = 420.0
_NODES = """
import json, sys
from pathlib import Path
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.launch.ray_nodes import RayNodes

nodes = RayNodes(Path(sys.argv[1]), int(sys.argv[2]))
nodes.start_head()
for name, cpus, count in json.loads(sys.argv[3]):
    for _ in range(count):
        nodes.start_worker(Pool(name, Market.LOCAL, 0.0, None, 0, cpus, count, count))
print("up", flush=True)
sys.stdin.read()
"""


@dataclass
class Running:
    cluster: Cluster
    kubernetes: KubernetesServer
    gateway: LocalPod
    controller: LocalPod
    gateway_url: str
    controller_url: str
    nodes: subprocess.Popen[bytes]

    async def until(self, what: Callable[[], Any], limit_s: float, why: str) -> Any:
        deadline_s = time.monotonic() + limit_s
        while True:
            for pod in (self.gateway, self.controller):
                assert all(each.poll() is None for each in pod.processes), pod.text()
            with contextlib.suppress(httpx.HTTPError):
                found = what()
                if found:
                    return found
            assert time.monotonic() < deadline_s, (
                f"not within {limit_s:g} s: {why}\n{self.controller.text()}\n{self.gateway.text()}"
            )
            await asyncio.sleep(0.3)

    def groups(self, state: str) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {_TOKENS['mesh_token']}"}
        answer = httpx.get(f"{self.controller_url}/v1/fleet", headers=headers, timeout=10)
        fleet = answer.raise_for_status().json()
        return [group for group in fleet["groups"] if group["state"] == state]


def answers(url: str) -> bool:
    return httpx.get(url).status_code == 200


def machine_environment() -> dict[str, str]:
    """What images and KubeRay set, and what keeps several nodes apart on one machine."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/root"),
        MARKER_VARIABLE: _MARKER,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _TOKENS["auth_token"],
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_enable_pipe_based_agent_to_parent_health_check": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def start_nodes(cluster: Cluster, dashboard_port: int, temp: Path) -> subprocess.Popen[bytes]:
    """Ray nodes of this machine: as many as the worker groups have at least."""
    groups = cluster.rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    for group in groups:
        assert group["labels"]["expertmesh.io/pool"] == group["groupName"]
    worker = LocalPod(cluster, "ray-worker", groups[0]["template"]["spec"])
    wanted = [(g["groupName"], int(g["resources"]["CPU"]), g["minReplicas"]) for g in groups]
    with (cluster.folder / "nodes.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _NODES, str(temp), str(dashboard_port), json.dumps(wanted)],
            env=worker.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    return process


@contextlib.asynccontextmanager
async def running(rendered: Rendered, ports: list[int], folder: Path) -> AsyncIterator[Running]:
    temp = Path(tempfile.mkdtemp(prefix=f"{_MARKER}-"))
    gateway_port, controller_port, dashboard_port = ports
    cluster = Cluster(
        rendered,
        folder,
        {"expertmesh-tokens": _TOKENS, "chat-key": {}},
        {
            f"em-expertmesh-controller:{controller_port}": f"{POD_IP}:{controller_port}",
            "em-expertmesh-ray-head-svc:8265": f"{POD_IP}:{dashboard_port}",
            "em-expertmesh-gateway:80": f"{POD_IP}:{gateway_port}",
        },
        machine_environment(),
    )
    specs = {
        name: rendered.one("Deployment", f"-{name}")["spec"]["template"]["spec"]
        for name in ("gateway", "controller")
    }
    pods = {name: LocalPod(cluster, name, spec) for name, spec in specs.items()}
    nodes = None
    async with kubernetes_server(folder) as kubernetes:
        name = rendered.one("RayCluster")["metadata"]["name"]
        kubernetes.put(RAY_CLUSTERS, name, apiVersion="ray.io/v1", kind="RayCluster", spec={})
        try:
            nodes = start_nodes(cluster, dashboard_port, temp)
            assert nodes.stdout is not None
            line = await asyncio.wait_for(asyncio.to_thread(nodes.stdout.readline), _NODES_S)
            assert line == b"up\n", (folder / "nodes.log").read_text()[-4000:]
            yield Running(
                cluster,
                kubernetes,
                pods["gateway"],
                pods["controller"],
                f"http://{POD_IP}:{gateway_port}",
                f"http://{POD_IP}:{controller_port}",
                nodes,
            )
        finally:
            for pod in pods.values():
                for process in pod.processes:
                    if process.poll() is None:
                        process.kill()
                    process.wait()
            if nodes is not None:
                assert nodes.stdin is not None and nodes.stdout is not None
                nodes.stdin.close()
                nodes.stdout.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(nodes.wait, 20)
            await asyncio.to_thread(end_processes, _MARKER, 1.0)
            if nodes is not None:
                nodes.wait()
            shutil.rmtree(temp, ignore_errors=True)


async def test_the_rendered_pods_serve_a_request(tmp_path: Path) -> None:
    ports = free_ports(3)
    rendered = render(
        profile=CHART / "profiles" / "kind-cpu.yaml",
        values={
            "platform.gateway.port": ports[0],
            "platform.controller.port": ports[1],
            "secrets.mesh": {"existingSecret": "expertmesh-tokens", "value": ""},
            "secrets.ray": {"existingSecret": "expertmesh-tokens", "value": ""},
            "models[0].scaling.groups": {"min": 1, "max": 1},
            "tests.chat": {"existingSecret": "chat-key"},
        },
    )
    async with running(rendered, ports, tmp_path) as system:
        system.controller.start("--kubeconfig", str(system.kubernetes.kubeconfig))
        system.gateway.start()
        # The probes of the pods.
        for pod, url in (
            (system.controller, system.controller_url),
            (system.gateway, system.gateway_url),
        ):
            for probe in ("livenessProbe", "readinessProbe"):
                path = pod.container[probe]["httpGet"]["path"]
                await system.until(partial(answers, url + path), 120, f"{pod.name} answers {path}")
        await system.until(lambda: system.groups("ready"), _GROUP_S, "a group is ready")

        # The controller leads by a Lease, and says in Kubernetes why it started a group.
        lease = system.kubernetes.objects[LEASES, "kind-controller"]
        assert lease["metadata"]["annotations"]["expertmesh.io/url"] == system.controller_url
        said = [item for (kind, _), item in system.kubernetes.objects.items() if kind == EVENTS]
        assert {each["involvedObject"]["kind"] for each in said} == {"RayCluster"}
        assert said

        # As the notes say: make a key, then let `helm test` ask with it.
        made = await asyncio.to_thread(
            system.gateway.run, "expertmesh", "keys", "create", "--tenant", "trial"
        )
        assert made.returncode == 0, made.stderr
        key = made.stdout.strip()
        headers = {"Authorization": f"Bearer {key}"}
        await system.until(
            lambda: (
                httpx.get(f"{system.gateway_url}/v1/models", headers=headers).status_code == 200
            ),
            20,
            "the gateway knows the key",
        )
        secrets = {**system.cluster.secrets, "chat-key": {"key": key}}
        tests = Cluster(rendered, tmp_path, secrets, system.cluster.hosts, machine_environment())
        for name in ("gateway-health", "chat-completion"):
            pod = LocalPod(tests, name, rendered.one("Pod", f"-{name}")["spec"])
            done = await asyncio.to_thread(pod.run)
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.strip()

        # They end in time, within what the pods give them.
        for pod in (system.gateway, system.controller):
            (process,) = pod.processes
            process.send_signal(signal.SIGTERM)
            limit_s = pod.spec["terminationGracePeriodSeconds"]
            code = await asyncio.to_thread(process.wait, limit_s)
            assert code == 0, pod.text()
            pod.processes.clear()
        # What was served is in the ledger of the shared volume.
        usage = await asyncio.to_thread(system.controller.run, "expertmesh", "usage", "--json")
        assert usage.returncode == 0, usage.stderr
        assert "tiny-moe" in usage.stdout
