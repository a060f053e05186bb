"""A whole system on this machine: Ray nodes as pools, a controller and a gateway, and their end."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Self

import aiohttp

from expertmesh.controller.console_access import console_link
from expertmesh.errors import SetupError
from expertmesh.launch.chosen import chosen_lines
from expertmesh.launch.our_processes import MARKER_VARIABLE, end_processes
from expertmesh.launch.ray_nodes import RayNodes
from expertmesh.launch.state_dir import StateDir
from expertmesh.serving.fate_sharing import own_children
from expertmesh.spec.load import System

Report = Callable[[str], None]

_SERVICE_START_S = 60.0
_STOP_GRACE_S = 8.0
_RESTARTS = 3
_RESTART_WINDOW_S = 60.0
"""A service that ends more often than that within this time is not started again."""


@dataclass(frozen=True, slots=True)
class Service:
    process: subprocess.Popen[bytes]
    arguments: tuple[str, ...]
    starts_s: tuple[float, ...]
    """When it was last started, oldest first."""


@dataclass(slots=True)
class LocalSystem:
    """Use as `async with`: on the way out, whatever happened, none of its processes is left."""

    system: System
    files: list[Path]
    report: Report
    is_demo: bool = False
    """It begins with an empty store of its own: what earlier runs have learned is not its story."""
    state: StateDir = field(init=False)
    _services: dict[str, Service] = field(init=False, default_factory=dict)
    _lock: IO[str] | None = field(init=False, default=None)
    _ray_temp: Path | None = field(init=False, default=None)
    _nodes: RayNodes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.state = StateDir.of(self.system.platform.name)
        if self.is_demo:
            self.state = replace(self.state, store_name="demo.db")

    @property
    def gateway_url(self) -> str:
        listener = self.system.platform.gateway
        return f"http://{listener.host}:{listener.port}"

    @property
    def controller_url(self) -> str:
        listener = self.system.platform.controller
        return f"http://{listener.host}:{listener.port}"

    def console_link(self) -> str:
        """Opens the console once, within ten minutes."""
        return console_link(self.controller_url, self.state.mesh_token(), time.time())

    @property
    def gateway_arguments(self) -> tuple[str, ...]:
        gateway = self.system.platform.gateway
        return (
            *("--controller-url", self.controller_url),
            *("--host", gateway.host, "--port", str(gateway.port)),
            *("--config", str(self.system.platform_file.absolute())),
            *("--state-dir", str(self.state.gateway)),
            *("--workers", str(gateway.workers)),
            *("--allow-origin", self.controller_url),
        )

    async def __aenter__(self) -> Self:
        self.state.create()
        self._lock = self.state.lock()
        try:
            if self.is_demo:
                for file in self.state.path.glob(f"{self.state.store_name}*"):
                    file.unlink()
            stale = await asyncio.to_thread(end_processes, self.state.marker, 0.0)
            if stale:
                self.report(f"ended {stale} processes that an earlier run had left")
            await asyncio.to_thread(self._remove_stale_folders)
            self._check_ports()
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def tend(self) -> None:
        """Starts a service again that has ended. Raises SetupError for one that keeps ending."""
        now_s = time.monotonic()
        for name, service in list(self._services.items()):
            if service.process.poll() is None:
                continue
            starts_s = (*service.starts_s, now_s)[-_RESTARTS - 1 :]
            if len(starts_s) > _RESTARTS and now_s - starts_s[0] < _RESTART_WINDOW_S:
                raise SetupError(self._describe_end(name))
            self.report(f"{self._describe_end(name)}; starting it again")
            self._services[name] = self._spawn(name, service.arguments, starts_s)

    def announce_loss(self, pool: str, in_s: float) -> str:
        """Says of one of the pool's nodes that it will be taken away, and answers its id."""
        node_id = self._running_nodes().workers_of(pool)[0]
        self.state.spot_notices.write_text(f"{node_id}: {in_s:g}\n")
        return node_id

    def take_node(self, node_id: str) -> None:
        self._running_nodes().take(node_id)

    def _running_nodes(self) -> RayNodes:
        assert self._nodes is not None, "the system has not been started"
        return self._nodes

    def _describe_end(self, name: str) -> str:
        code = self._services[name].process.returncode
        return f"the {name} ended with exit code {code}; see {self._log_file(name)}"

    def _remove_stale_folders(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"expertmesh-{self.state.marker}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _check_ports(self) -> None:
        platform = self.system.platform
        for name, host, port in (
            ("gateway.port", platform.gateway.host, platform.gateway.port),
            ("controller.port", platform.controller.host, platform.controller.port),
            ("ray_dashboard_port", "127.0.0.1", platform.ray_dashboard_port),
        ):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise SetupError(
                        f"platform {platform.name}: {name}: {port}: {error.strerror} on {host}; "
                        "stop what listens there or write another port in the platform file"
                    ) from None

    async def _start(self) -> None:
        started_s = time.monotonic()
        for line in chosen_lines(self.system.chosen):
            self.report(line)
        self._ray_temp = Path(tempfile.mkdtemp(prefix=f"expertmesh-{self.state.marker}-"))
        own_children()
        os.environ.update(self._node_environment())
        self._start_guardian()
        self._nodes = nodes = RayNodes(self._ray_temp, self.system.platform.ray_dashboard_port)
        self.state.spot_notices.unlink(missing_ok=True)
        self.report("starting the Ray head node")
        nodes.start_head()
        for pool in self.system.pools:
            for number in range(pool.max_nodes):
                # Lets Ctrl-C in between two nodes; starting one blocks for about a second.
                await asyncio.sleep(0)
                self.report(
                    f"starting Ray node {number + 1} of {pool.max_nodes} in pool {pool.name} "
                    f"(${pool.usd_per_node_hour:.2f} an hour)"
                )
                nodes.start_worker(pool)
        self.report("starting the controller and the gateway")
        self._start_service(
            "controller",
            *(part for file in self.files for part in ("-f", str(file))),
            *("--dashboard-url", nodes.dashboard_url),
            *("--serve-host", "127.0.0.1"),
            *("--spot-notices", f"file:{self.state.spot_notices}"),
            *("--gateway-url", self.gateway_url),
        )
        self._start_service("gateway", *self.gateway_arguments)
        async with aiohttp.ClientSession() as http:
            await self._until_healthy(http, "controller", self.controller_url)
            await self._until_healthy(http, "gateway", self.gateway_url)
        self.report(f"the system runs after {time.monotonic() - started_s:.0f} s")

    def _start_guardian(self) -> None:
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "expertmesh.launch.guardian",
                str(os.getpid()),
                self.state.marker,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _node_environment(self) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)
        return {
            MARKER_VARIABLE: self.state.marker,
            "EXPERTMESH_MESH_TOKEN": self.state.mesh_token(),
            "EXPERTMESH_STORE_URL": self.state.store_url,
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
            # Ray: its own tokens, one HTTP port a rank, loopback only, nothing sent home.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.state.ray_token_file),
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            # The controller drains a group before it removes it; Serve need not wait again.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            # A raylet's agents hold each other's pipe open and would outlive it: have them look.
            "RAY_enable_pipe_based_agent_to_parent_health_check": "0",
            # With an empty runtime environment any idle Ray worker can become a replica.
            "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0",
            # vLLM: several engines share this machine's cores.
            "OMP_NUM_THREADS": "1",
            # Else the first request with log-probabilities or top-p waits for Inductor to compile.
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _start_service(self, name: str, *arguments: str) -> None:
        self._log_file(name).unlink(missing_ok=True)
        self._services[name] = self._spawn(name, arguments, (time.monotonic(),))

    def _spawn(self, name: str, arguments: tuple[str, ...], starts_s: tuple[float, ...]) -> Service:
        with self._log_file(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "expertmesh", name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process only, which then ends the others in order.
                start_new_session=True,
            )
        return Service(process, arguments, starts_s)

    def _log_file(self, name: str) -> Path:
        return self.state.logs / f"{name}.log"

    async def _until_healthy(self, http: aiohttp.ClientSession, name: str, url: str) -> None:
        deadline_s = time.monotonic() + _SERVICE_START_S
        while time.monotonic() < deadline_s:
            if self._services[name].process.poll() is not None:
                raise SetupError(self._describe_end(name))
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with http.get(url + "/healthz", timeout=aiohttp.ClientTimeout(2)) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.2)
        raise SetupError(
            f"the {name} did not answer at {url} within {_SERVICE_START_S:.0f} s; "
            f"see {self._log_file(name)}"
        )

    async def _stop(self) -> None:
        """Services first, so that the gateway writes its last usage; then all that is left."""
        self.report("stopping")
        await asyncio.shield(asyncio.to_thread(self._stop_all))

    def _stop_all(self) -> None:
        for name in ("gateway", "controller"):
            service = self._services.get(name)
            if service and service.process.poll() is None:
                service.process.terminate()
        for service in self._services.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(_STOP_GRACE_S)
        end_processes(self.state.marker, 1.0)
        if self._ray_temp:
            logs = self._ray_temp / "session_latest" / "logs"
            kept = self.state.logs / "ray"
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):
                shutil.copytree(logs, kept, ignore_dangling_symlinks=True)
            shutil.rmtree(self._ray_temp, ignore_errors=True)
        if self._lock:
            self._lock.close()
