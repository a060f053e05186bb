"""A whole local system as a user starts it: `expertmesh up` in its own folder, on free ports."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml

from expertmesh.errors import SetupError
from expertmesh.launch.our_processes import end_processes, find_processes
from expertmesh.launch.state_dir import StateDir

REPOSITORY = Path(__file__).parents[2]
MODEL = "tiny-moe"
T = TypeVar("T")

_START_TIMEOUT_S = 120.0
_START_DEADLINE_S = 180.0
"""After it a group whose start hangs is started anew, and the test still waits for that."""
GROUP_TIMEOUT_S = 420.0


@dataclass(frozen=True)
class RunningSystem:
    process: subprocess.Popen[bytes]
    folder: Path
    platform_file: Path
    deployment_file: Path
    gateway_url: str
    controller_url: str
    dashboard_url: str

    @property
    def state(self) -> StateDir:
        return StateDir(self.folder / ".expertmesh" / "test")

    @property
    def mesh_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.state.mesh_token()}"}

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """An `expertmesh` command in the system's folder."""
        return subprocess.run(
            [sys.executable, "-m", "expertmesh", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=check,
        )

    def new_key(self, tenant: str) -> str:
        key = self.run("keys", "create", "--tenant", tenant).stdout.strip()
        headers = {"Authorization": f"Bearer {key}"}
        wait_until(
            lambda: httpx.get(f"{self.gateway_url}/v1/models", headers=headers).status_code == 200,
            10,
            "the gateway knows a new key",
        )
        return key

    def fleet(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.controller_url}/v1/fleet", headers=self.mesh_headers, timeout=10)
        return dict(answer.raise_for_status().json())

    def groups(self, state: str | None = None) -> list[dict[str, Any]]:
        return [
            group for group in self.fleet()["groups"] if state is None or group["state"] == state
        ]

    def until_groups(self, count: int, timeout_s: float = GROUP_TIMEOUT_S) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            assert self.process.poll() is None, self.log("up")
            with contextlib.suppress(httpx.HTTPError, SetupError):
                ready = self.groups("ready")
                return ready if len(ready) >= count else []
            return []

        return wait_until(enough, timeout_s, f"{count} groups are ready", self.describe)

    def rank(self, url: str, path: str) -> Any:
        headers = {"X-EM-Mesh-Token": self.state.mesh_token()}
        return httpx.get(url + path, headers=headers, timeout=20).raise_for_status().json()

    def processes(self) -> list[psutil.Process]:
        return find_processes(self.state.marker)

    def service(self, name: str) -> psutil.Process | None:
        """The process of the gateway or the controller, if it runs."""
        for process in self.process_tree():
            with contextlib.suppress(psutil.Error):
                if ["-m", "expertmesh", name] == process.cmdline()[1:4]:
                    return process
        return None

    def process_tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self, name: str) -> str:
        file = self.state.logs / f"{name}.log" if name != "up" else self.folder / "up.log"
        return file.read_text()[-4000:]

    def describe(self) -> str:
        with contextlib.suppress(httpx.HTTPError):
            return f"{self.fleet()}\n{self.log('controller')}\n{self._engines()}"
        return self.log("up")

    def _engines(self) -> str:
        """What the ranks wrote last, and where each process of an engine is at this moment."""
        told = []
        folders = Path(tempfile.gettempdir()).glob(f"expertmesh-{self.state.marker}-*")
        for file in (f for folder in folders for f in folder.glob("session_2*/logs/worker-*.out")):
            told.append(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}")
        for process in self.processes():
            with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
                if process.name().startswith(("VLLM", "ray::ServeRep")):
                    dump = [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid"]
                    stacks = subprocess.run(
                        [*dump, str(process.pid)], capture_output=True, text=True, timeout=30
                    )
                    told.append(f"--- {process.name()} {stacks.stdout}{stacks.stderr}")
        return "\n".join(told)


@contextlib.contextmanager
def running_system(
    folder: Path,
    *,
    groups: tuple[int, int] = (1, 1),
    nodes: int = 2,
    pools: Sequence[dict[str, Any]] = (),
    **scaling: Any,
) -> Iterator[RunningSystem]:
    system = start_system(folder, groups=groups, nodes=nodes, pools=pools, **scaling)
    try:
        wait_until(
            lambda: _is_up(system), _START_TIMEOUT_S, "the system is up", lambda: system.log("up")
        )
        yield system
    finally:
        stop_system(system)
    left = wait_until_gone(system.state.marker, 0.0)
    assert not left, f"left behind: {left}"


def start_system(
    folder: Path,
    *,
    command: str = "up",
    groups: tuple[int, int] = (1, 1),
    nodes: int = 2,
    pools: Sequence[dict[str, Any]] = (),
    **scaling: Any,
) -> RunningSystem:
    ports = free_ports(3)
    platform_file, deployment_file = write_manifests(
        folder, ports, groups, pools or two_pools(nodes), scaling
    )
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "expertmesh", command),
                *("-f", str(platform_file), "-f", str(deployment_file)),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RunningSystem(
        process=process,
        folder=folder,
        platform_file=platform_file,
        deployment_file=deployment_file,
        gateway_url=f"http://127.0.0.1:{ports[0]}",
        controller_url=f"http://127.0.0.1:{ports[1]}",
        dashboard_url=f"http://127.0.0.1:{ports[2]}",
    )


