"""What metrics and traces cost the gateway, and how long a scrape takes.

`python -m benchmarks.telemetry_overhead [--scrape]`. Three real gateways take turns before one
stand-in rank: one whose counts do nothing, one as it is, one that also sends traces to a collector
that throws them away. What counts is the processor time of a request, which others on the machine
do not change; requests a second of a busy core are its inverse.
"""

import argparse
import asyncio
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import aiohttp
import psutil
from benchmarks.gateway_alone import _controller, _new_key, _until_answers
from benchmarks.load import Target
from prometheus_client import CollectorRegistry
from tests.integration.running_system import MODEL, REPOSITORY, free_ports

from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.core.domain.fleet import RankInfo
from expertmesh.gateway.metrics import GatewayMetrics

ROUNDS = 6
ROUND_S = 2.5
AT_ONCE = 16
MODELS, TENANTS, GROUPS, RANKS, EXPERTS, LAYERS = 50, 200, 100, 8, 128, 60
_GROUP = "em-tiny-moe-mock-0"
_SILENT = "--silent-gateway"


@dataclass(slots=True)
class Gateway:
    name: str
    url: str
    process: psutil.Process
    cpu_s: float = 0.0
    requests: int = 0

    @property
    def us_per_request(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.requests)


def main() -> None:
    if _SILENT in sys.argv:
        _run_silent([each for each in sys.argv[1:] if each != _SILENT])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scrape", action="store_true", help="only the time of scrapes")
    parser.add_argument("--ratio", type=float, default=1.0, help="share of requests traced")
    options = parser.parse_args()
    if not options.scrape:
        with TemporaryDirectory() as folder:
            _show(asyncio.run(_measure(Path(folder), options.ratio)), options.ratio)
    _scrapes()


def _show(gateways: Sequence[Gateway], ratio: float) -> None:
    bare = gateways[0].us_per_request
    sys.stdout.write(f"processor time of a request, {ratio:.0%} of them traced where any are\n")
    for gateway in gateways:
        share = bare / gateway.us_per_request
        sys.stdout.write(
            f"  {gateway.name:20} {gateway.us_per_request:7.1f} us"
            f"   {share:6.1%} of the requests/s without   ({gateway.requests} requests)\n"
        )


async def _measure(folder: Path, ratio: float) -> list[Gateway]:
    token = secrets.token_hex(16)
    store_url = f"sqlite+aiosqlite:///{folder / 'store.db'}"
    key = await _new_key(store_url)
    rank_port, *ports = free_ports(4)
    rank = ("tests/mock_rank.py", "--port", str(rank_port), "--prefix", f"/{_GROUP}")
    found: list[Gateway] = []
    async with _controller(token, f"http://127.0.0.1:{rank_port}/{_GROUP}") as controller_url:
        with ExitStack() as stack:
            traces = stack.enter_context(_collector())
            stack.enter_context(_process(folder, token, {}, *rank, "--mesh-token", token))
            for name, port in zip(("neither", "metrics", "metrics and traces"), ports, strict=True):
                silent = ("-m", "benchmarks.telemetry_overhead", _SILENT)
                program = silent if name == "neither" else ("-m", "expertmesh")
                environment = {}
                if name == "metrics and traces":
                    environment = {
                        "OTEL_EXPORTER_OTLP_ENDPOINT": traces,
                        "OTEL_TRACES_SAMPLER_ARG": str(ratio),
                    }
                pid = stack.enter_context(
                    _process(
                        folder,
                        token,
                        environment,
                        *(*program, "gateway", "--controller-url", controller_url),
                        *("--port", str(port), "--store", store_url),
                    )
                )
                url = f"http://127.0.0.1:{port}"
                found.append(Gateway(name, url, psutil.Process(pid)))
            headers = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession() as http:
                targets = [Target(each.name, (each.url,), headers) for each in found]
                await _until_answers(http, *targets)
                for number in range(ROUNDS + 1):
                    for gateway in random.sample(found, len(found)):
                        await _round(http, gateway, headers, counts=number > 0)
    return found


