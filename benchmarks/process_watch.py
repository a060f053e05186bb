"""CPU seconds and memory of a system's processes by kind, sampled so that ended ones count too."""

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import psutil

_PERIOD_S = 0.5

REPLICA = "replica"
ENGINE_CORE = "engine core"
WORKER = "engine worker"
COORDINATOR = "coordinator"
BUILD_TASK = "build task"
IDLE_WORKER = "Ray's idle workers"
RAY_NODES = "raylets and GCS"
RAY_AGENTS = "Ray's node agents"
RAY_DASHBOARD = "Ray's dashboard and monitor"
SERVE = "Serve's controller and proxy"
OTHER = "other"
CONTROLLER = "controller"
GATEWAY = "gateway"
SYSTEM = "expertmesh up"
OF_A_GROUP = (REPLICA, ENGINE_CORE, WORKER, COORDINATOR)
TASK_PREFIX = "task "
"""Before the name of any other Ray task or actor."""

# Titles that processes give themselves, most telling first.
_TITLES = (
    (re.compile(r"^VLLM::EngineCore"), ENGINE_CORE),
    (re.compile(r"^VLLM::Worker"), WORKER),
    (re.compile(r"^VLLM::DPCoordinator"), COORDINATOR),
    (re.compile(r"^ray::ServeReplica:"), REPLICA),
    (re.compile(r"^ray::build_serve_application"), BUILD_TASK),
    (re.compile(r"^ray::(ServeController|ProxyActor|SERVE_)"), SERVE),
    (re.compile(r"^ray::(DashboardAgent|RuntimeEnvAgent)"), RAY_AGENTS),
    (re.compile(r"^ray-dashboard"), RAY_DASHBOARD),
    (re.compile(r"^(raylet|gcs_server)"), RAY_NODES),
    (re.compile(r"^ray::IDLE"), IDLE_WORKER),
)
_RAY_TASK = re.compile(r"^ray::([A-Za-z_]+)")
_REPLICA_OF = re.compile(r"^ray::ServeReplica:([^:.]+)")


@dataclass(frozen=True, slots=True)
class Seen:
    pid: int
    parent: int
    kind: str
    group: str | None
    """Of a replica; None for processes whose title does not tell."""
    cpu_s: float


Snapshot = Mapping[int, Seen]


@dataclass(slots=True)
class ProcessWatch:
    """Use with `with`: samples the tree below `root_pid` until the end of the block."""

    root_pid: int
    _seen: dict[int, Seen] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def snapshot(self) -> Snapshot:
        """All processes seen so far, with what they had used when last seen."""
        self._sample()
        return dict(self._seen)

    def alive(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.root_pid)
            yield root
            yield from root.children(recursive=True)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.Error), process.oneshot():
                before = self._seen.get(process.pid)
                name = process.name()
                times = process.cpu_times()
                self._seen[process.pid] = Seen(
                    process.pid,
                    process.ppid() if before is None else before.parent,
                    kind_of(process, name, self.root_pid, before),
                    _group_of(name) or (before.group if before else None),
                    times.user + times.system,
                )


def kind_of(process: psutil.Process, name: str, root_pid: int, before: Seen | None) -> str:
    """A process keeps the most telling title it has had: a task's worker becomes idle after it."""
    if process.pid == root_pid:
        return SYSTEM
    for title, kind in _TITLES:
        if title.match(name):
            if kind == IDLE_WORKER and before is not None and before.kind != OTHER:
                return before.kind
            return kind
    task = _RAY_TASK.match(name)
    if task:
        return TASK_PREFIX + task.group(1)
    if before is not None and before.kind != OTHER:
        return before.kind
    command = process.cmdline()
    for service in (CONTROLLER, GATEWAY):
        if ["-m", "expertmesh", service] == command[1:4]:
            return service
    # The dashboard, the autoscaler's monitor: the rest of what Ray's head node runs.
    return RAY_DASHBOARD if any("/ray/" in part for part in command) else OTHER


def _group_of(name: str) -> str | None:
    found = _REPLICA_OF.match(name)
    return found.group(1) if found else None


def members(snapshot: Snapshot, group: str) -> set[int]:
    """The processes of one group: its replicas and what they have started."""
    pids = {seen.pid for seen in snapshot.values() if seen.group == group}
    while True:
        below = {seen.pid for seen in snapshot.values() if seen.parent in pids} - pids
        if not below:
            return pids
        pids |= below


def cpu_by_kind(before: Snapshot, after: Snapshot, group: str) -> dict[str, tuple[int, float]]:
    """By kind: how many processes worked between the two looks, and their CPU seconds.

    Of the kinds that belong to groups only the ones of `group` count.
    """
    own = members(after, group)
    totals: dict[str, tuple[int, float]] = {}
    for pid, seen in after.items():
        if seen.kind in OF_A_GROUP and pid not in own:
            continue
        used_s = seen.cpu_s - (before[pid].cpu_s if pid in before else 0.0)
        if used_s >= 0.05:
            count, cpu_s = totals.get(seen.kind, (0, 0.0))
            totals[seen.kind] = (count + 1, cpu_s + used_s)
    return totals
