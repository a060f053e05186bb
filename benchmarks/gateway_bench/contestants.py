"""Starts what is measured, each as its users start it, and ends it again.

Every gateway has one core to itself; upstream and load share the other one.
"""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import aiohttp
import psutil
import yaml
from benchmarks.gateway_bench.account import new_key
from benchmarks.gateway_bench.load import ASLEEP_MODEL, Way
from benchmarks.gateway_bench.upstream import MODEL, WHOLE_TOKENS, word
from tests.gateway.fake_controller import FakeController
from tests.integration.running_system import REPOSITORY, free_ports

from expertmesh.core.domain.fleet import Fleet, Group, GroupState, Rank, ServedModel

OURS = "expertmesh"
DIRECT = "no gateway"
PEERS = REPOSITORY / ".venv-bench"
_GROUP = "em-bench-moe-bench-0"
_START_S = 60.0
_STOP_S = 8.0
_PROBE_EVENTS = 40
_AHEAD = -15
"""As a nice value."""
_LOG_CHARACTERS = 200
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2)
_ANSWER_TIMEOUT = aiohttp.ClientTimeout(total=30)


class CannotRun(Exception):
    """Why something is missing in the tables."""


@dataclass(frozen=True, slots=True)
class Cores:
    gateway: int
    load: int

    @classmethod
    def choose(cls) -> "Cores":
        """The same core for both where there is only one."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(gateway=allowed[-1], load=allowed[0])

    @property
    def apart(self) -> bool:
        return self.gateway != self.load


@dataclass(slots=True)
class Contestant:
    """One that runs and has answered well."""

    way: Way
    version: str = ""
    processes: list[psutil.Process] = field(default_factory=list)
    load: list[psutil.Process] = field(default_factory=list)
    """Upstream and load generator."""

    @property
    def name(self) -> str:
        return self.way.name

    @property
    def cpu_s(self) -> float:
        """User and system time of all its processes so far."""
        return _cpu_s(self.processes)

    @property
    def load_cpu_s(self) -> float:
        return _cpu_s(self.load)

    @property
    def rss_bytes(self) -> int:
        total = 0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@dataclass(frozen=True, slots=True)
class Ground:
    """What all of them have in common."""

    folder: Path
    cores: Cores
    upstream_ports: tuple[int, int]
    upstream_pid: int

    @property
    def load(self) -> list[psutil.Process]:
        return [psutil.Process(), psutil.Process(self.upstream_pid)]

    @property
    def upstream_urls(self) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{port}" for port in self.upstream_ports)


@asynccontextmanager
async def upstream(folder: Path, cores: Cores) -> AsyncIterator[Ground]:
    first, second = free_ports(2)
    _yield_to_others(0)
    command = (sys.executable, "-m", "benchmarks.gateway_bench.upstream")
    ports = ("--port", str(first), "--port", str(second))
    log = folder / "upstream.log"
    with _process((*command, *ports), log, cores.load) as process:
        _yield_to_others(process.pid)
        ground = Ground(folder, cores, (first, second), process.pid)
        async with aiohttp.ClientSession() as http:
            for url in ground.upstream_urls:
                await _until_answers(http, f"{url}/health", {}, "upstream", process, log)
        yield ground


@contextmanager
def ahead_of_others(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Before all other work on this machine, while the measurement lasts. Needs root.

    Raises CannotRun where the kernel does not group processes by session, for `nice` counts there.
    """
    processes = {*contestants[0].load, *(p for each in contestants for p in each.processes)}
    groups = [Path(f"/proc/{process.pid}/autogroup") for process in processes]
    try:
        try:
            for group in groups:
                group.write_text(str(_AHEAD))
        except OSError as error:
            raise CannotRun(f"cannot go ahead of others: {error}") from None
        yield
    finally:
        # This process shares its group with the shell that it was started from.
        for group in groups:
            with contextlib.suppress(OSError):
                group.write_text("0")


def _yield_to_others(pid: int) -> None:
    """Upstream and load share a core. By default each message would switch between the two, which
    costs more than the message; in this class a process that wakes up waits for the other one."""
    policy = os.SCHED_BATCH | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(pid, policy, os.sched_param(0))


async def direct(ground: Ground) -> Contestant:
    return await _probed(Contestant(Way(DIRECT, ground.upstream_ports), load=ground.load))


