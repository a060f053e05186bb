"""What the gateway adds before a rank without an engine: nothing else is in the way or makes noise.

The gateway is the real process with a real store; controller and rank are the tests' stand-ins.
"""

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from benchmarks.load import Pair, Target, client_session, first_token_pairs
from tests.gateway.fake_controller import FakeController
from tests.integration.running_system import MODEL, REPOSITORY, free_ports

from expertmesh.core.domain.fleet import Fleet, Group, GroupState, Rank, ServedModel
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook

PAIRS = 400
_GROUP = "em-tiny-moe-mock-0"
_START_S = 60.0
_LIMIT_S = 40.0


def measure_gateway_alone() -> list[Pair]:
    with TemporaryDirectory() as folder:
        return asyncio.run(_measure(Path(folder)))


async def _measure(folder: Path) -> list[Pair]:
    token = secrets.token_hex(16)
    store_url = f"sqlite+aiosqlite:///{folder / 'store.db'}"
    key = await _new_key(store_url)
    rank_port, gateway_port = free_ports(2)
    rank = ("tests/mock_rank.py", "--port", str(rank_port), "--prefix", f"/{_GROUP}")
    async with _controller(token, f"http://127.0.0.1:{rank_port}/{_GROUP}") as controller_url:
        gateway = (
            *("-m", "expertmesh", "gateway", "--controller-url", controller_url),
            *("--port", str(gateway_port), "--store", store_url),
        )
        direct = Target(
            "direct", (f"http://127.0.0.1:{rank_port}/{_GROUP}",), {"X-EM-Mesh-Token": token}
        )
        through = Target(
            "gateway",
            (f"http://127.0.0.1:{gateway_port}",),
            {"Authorization": f"Bearer {key}"},
        )
        with (
            _process(folder / "rank.log", *rank, "--mesh-token", token, token=token),
            _process(folder / "gateway.log", *gateway, token=token),
        ):
            async with client_session() as http:
                await _until_answers(http, direct, through)
                await first_token_pairs(http, direct, through, MODEL, 40, _LIMIT_S)
                return await first_token_pairs(http, direct, through, MODEL, PAIRS, _LIMIT_S)


async def _new_key(store_url: str) -> str:
    database = await open_database(store_url)
    try:
        return (await KeyBook(database).create("bench", "bench", time.time())).secret
    finally:
        await database.close()


@asynccontextmanager
async def _controller(token: str, rank_url: str) -> AsyncIterator[str]:
    model = ServedModel(
        name=MODEL,
        max_model_len=4096,
        usd_per_mtok_in=0.1,
        usd_per_mtok_cached=0.02,
        usd_per_mtok_out=0.4,
        max_wait_s=30.0,
    )
    group = Group(_GROUP, MODEL, "mock", GroupState.READY, ranks=(Rank(0, rank_url),))
    controller = FakeController(token)
    controller.fleet = Fleet(version=1, models=(model,), groups=(group,))
    await controller.start()
    try:
        yield controller.url
    finally:
        await controller.stop()


@contextmanager
def _process(log: Path, *arguments: str, token: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "EXPERTMESH_MESH_TOKEN": token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


async def _until_answers(http: aiohttp.ClientSession, *targets: Target) -> None:
    deadline_s = time.monotonic() + _START_S
    for target in targets:
        while not await _answers(http, target):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{target.name}: no answer within {_START_S:.0f} s")
            await asyncio.sleep(0.1)


async def _answers(http: aiohttp.ClientSession, target: Target) -> bool:
    try:
        async with http.get(f"{target.urls[0]}/v1/models", headers=target.headers) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False
