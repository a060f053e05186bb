"""The controller as a process of its own, with a real store and no Ray: nothing answers there."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from expertmesh.store.database import open_database
from expertmesh.store.journal import Journal

TOKEN = "the mesh token"
COMMAND = "import typer\nfrom expertmesh.cli.controller import controller\ntyper.run(controller)\n"
PLATFORM = """
kind: Platform
name: here
pools:
  - {name: small, market: local, usd_per_node_hour: 0.3, cpus_per_node: 1, nodes: {min: 2, max: 2}}
"""
MODEL = """
kind: ModelDeployment
name: tiny
model: {source: someone/tiny-moe, max_model_len: 1024}
parallelism: {expert: 2}
pools: [small]
scaling: {groups: {min: 1, max: 1}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "platform.yaml").write_text(PLATFORM)
    (tmp_path / "model.yaml").write_text(MODEL)
    return tmp_path


@asynccontextmanager
async def controller(
    folder: Path, port: int, *options: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        COMMAND,
        *("-f", "platform.yaml", "-f", "model.yaml", "--port", str(port)),
        *("--dashboard-url", f"http://127.0.0.1:{free_port()}", *options),
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def text_of(process: asyncio.subprocess.Process) -> str:
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode()


async def listening(http: aiohttp.ClientSession, port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                async with http.get(f"http://127.0.0.1:{port}/healthz") as response:
                    assert response.status == 200
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)


async def test_without_ray_it_listens_says_what_is_wrong_and_stops_in_order(folder: Path) -> None:
    port = free_port()
    async with (
        controller(folder, port, EXPERTMESH_MESH_TOKEN=TOKEN) as process,
        aiohttp.ClientSession() as http,
    ):
        await listening(http, port)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with asyncio.timeout(30):
            failing: dict[str, str] = {}
            while "observe applications" not in failing:
                await asyncio.sleep(0.2)
                url = f"http://127.0.0.1:{port}/readyz"
                async with http.get(url, headers=headers) as response:
                    assert response.status == 503
                    failing = (await response.json())["failing"]
        assert "is the Ray head node running?" in failing["observe applications"]
        async with http.get(f"http://127.0.0.1:{port}/v1/fleet", headers=headers) as response:
            assert response.status == 503
        process.send_signal(signal.SIGTERM)
        text = await text_of(process)
    assert process.returncode == 0, text
    assert "controller stopped; the groups go on running" in text
    assert TOKEN not in text
    assert (folder / ".expertmesh" / "here" / "store.db").is_file()


async def test_a_port_in_use_is_one_line_and_exit_code_2(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with controller(folder, port, EXPERTMESH_MESH_TOKEN=TOKEN) as process:
            text = await text_of(process)
    assert process.returncode == 2
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert lines == [
        f"error: controller.port: {port} on 127.0.0.1 is in use; stop the process that listens "
        "there, or choose another port with --port"
    ]
    assert "Traceback" not in text


async def test_without_a_mesh_token_it_does_not_start(folder: Path) -> None:
    async with controller(folder, free_port()) as process:
        text = await text_of(process)
    assert process.returncode == 2
    assert text.startswith("error: EXPERTMESH_MESH_TOKEN: not set; ")
    assert len(text.splitlines()) == 1


async def test_tokens_may_come_from_files(folder: Path) -> None:
    (folder / "token").write_text(f"{TOKEN}\n")
    port = free_port()
    async with (
        controller(folder, port, EXPERTMESH_MESH_TOKEN_PATH=str(folder / "token")),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http,
    ):
        await listening(http, port)
        async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
            assert response.status == 200


async def test_a_token_file_that_is_missing_is_named(folder: Path) -> None:
    path = str(folder / "nowhere")
    async with controller(folder, free_port(), EXPERTMESH_MESH_TOKEN_PATH=path) as process:
        text = await text_of(process)
    assert process.returncode == 2
    assert f"EXPERTMESH_MESH_TOKEN_PATH: {path}: cannot be read" in text


async def test_a_bad_manifest_is_refused_before_anything_starts(folder: Path) -> None:
    (folder / "model.yaml").write_text(MODEL.replace("pools: [small]", "pools: [smal]"))
    async with controller(folder, free_port(), EXPERTMESH_MESH_TOKEN=TOKEN) as process:
        text = await text_of(process)
    assert process.returncode == 2
    assert "model.yaml: pools.0: 'smal': no such pool" in text
    assert not (folder / ".expertmesh").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--lease", "kubernetes"),
            "error: --lease kubernetes: this is no pod of Kubernetes with a service account; ",
        ),
        (
            ("--ray-cluster", "em"),
            "error: --ray-cluster: this is no pod of Kubernetes with a service account; ",
        ),
        (
            ("--lease", "kubernetes", "--kubeconfig", "nowhere"),
            "error: kubeconfig: nowhere: ",
        ),
        (
            ("--spot-notices", "somewhere"),
            "error: --spot-notices: 'somewhere': write kubernetes, file:PATH or ",
        ),
        (("--spot-notices", "file:"), "error: --spot-notices: 'file:': write kubernetes, "),
        (("--advertise", "here:1"), "error: --advertise: 'here:1': write it as http://host:port"),
    ],
)
async def test_options_that_cannot_work_are_one_line_and_exit_code_2(
    folder: Path, options: tuple[str, ...], said: str
) -> None:
    async with controller(folder, free_port(), *options, EXPERTMESH_MESH_TOKEN=TOKEN) as process:
        text = await text_of(process)
    assert process.returncode == 2
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert "Traceback" not in text


async def test_one_that_is_alone_needs_no_lease(folder: Path) -> None:
    port = free_port()
    async with (
        controller(folder, port, "--lease", "none", EXPERTMESH_MESH_TOKEN=TOKEN) as process,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http,
    ):
        await listening(http, port)
        async with asyncio.timeout(10):
            text = ""
            while "em_controller_leads 1.0" not in text:
                async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
                    text = await response.text()
                await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        await text_of(process)
    assert process.returncode == 0


async def test_old_decisions_are_forgotten(folder: Path) -> None:
    port, now_s = free_port(), time.time()
    store = f"sqlite+aiosqlite:///{folder / 'store.db'}"
    database = await open_database(store)
    try:
        journal = Journal(database)
        for age_s in (9000.0, 8000.0, 10.0):
            await journal.append(now_s - age_s, "note", None, {"age_s": age_s})
        options = ("--store", store, "--keep-decisions", "1h")
        async with (
            controller(folder, port, *options, EXPERTMESH_MESH_TOKEN=TOKEN) as process,
            asyncio.timeout(30),
        ):
            ages_s: list[float] = []
            while ages_s != [10.0]:
                await asyncio.sleep(0.2)
                ages_s = await _ages_s(journal)
            process.send_signal(signal.SIGTERM)
            await text_of(process)
        assert process.returncode == 0
    finally:
        await database.close()


async def _ages_s(journal: Journal) -> list[float]:
    entries = await journal.read(limit=1000)
    return [entry.payload["age_s"] for entry in entries if entry.kind == "note"]


async def test_a_duration_that_is_none_is_refused(folder: Path) -> None:
    options = ("--keep-decisions", "long")
    async with controller(folder, free_port(), *options, EXPERTMESH_MESH_TOKEN=TOKEN) as process:
        text = await text_of(process)
    assert process.returncode == 2
    assert "'long': write a number and s, m, h, d or w" in " ".join(text.split())