def stop_system(system: RunningSystem) -> None:
    """As Ctrl-C does; by force when that is not enough, which then fails the test."""
    if system.process.poll() is None:
        system.process.send_signal(signal.SIGINT)
    try:
        system.process.wait(60)
    except subprocess.TimeoutExpired:
        system.process.kill()
        system.process.wait(10)
        end_processes(system.state.marker, 0.0)
        raise


def write_manifests(
    folder: Path,
    ports: list[int],
    groups: tuple[int, int],
    pools: Sequence[dict[str, Any]],
    scaling: dict[str, Any],
) -> tuple[Path, Path]:
    platform = {
        "kind": "Platform",
        "name": "test",
        "pools": list(pools),
        "gateway": {"port": ports[0]},
        "controller": {"port": ports[1]},
        "ray_dashboard_port": ports[2],
    }
    deployment = yaml.safe_load((REPOSITORY / "deployments/tiny-moe.yaml").read_text())
    deployment["model"]["source"] = str(REPOSITORY / "models/tiny-qwen3-moe")
    deployment["pools"] = [pool["name"] for pool in pools]
    # A budget is for those tests that name one.
    del deployment["scaling"]["budget"]
    deployment["scaling"] |= {
        "groups": {"min": groups[0], "max": groups[1]},
        "start_deadline_s": _START_DEADLINE_S,
    } | scaling
    files = folder / "platform.yaml", folder / "tiny-moe.yaml"
    for file, manifest in zip(files, (platform, deployment), strict=True):
        file.write_text(yaml.safe_dump(manifest))
    return files


def pool(name: str, usd_per_node_hour: float, nodes: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "market": "local",
        "usd_per_node_hour": usd_per_node_hour,
        "nodes": {"min": nodes, "max": nodes},
        **more,
    }


def two_pools(nodes: int) -> list[dict[str, Any]]:
    """With different prices, each of `nodes` nodes with room for one rank."""
    return [pool("cheap", 0.30, nodes), pool("dear", 0.45, nodes)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_until(
    check: Callable[[], T],
    timeout_s: float,
    what: str,
    describe: Callable[[], str] = lambda: "",
) -> T:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}\n{describe()}"
        time.sleep(0.3)


def wait_until_gone(marker: str, timeout_s: float) -> list[str]:
    """The processes that are left after at most `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left = []
        for process in find_processes(marker):
            with contextlib.suppress(psutil.Error):
                left.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        if not left or time.monotonic() >= deadline_s:
            return left
        time.sleep(0.2)


def _is_up(system: RunningSystem) -> bool:
    assert system.process.poll() is None, system.log("up")
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{system.gateway_url}/healthz").status_code == 200
    return False
