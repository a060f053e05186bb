"""The running system as the benchmarks see it: its journal, its logs, its processes, its ranks."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from benchmarks.load import Target
from benchmarks.process_watch import ProcessWatch
from benchmarks.ray_logs import VLLM_LOG_PREFIX
from tests.integration.running_system import (
    MODEL,
    REPOSITORY,
    RunningSystem,
    running_system,
    wait_until,
)

from expertmesh.telemetry.metrics import GATEWAY_RETRIES

_HTTP_TIMEOUT_S = 10.0
_NEWEST = 40
"""Decisions to look through: more than are made during one start."""


@dataclass(frozen=True, slots=True)
class Transition:
    at_s: float
    before: str | None
    after: str


@dataclass(frozen=True, slots=True)
class BenchSystem:
    running: RunningSystem
    watch: ProcessWatch
    started_at_s: float
    """Unix time of the command."""
    key: str

    @property
    def model(self) -> str:
        return MODEL

    @property
    def ray_logs(self) -> Path:
        pattern = f"expertmesh-{self.running.state.marker}-*/session_latest/logs"
        return next(Path(tempfile.gettempdir()).glob(pattern))

    @property
    def gateway(self) -> Target:
        headers = {"Authorization": f"Bearer {self.key}"}
        return Target("gateway", (self.running.gateway_url,), headers)

    def ranks(self, group: str) -> Target:
        found = next(each for each in self.running.groups() if each["name"] == group)
        urls = tuple(rank["base_url"] for rank in found["ranks"])
        return Target("direct", urls, {"X-EM-Mesh-Token": self.running.state.mesh_token()})

    def group_names(self) -> list[str]:
        return [group["name"] for group in self.running.groups()]

    def decisions(self, limit: int) -> list[dict[str, Any]]:
        """Oldest first."""
        answer = httpx.get(
            f"{self.running.controller_url}/v1/decisions?limit={limit}",
            headers=self.running.mesh_headers,
            timeout=_HTTP_TIMEOUT_S,
        )
        return list(reversed(answer.raise_for_status().json()["decisions"]))

    def asked_at_s(self, group: str) -> float:
        for decision in self.decisions(500):
            for action in decision["actions"]:
                if action["kind"] == "start" and action["group"] == group:
                    return float(decision["at_s"])
        raise LookupError(f"{group}: the journal has no decision that starts it")

    def transitions(self, group: str, since_s: float) -> list[Transition]:
        return [
            Transition(decision["at_s"], step["before"], step["after"])
            for decision in self.decisions(_NEWEST)
            for step in decision["transitions"]
            if step["group"] == group and decision["at_s"] >= since_s
        ]

    def until_transition(
        self, group: str, after: str, since_s: float, timeout_s: float
    ) -> Transition:
        """The first one to that state since then."""

        def find() -> Transition | None:
            with contextlib.suppress(httpx.HTTPError):
                for step in self.transitions(group, since_s):
                    if step.after == after:
                        return step
            return None

        found = wait_until(find, timeout_s, f"{group} is {after}", self.running.describe)
        assert found is not None
        return found

    def set_groups(self, smallest: int, largest: int) -> None:
        """By the manifest: the next controller takes over the running groups and acts on it."""
        file = self.running.deployment_file
        manifest = yaml.safe_load(file.read_text())
        manifest["scaling"]["groups"] = {"min": smallest, "max": largest}
        file.write_text(yaml.safe_dump(manifest))
        controller = self.controller()
        controller.terminate()
        controller.wait(10)

    def controller(self) -> psutil.Process:
        process = self.running.service("controller")
        if process is None:
            raise LookupError("no controller runs; see its log")
        return process

    def replica_pids(self, group: str) -> list[int]:
        answer = httpx.get(
            f"{self.running.dashboard_url}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.running.state.ray_token()}"},
            timeout=_HTTP_TIMEOUT_S,
        )
        deployments = answer.raise_for_status().json()["applications"][group]["deployments"]
        return [
            replica["pid"] for each in deployments.values() for replica in each["replicas"] or []
        ]

    def engine_core(self, group: str) -> psutil.Process:
        """That of one rank which also serves; any will do, since the ranks of a group are alike."""
        for pid in self.replica_pids(group):
            for child in psutil.Process(pid).children():
                if child.name().startswith("VLLM::EngineCore"):
                    return child
        raise LookupError(f"{group}: none of its replicas has an engine core")

    def retries(self) -> float:
        """Requests that the gateway has sent a second time, since it started."""
        answer = httpx.get(
            f"{self.running.gateway_url}/metrics",
            headers=self.running.mesh_headers,
            timeout=_HTTP_TIMEOUT_S,
        )
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in answer.raise_for_status().text.splitlines()
            if line.startswith(GATEWAY_RETRIES.name)
        )


@contextlib.contextmanager
def bench_system() -> Iterator[BenchSystem]:
    """Two pools of two nodes, one group; all of it is gone at the end of the block."""
    # The processes of the Ray nodes inherit both.
    os.environ["VLLM_LOGGING_PREFIX"] = VLLM_LOG_PREFIX
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        started_at_s = time.time()
        with (
            running_system(Path(folder), groups=(1, 1)) as running,
            ProcessWatch(running.process.pid) as watch,
        ):
            yield BenchSystem(running, watch, started_at_s, running.new_key("bench"))