async def _round(
    http: aiohttp.ClientSession, gateway: Gateway, headers: dict[str, str], counts: bool
) -> None:
    until_s = time.monotonic() + ROUND_S
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "fox"}]}
    done = 0

    async def ask() -> None:
        nonlocal done
        while time.monotonic() < until_s:
            url = f"{gateway.url}/v1/chat/completions"
            async with http.post(url, json=body, headers=headers) as answer:
                await answer.read()
                answer.raise_for_status()
                done += 1

    before_s = _cpu_s(gateway.process)
    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    if counts:
        gateway.cpu_s += _cpu_s(gateway.process) - before_s
        gateway.requests += done


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _run_silent(arguments: list[str]) -> None:
    """A gateway that is asked to count and does not."""
    from expertmesh.cli.main import main as expertmesh
    from expertmesh.gateway.settlement import Settlement
    from expertmesh.telemetry import tally

    def nothing(*_: object) -> None:
        pass

    for name in ("answered", "judged", "waited", "rejected", "refused", "aborted"):
        setattr(GatewayMetrics, name, nothing)
    tally.HistogramChild.observe = nothing  # type: ignore[assignment,method-assign]
    Settlement._judge = nothing  # type: ignore[assignment,method-assign]
    sys.argv = ["expertmesh", *arguments]
    expertmesh()


@contextmanager
def _process(
    folder: Path, token: str, environment: dict[str, str], *arguments: str
) -> Iterator[int]:
    log = folder / f"{secrets.token_hex(4)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "EXPERTMESH_MESH_TOKEN": token, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextmanager
def _collector() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def _scrapes() -> None:
    sys.stdout.write(
        f"a scrape of {MODELS} models, {TENANTS} tenants, {GROUPS} groups of {RANKS} ranks with "
        f"{EXPERTS} experts and {LAYERS} layers\n"
    )
    for name, ask in (("gateway", _gateway_text()), ("controller", _controller_text())):
        times_s, text = [], b""
        for _ in range(5):
            began_s = time.perf_counter()
            text = ask()
            times_s.append(time.perf_counter() - began_s)
        lines = text.count(b"\n")
        shown = f"first {1000 * times_s[0]:.0f} ms, then {1000 * min(times_s[1:]):.0f} ms"
        sys.stdout.write(f"  {name:20} {shown}, {lines} lines, {len(text) / 1e6:.1f} MB\n")


def _gateway_text() -> Callable[[], bytes]:
    metrics = GatewayMetrics(CollectorRegistry())
    chance = random.Random(7)
    for number in range(MODELS):
        model = f"model-{number}"
        for pool in ("on-demand", "spot"):
            served = metrics.served(model, pool)
            for histogram in (served.ttft, served.tpot, served.duration):
                for _ in range(30):
                    histogram.observe(chance.uniform(0, 3), "ab" * 16)
        for status in (200, 400, 429, 499, 503):
            for endpoint in ("chat_completions", "messages"):
                metrics.answered(model, endpoint, status)
        for result in ("met", "slow_start", "slow_tokens", "failed"):
            metrics.judged(model, result)
        for priority in ("interactive", "batch"):
            metrics.waited(model, priority, 0.3)
    for number in range(TENANTS):
        metrics.tenant(f"tenant-{number}").requests.inc()
    for number in range(GROUPS):
        labels = (f"model-{number % MODELS}", f"em-model-{number % MODELS}-spot-{number}", "spot")
        metrics.in_flight.labels(*labels).set(3)
    accept = b"application/openmetrics-text;version=1.0.0"
    return lambda: metrics.exposition(accept)[1]


def _controller_text() -> Callable[[], bytes]:
    metrics = ControllerMetrics()
    share = EXPERTS // RANKS
    pools = {f"em-model-{group % MODELS}-spot-{group}": "spot" for group in range(GROUPS)}
    ranks = (
        RankInfo(
            f"em-model-{group % MODELS}-spot-{group}",
            f"model-{group % MODELS}",
            rank,
            RANKS,
            1,
            1,
            0.5,
            expert_tokens={str(rank * share + each): 1000 for each in range(share)},
            layers={str(layer): (10, 100, share) for layer in range(LAYERS)},
        )
        for group in range(GROUPS)
        for rank in range(RANKS)
    )
    metrics.saw_ranks(ranks, pools)
    return metrics.text


if __name__ == "__main__":
    main()
