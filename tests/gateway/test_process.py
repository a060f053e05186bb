"""The command as a process of its own, on a real store."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from tests.gateway.fake_controller import FakeController
from tests.gateway.stand import MESH_TOKEN, MODEL, group_of, served_model
from tests.mock_rank import MockRank, started

from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.metering.usage import Outcome
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger

COMMAND = "import typer; from expertmesh.cli.gateway import gateway; typer.run(gateway)"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "one two"}]}
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def launch(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("EXPERTMESH_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        COMMAND,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, "PYTHONPATH": str(ROOT / "platform"), **environment},
    )


@dataclass
class Running:
    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession
    headers: dict[str, str]
    keys: KeyBook
    ledger: Ledger
    key_id: str
    rank: MockRank


@asynccontextmanager
async def gateway_process(folder: Path, rank: MockRank, *arguments: str) -> AsyncIterator[Running]:
    store = f"sqlite+aiosqlite:///{folder}/store.db"
    controller = FakeController(MESH_TOKEN)
    await controller.start()
    database: Database = await open_database(store)
    port = free_port()
    async with started(rank), aiohttp.ClientSession() as http:
        controller.fleet = Fleet(1, (served_model(),), (group_of(rank),))
        key = await KeyBook(database).create("team-a", "test", time.time())
        process = await launch(
            *("--controller-url", controller.url, "--store", store, "--port", str(port)),
            *arguments,
            EXPERTMESH_MESH_TOKEN=MESH_TOKEN,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            await ready(http, url)
            yield Running(
                process,
                url,
                http,
                {"Authorization": f"Bearer {key.secret}"},
                KeyBook(database),
                Ledger(database),
                key.id,
                rank,
            )
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
            await controller.stop()
            await database.close()


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            async with http.get(f"{url}/readyz") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        assert time.monotonic() < deadline_s, "the gateway did not become ready"
        await asyncio.sleep(0.05)


@pytest.mark.integration
async def test_a_stop_finishes_streams_and_writes_the_ledger(tmp_path: Path) -> None:
    rank = MockRank(tokens=30, token_interval_s=0.05, mesh_token=MESH_TOKEN)
    async with gateway_process(tmp_path, rank) as gateway:
        response = await gateway.http.post(
            f"{gateway.url}/v1/chat/completions",
            json={**CHAT, "stream": True},
            headers=gateway.headers,
        )
        await response.content.readany()
        gateway.process.send_signal(signal.SIGTERM)
        rest = await response.text()
        assert rest.endswith("data: [DONE]\n\n")
        out, err = await asyncio.wait_for(gateway.process.communicate(), 10)
        assert gateway.process.returncode == 0
        assert b"Traceback" not in err
        (row,) = await gateway.ledger.usage()
        assert (row.completion_tokens, row.outcome, row.tenant) == (30, Outcome.OK, "team-a")
        (line,) = [json.loads(line) for line in out.splitlines()]
        assert line["usage_id"] == row.request_id


@pytest.mark.integration
async def test_a_stop_that_takes_too_long_tells_the_client(tmp_path: Path) -> None:
    rank = MockRank(tokens=500, token_interval_s=0.05, mesh_token=MESH_TOKEN)
    async with gateway_process(tmp_path, rank, "--drain-timeout-s", "0.5") as gateway:
        asked = {"json": {**CHAT, "stream": True}, "headers": gateway.headers}
        url = f"{gateway.url}/v1/chat/completions"
        response = await gateway.http.post(url, **asked)
        await response.content.readany()
        gateway.process.send_signal(signal.SIGINT)
        rest = await response.text()
        error = json.loads(rest.rstrip().rsplit("data: ", 1)[1])["error"]
        assert "the gateway shuts down" in error["message"]
        _, err = await asyncio.wait_for(gateway.process.communicate(), 10)
        assert gateway.process.returncode == 0
        assert b"Traceback" not in err
        (row,) = await gateway.ledger.usage()
        assert row.outcome is Outcome.ERROR and row.completion_tokens > 0


@pytest.mark.integration
async def test_a_revoked_key_of_the_real_store(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, MockRank(mesh_token=MESH_TOKEN)) as gateway:
        url, headers = f"{gateway.url}/v1/chat/completions", gateway.headers
        async with gateway.http.post(url, json=CHAT, headers=headers) as response:
            assert response.status == 200
        assert await gateway.keys.revoke(gateway.key_id, time.time())
        await asyncio.sleep(1.9)
        async with gateway.http.post(url, json=CHAT, headers=headers) as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "error: EXPERTMESH_MESH_TOKEN: is not set; set it to the mesh token"),
        (("--mesh-token-file", "/nowhere"), {}, "error: --mesh-token-file: /nowhere: cannot"),
        (
            ("--controller-url", "localhost:1"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: --controller-url: 'localhost:1': write it as http://host:port",
        ),
        (
            ("--host", "192.0.2.1"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: --host 192.0.2.1 --port",
        ),
    ],
    ids=["no mesh token", "no token file", "no URL", "foreign address"],
)
async def test_a_start_that_cannot_work_says_why(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    store = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    base = ("--controller-url", "http://127.0.0.1:1", "--store", store)
    process = await launch(*base, *arguments, **environment)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert err.decode().startswith(message)
    assert err.count(b"\n") == 1


async def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process = await launch(
            *("--controller-url", "http://127.0.0.1:1", "--port", port),
            *("--store", f"sqlite+aiosqlite:///{tmp_path}/store.db"),
            EXPERTMESH_MESH_TOKEN="x",
        )
        _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert err.decode() == (
        f"error: --port {port}: is in use on 127.0.0.1; "
        "stop what listens there or take another port\n"
    )
