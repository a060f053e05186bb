"""A second group started as Ray Serve does it by default, beside the first, in the same cluster."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import aiohttp
from benchmarks.bench_system import BenchSystem
from benchmarks.load import ask, client_session, question
from benchmarks.process_watch import cpu_by_kind
from benchmarks.ray_logs import start_marks
from benchmarks.starts import ALL_ANSWER, ASKED, FIRST_TOKEN, Start

from expertmesh.clients.ray_serve import Application, RayServeClient
from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.errors import UpstreamUnavailable

BUILDER = "benchmarks.ray_default_group:build"
_REMOVAL_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 240.0
_PUT_TIMEOUT = aiohttp.ClientTimeout(total=120)


def watch_default_start(bench: BenchSystem, first: str, second: str, name: str) -> Start:
    """Takes the place of the group `second`. The controller is halted meanwhile: it would put the
    wanted groups back."""
    with _halted_controller(bench):
        return asyncio.run(_watch(bench, first, second, name))


@contextlib.contextmanager
def _halted_controller(bench: BenchSystem) -> Iterator[None]:
    controller = bench.controller()
    controller.suspend()
    try:
        yield
    finally:
        controller.resume()


@contextlib.asynccontextmanager
async def _serve(bench: BenchSystem) -> AsyncIterator[RayServeClient]:
    async with client_session() as http:
        token = bench.running.state.ray_token()
        yield RayServeClient(http, bench.running.dashboard_url, token, "127.0.0.1")


async def _watch(bench: BenchSystem, first: str, second: str, name: str) -> Start:
    async with _serve(bench) as serve:
        specs = {app.name: app.spec for app in await serve.applications()}
        kept, removed = specs[first], specs[second]
        assert kept is not None and removed is not None
        await serve.put((kept,))
        await _until_gone(serve, second)
        group = replace(removed, name=f"{second}-default")
        before = bench.watch.snapshot()
        asked_at_s = time.time()
        await _put_default(bench, serve, kept, group)
        urls = await _until_answering(bench, serve, group)
        ready_at_s = time.time()
    after = bench.watch.snapshot()
    marks = {
        ASKED: asked_at_s,
        **start_marks(bench.ray_logs, group.name, asked_at_s),
        ALL_ANSWER: ready_at_s,
    }
    headers = {"X-EM-Mesh-Token": bench.running.state.mesh_token()}
    async with client_session() as http:
        answer = await ask(http, urls[0], headers, question(bench.model, 0, 8))
    if answer.first_s is not None:
        marks[FIRST_TOKEN] = answer.sent_at_s + answer.first_s
    return Start(name, marks, cpu_by_kind(before, after, group.name))


async def _until_gone(serve: RayServeClient, name: str) -> None:
    async with asyncio.timeout(_REMOVAL_TIMEOUT_S):
        while True:
            groups = await serve.placement_group_names()
            if not any(group.startswith(f"SERVE_GANG::{name}_") for group in groups):
                return
            await asyncio.sleep(0.5)


async def _put_default(
    bench: BenchSystem, serve: RayServeClient, kept: GroupSpec, group: GroupSpec
) -> None:
    body = serve.deploy_schema((kept, group))
    body["applications"][1]["import_path"] = BUILDER
    headers = {"Authorization": f"Bearer {bench.running.state.ray_token()}"}
    url = f"{bench.running.dashboard_url}/api/serve/applications/"
    async with (
        client_session() as http,
        http.put(url, json=body, headers=headers, timeout=_PUT_TIMEOUT) as answer,
    ):
        answer.raise_for_status()


async def _until_answering(
    bench: BenchSystem, serve: RayServeClient, group: GroupSpec
) -> tuple[str, ...]:
    headers = {"X-EM-Mesh-Token": bench.running.state.mesh_token()}
    async with asyncio.timeout(_START_TIMEOUT_S), client_session() as http:
        while True:
            app = await _application(serve, group.name)
            urls = app.rank_urls if app else ()
            if len(urls) == group.parallelism.data:
                answers = [await _answers(http, url, headers) for url in urls]
                if all(answers):
                    return urls
            if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UpstreamUnavailable(f"Serve says {app.status}: {app.message[:200]}")
            await asyncio.sleep(0.5)


async def _application(serve: RayServeClient, name: str) -> Application | None:
    # The dashboard may be too busy for an answer while four processes import.
    with contextlib.suppress(UpstreamUnavailable):
        return next((app for app in await serve.applications() if app.name == name), None)
    return None


async def _answers(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with http.get(f"{url}/em/info", headers=headers) as answer:
            return answer.status == 200
    return False