@asynccontextmanager
async def ours(ground: Ground) -> AsyncIterator[Contestant]:
    token = secrets.token_hex(16)
    token_file = ground.folder / "mesh-token"
    token_file.write_text(token)
    store_url = f"sqlite+aiosqlite:///{ground.folder / 'store.db'}"
    key = await new_key(store_url)
    (port,) = free_ports(1)
    controller = FakeController(token)
    controller.fleet = _fleet(ground)
    await controller.start()
    command = (
        *(sys.executable, "-m", "expertmesh", "gateway", "--host", "127.0.0.1"),
        *("--port", str(port), "--controller-url", controller.url),
        *("--store", store_url, "--mesh-token-file", str(token_file), "--drain-timeout-s", "2"),
    )
    try:
        with _process(command, ground.folder / "ours.log", ground.cores.gateway) as process:
            contestant = Contestant(Way(OURS, (port,), key), load=ground.load)
            yield await _started(contestant, process, "/readyz", ground.folder / "ours.log")
    finally:
        await controller.stop()


def _fleet(ground: Ground) -> Fleet:
    models = tuple(
        ServedModel(
            name=name,
            max_model_len=8192,
            usd_per_mtok_in=0.1,
            usd_per_mtok_cached=0.02,
            usd_per_mtok_out=0.4,
            max_wait_s=60.0,
        )
        for name in (MODEL, ASLEEP_MODEL)
    )
    ranks = tuple(Rank(index, url) for index, url in enumerate(ground.upstream_urls))
    group = Group(_GROUP, MODEL, "bench", GroupState.READY, ranks=ranks, world_size=len(ranks))
    return Fleet(version=1, models=models, groups=(group,))


@asynccontextmanager
async def bare_relay(ground: Ground) -> AsyncIterator[Contestant]:
    """What a relay costs that does nothing else: no gateway can be faster in this language."""
    (port,) = free_ports(1)
    key = "sk-bare"
    command = (sys.executable, "-m", "benchmarks.gateway_bench.bare_relay", "--port", str(port))
    upstreams = [part for port in ground.upstream_ports for part in ("--upstream", str(port))]
    log = ground.folder / "bare-relay.log"
    with _process((*command, *upstreams, "--key", key), log, ground.cores.gateway) as process:
        contestant = Contestant(Way("bare relay", (port,), key), load=ground.load)
        yield await _started(contestant, process, "/health", log)


@asynccontextmanager
async def vllm_router(ground: Ground, policy: str) -> AsyncIterator[Contestant]:
    port, metrics_port = free_ports(2)
    command = (
        *(_program("rust", "vllm-router"), "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *ground.upstream_urls, "--policy", policy),
        *("--worker-startup-check-interval", "1", "--log-level", "warning"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    )
    async with _peer(ground, "vllm-router", "rust", port, command, label=policy) as contestant:
        yield contestant


@asynccontextmanager
async def sglang_router(ground: Ground, policy: str) -> AsyncIterator[Contestant]:
    port, metrics_port = free_ports(2)
    command = (
        *(_program("rust", "sglang-router"), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *ground.upstream_urls, "--policy", policy),
        *("--worker-startup-check-interval", "1", "--log-level", "warn"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    )
    async with _peer(ground, "sglang-router", "rust", port, command, label=policy) as contestant:
        yield contestant


@asynccontextmanager
async def litellm(ground: Ground) -> AsyncIterator[Contestant]:
    (port,) = free_ports(1)
    key = "sk-bench"
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {
                "model": f"hosted_vllm/{MODEL}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in ground.upstream_urls
    ]
    config = ground.folder / "litellm.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model_list": models,
                "general_settings": {"master_key": key},
                "litellm_settings": {"num_retries": 0, "telemetry": False},
            }
        )
    )
    command = (
        *(_program("litellm", "litellm"), "--config", str(config), "--host", "127.0.0.1"),
        *("--port", str(port), "--num_workers", "1"),
    )
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    async with _peer(ground, "litellm", "litellm", port, command, key, environment) as contestant:
        yield contestant


# Each router by prefixes, as ours does, and in its cheapest way.
PEER_STARTERS: dict[str, Callable[[Ground], AbstractAsyncContextManager[Contestant]]] = {
    "vllm-router, round_robin": partial(vllm_router, policy="round_robin"),
    "vllm-router, cache_aware": partial(vllm_router, policy="cache_aware"),
    "sglang-router, round_robin": partial(sglang_router, policy="round_robin"),
    "sglang-router, cache_aware": partial(sglang_router, policy="cache_aware"),
    "litellm": litellm,
}


