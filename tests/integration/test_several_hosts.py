"""One group over two hosts, and what happens when a host is cut off: requests, groups, money."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from tests.integration.network_hosts import (
    HOST_INTERFACE,
    Host,
    host_namespaces,
    machine_interfaces,
    network_of_hosts,
)
from tests.integration.running_system import (
    MODEL,
    REPOSITORY,
    RunningSystem,
    free_ports,
    wait_until,
    wait_until_gone,
)

from expertmesh.launch.local import LocalSystem
from expertmesh.launch.our_processes import MARKER_VARIABLE, end_processes
from expertmesh.launch.state_dir import StateDir
from expertmesh.spec.load import load_system

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODEL_FOLDER = REPOSITORY / "models/tiny-qwen3-moe"
_GCS_PORT = 6379
_DASHBOARD_PORT = 8265
_NODE_START_S = 120.0
_SERVICE_START_S = 90.0
_MARKER = "expertmesh-several-hosts"
"""The same in every run, so that a run finds what a killed one has left."""


@dataclass(frozen=True)
class SystemOnHosts(RunningSystem):
    """Its process is the controller."""

    hosts: Mapping[str, Host]
    environment: Mapping[str, str]

    def log(self, name: str) -> str:
        return super().log("controller" if name == "up" else name)

    def applications(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.state.ray_token()}"}
        answer = httpx.get(
            f"{self.dashboard_url}/api/serve/applications/", headers=headers, timeout=20
        )
        return dict(answer.raise_for_status().json())

    def nodes(self):
        headers = {"Authorization": f"Bearer {self.state.ray_token()}"}
        answer = httpx.get(
            f"{self.dashboard_url}/api/v0/nodes?detail=1", headers=headers, timeout=20
        )
        return answer.json()["data"]["result"]["result"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemOnHosts]:
    """Three hosts; Ray's head, two slots of pool dear and one of pool cheap on the first, one slot
    of pool cheap on each of the others: the two ranks of a group in pool cheap are on two hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    interfaces = machine_interfaces()
    ended = end_processes(_MARKER, 0.0)
    with network_of_hosts("a", "b", "c") as hosts:
        with system_on(hosts, folder) as started:
            yield started
        print("LEFT ON HOSTS", [p for h in hosts for p in h.processes()])
    assert host_namespaces() == []
    assert machine_interfaces() == interfaces
    assert wait_until_gone(_MARKER, 0.0) == []


@contextlib.contextmanager
def system_on(hosts: tuple[Host, ...], folder: Path) -> Iterator[SystemOnHosts]:
    ports = free_ports(2)
    files = write_manifests(folder, ports)
    state = StateDir(folder / ".expertmesh" / "test")
    state.create()
    first, *others = hosts
    ray_temp = Path(tempfile.mkdtemp(prefix=f"{_MARKER}-"))
    local = LocalSystem(load_system(list(files)), list(files), print)
    local.state = state
    environment = {
        **os.environ,
        **local._node_environment(),
        MARKER_VARIABLE: _MARKER,
        # On one machine Ray may turn every address into the loopback one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "GLOO_SOCKET_IFNAME": HOST_INTERFACE,
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    }
    services = []
    try:
        t0 = time.monotonic()
        start_head(first, environment, ray_temp)
        print("HEAD", time.monotonic() - t0)
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    lambda each: start_worker(*each, environment, first.ip),
                    [(first, "dear", 2), *((host, "cheap", 1) for host in hosts)],
                )
            )
        print("WORKERS", time.monotonic() - t0)
        dashboard_url = f"http://{first.ip}:{_DASHBOARD_PORT}"
        manifests = [part for file in files for part in ("-f", str(file))]
        controller_url, gateway_url = (f"http://127.0.0.1:{port}" for port in ports)
        services = [
            start_service(
                state, environment, "controller", *manifests, "--dashboard-url", dashboard_url
            ),
            start_service(
                state,
                environment,
                "gateway",
                *("--controller-url", controller_url, "--port", str(ports[1])),
            ),
        ]
        system = SystemOnHosts(
            process=services[0],
            folder=folder,
            platform_file=files[0],
            deployment_file=files[1],
            gateway_url=gateway_url,
            controller_url=controller_url,
            dashboard_url=dashboard_url,
            hosts={host.name: host for host in hosts},
            environment=environment,
        )
        wait_until(lambda: is_up(system), _SERVICE_START_S, "gateway and controller answer")
        print("SERVICES", time.monotonic() - t0)
        yield system
    finally:
        for service in services:
            service.terminate()
        for service in services:
            service.wait(30)
        os.system(
            f"cp -r {ray_temp}/session_latest/logs /tmp/h/hosts-ray-logs.{os.getpid()}; cp {folder}/.expertmesh/test/logs/* /tmp/h/hosts-ray-logs.{os.getpid()}/"
        )
        end_processes(_MARKER, 1.0)