def _program(venv: str, name: str) -> str:
    program = PEERS / venv / "bin" / name
    if not program.exists():
        raise CannotRun("not installed; run scripts/install-bench-peers.sh")
    return str(program)


@asynccontextmanager
async def _peer(
    ground: Ground,
    name: str,
    venv: str,
    port: int,
    command: Sequence[str],
    key: str = "",
    environment: dict[str, str] | None = None,
    label: str = "",
) -> AsyncIterator[Contestant]:
    full_name = f"{name}, {label}" if label else name
    log = ground.folder / f"{full_name}.log"
    with _process(command, log, ground.cores.gateway, environment) as process:
        path = "/health/liveliness" if name == "litellm" else "/health"
        version = f"{name} {_version(venv, name)}"
        contestant = Contestant(Way(full_name, (port,), key), version, load=ground.load)
        yield await _started(contestant, process, path, log)


def _version(venv: str, distribution: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    command = (str(PEERS / venv / "bin" / "python"), "-c", script)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


async def _started(
    contestant: Contestant, process: subprocess.Popen[bytes], path: str, log: Path
) -> Contestant:
    """Raises CannotRun when it does not come up or answers wrongly."""

    url = f"http://127.0.0.1:{contestant.way.ports[0]}"
    headers = {"Authorization": f"Bearer {contestant.way.key}"} if contestant.way.key else {}
    async with aiohttp.ClientSession() as http:
        await _until_answers(http, url + path, headers, contestant.name, process, log)
    parent = psutil.Process(process.pid)
    contestant.processes = [parent, *parent.children(recursive=True)]
    return await _probed(contestant)


async def _until_answers(
    http: aiohttp.ClientSession,
    url: str,
    headers: dict[str, str],
    name: str,
    process: subprocess.Popen[bytes],
    log: Path,
) -> None:
    deadline_s = time.monotonic() + _START_S
    last = "no connection"
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise CannotRun(f"ended with {process.returncode}: {_last_line(log)}")
        try:
            async with http.get(url, headers=headers, timeout=_PROBE_TIMEOUT) as answer:
                if answer.status == 200:
                    return
                last = f"status {answer.status}"
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass
        await asyncio.sleep(0.1)
    raise CannotRun(f"{name} was not ready after {_START_S:.0f} s: {last}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:_LOG_CHARACTERS] if lines else "no output"


async def _probed(contestant: Contestant) -> Contestant:
    """Two answers are read in full before any is only counted."""
    way = contestant.way
    url = f"http://127.0.0.1:{way.ports[0]}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {way.key}"} if way.key else {}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}]}
    async with aiohttp.ClientSession(timeout=_ANSWER_TIMEOUT, headers=headers) as http:
        async with http.post(url, json=body) as answer:
            if answer.status != 200:
                raise CannotRun(f"status {answer.status}: {(await answer.text())[:200]}")
            text = (await answer.json())["choices"][0]["message"]["content"]
        _compare(text, WHOLE_TOKENS)
        streamed = {**body, "stream": True, "max_tokens": _PROBE_EVENTS}
        events, text = 0, ""
        async with http.post(url, json=streamed) as answer:
            for event in (await answer.text()).split("\n\n"):
                if not event.startswith("data: "):
                    continue
                events += 1
                if event != "data: [DONE]":
                    for choice in json.loads(event[6:])["choices"]:
                        text += choice["delta"].get("content") or ""
        _compare(text, _PROBE_EVENTS)
    contestant.way = replace(way, beside_text=events - _PROBE_EVENTS)
    return contestant


def _compare(text: str, words: int) -> None:
    # Some strip the last space.
    if text.strip() != "".join(map(word, range(words))).strip():
        raise CannotRun(f"answers with another text: {text[:80]!r}")


@contextmanager
def _process(
    command: Sequence[str], log: Path, core: int, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C reaches this process only, which ends it."""
    own = os.sched_getaffinity(0)
    with log.open("wb") as output:
        # A child inherits the cores before it counts them to size its thread pools.
        os.sched_setaffinity(0, {core})
        try:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, own)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it has started, by their ids."""
    members: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        members = psutil.Process(process.pid).children(recursive=True)
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_S)
    for member in members:
        with contextlib.suppress(psutil.Error):
            member.kill()