def start_head(host: Host, environment: Mapping[str, str], ray_temp: Path) -> None:
    start_node(
        host,
        environment,
        "--head",
        f"--port={_GCS_PORT}",
        "--num-cpus=0",
        "--include-dashboard=true",
        f"--dashboard-host={host.ip}",
        f"--dashboard-port={_DASHBOARD_PORT}",
        f"--temp-dir={ray_temp}",
    )


def start_worker(
    host: Host, pool: str, slots: int, environment: Mapping[str, str], head_ip: str
) -> None:
    start_node(
        host,
        environment,
        f"--address={head_ip}:{_GCS_PORT}",
        f"--num-cpus={slots}",
        f"--labels=expertmesh.io/pool={pool}",
    )


def start_node(host: Host, environment: Mapping[str, str], *arguments: str) -> None:
    done = host.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start"),
            *arguments,
            f"--node-ip-address={host.ip}",
            "--num-gpus=0",
            f"--object-store-memory={80 * 2**20}",
            "--disable-usage-stats",
            # Two nodes share the first host's ports.
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        ],
        {**environment, "VLLM_HOST_IP": host.ip},
        _NODE_START_S,
    )
    assert done.returncode == 0, f"ray start on host {host.name}:\n{done.stdout[-4000:]}"


def start_service(
    state: StateDir, environment: Mapping[str, str], name: str, *arguments: str
) -> "subprocess.Popen[bytes]":
    with (state.logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "expertmesh", name, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def is_up(system: SystemOnHosts) -> bool:
    assert system.process.poll() is None, system.log("controller")
    with contextlib.suppress(httpx.HTTPError):
        return all(
            httpx.get(f"{url}/healthz").status_code == 200
            for url in (system.gateway_url, system.controller_url)
        )
    return False


def write_manifests(folder: Path, ports: list[int]) -> tuple[Path, Path]:
    platform = {
        "kind": "Platform",
        "name": "test",
        "pools": [
            {"name": "cheap", "cpus_per_node": 1, "nodes": {"min": 3, "max": 3}},
            {"name": "dear", "cpus_per_node": 2, "nodes": {"min": 1, "max": 1}},
        ],
        "controller": {"port": ports[0]},
        "gateway": {"port": ports[1]},
        "ray_dashboard_port": _DASHBOARD_PORT,
    }
    for pool in platform["pools"]:
        pool |= {"market": "local", "usd_per_node_hour": 0.3 if pool["name"] == "cheap" else 0.9}
    deployment = yaml.safe_load((REPOSITORY / "deployments/tiny-moe.yaml").read_text())
    deployment["model"]["source"] = str(MODEL_FOLDER)
    deployment["pools"] = ["cheap", "dear"]
    deployment["scaling"] |= {"groups": {"min": 2, "max": 2}}
    deployment["engine"] = {"dtype": "float32", "kv_cache_memory_bytes": 64 * 2**20}
    files = folder / "platform.yaml", folder / "tiny-moe.yaml"
    for file, manifest in zip(files, (platform, deployment), strict=True):
        file.write_text(yaml.safe_dump(manifest))
    return files


def test_explore(system: SystemOnHosts) -> None:
    t0 = time.monotonic()
    system.until_groups(2, 400)
    print("GROUPS READY", time.monotonic() - t0)
    key = system.new_key("tests")
    client = openai.OpenAI(base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0)
    print(json.dumps(system.groups(), indent=1))
    print(
        [
            (n["node_id"][:8], n["node_ip"], n["state"], n["labels"].get("expertmesh.io/pool"))
            for n in system.nodes()
        ]
    )
    tokens = httpx.post(
        f"{system.gateway_url}/tokenize",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": MODEL, "prompt": "Once upon a time there was a fox"},
        timeout=60,
    ).json()["tokens"]
    for i in range(6):
        a = client.completions.create(
            model=MODEL,
            prompt=tokens,
            max_tokens=6,
            temperature=0,
            logprobs=5,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )
        print(a.choices[0].text, a.choices[0].logprobs)
    cheap = next(g for g in system.groups() if g["pool"] == "cheap")
    ips = [r["base_url"].split("/")[2].split(":")[0] for r in cheap["ranks"]]
    victim = next(h for h in system.hosts.values() if h.ip in ips and h.name != "a")
    print("VICTIM", victim, ips)
    stop = threading.Event()
    T = [0.0]

    def now():
        return f"{time.monotonic() - T[0]:6.1f}"

    def traffic(n):
        c = openai.OpenAI(
            base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0, timeout=120
        )
        while not stop.wait(0.3):
            s = time.monotonic()
            try:
                c.completions.create(model=MODEL, prompt=tokens, max_tokens=8)
                d = time.monotonic() - s
                if d > 2:
                    print(now(), f"SLOW ok {d:.1f}", flush=True)
            except Exception as e:
                print(now(), f"FAIL after {time.monotonic() - s:.1f}: {e}", flush=True)

    def watch():
        last = None
        while not stop.wait(0.5):
            try:
                view = [(g["name"], g["state"], g["message"]) for g in system.groups()]
                apps = system.applications()
                view2 = {
                    n: (
                        a["status"],
                        a["message"][:100],
                        [
                            (r["state"], r["node_ip"], r["pid"])
                            for d in a["deployments"].values()
                            for r in d["replicas"]
                        ],
                        [d["status"] for d in a["deployments"].values()],
                    )
                    for n, a in apps["applications"].items()
                }
                nodes = [
                    (n["node_ip"], n["state"]) for n in system.nodes() if n["state"] != "ALIVE"
                ]
                tg = [
                    (g["app_name"], [(t["ip"], t["port"]) for t in g["targets"]])
                    for g in apps["target_groups"]
                    if g["protocol"] == "HTTP"
                ]
                dec = system.fleet()["decisions"][MODEL]
                left = {h.name: len(h.processes()) for h in system.hosts.values()}
                v = (view, view2, nodes, tg, dec["pending"])
                if v != last:
                    print(now(), json.dumps(v), left, dec["reason"], flush=True)
                    last = v
            except Exception as e:
                print(now(), "WATCH", type(e), e, flush=True)

    T[0] = time.monotonic()
    threads = [threading.Thread(target=traffic, args=(i,)) for i in range(2)] + [
        threading.Thread(target=watch)
    ]
    for t in threads:
        t.start()
    time.sleep(6)
    print(now(), "CUT", victim.name, flush=True)
    victim.cut_link()
    time.sleep(int(os.environ.get("EXPLORE1", "240")))
    other = next(h for h in system.hosts.values() if h.name not in ("a", victim.name))
    print(
        now(), "CUT", other.name, "victim procs", [p.name() for p in victim.processes()], flush=True
    )
    other.cut_link()
    time.sleep(120)
    print(
        system.run(
            "status", "--once", "--platform", "test", "--controller-url", system.controller_url
        ).stdout
    )
    print(now(), "procs", [p.name() for h in (victim, other) for p in h.processes()], flush=True)
    stop.set()
    for t in threads:
        t.join()
