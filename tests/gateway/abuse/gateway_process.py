"""The gateway as a process of its own, before ranks that the caller has started."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tests.gateway.abuse.bounded_gateway import Settings
from tests.gateway.fake_controller import FakeController
from tests.gateway.stand import MESH_TOKEN, MODEL, served_model

from expertmesh.core.domain.fleet import Fleet, Group, GroupLoad, GroupState, Rank
from expertmesh.core.domain.tenant import Limits
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook

ROOT = Path(__file__).parents[3]
ALIAS = "tiny-alias"
ASLEEP = "tiny-asleep"
"""In the fleet, without a group: requests for it wait."""
GROUP = "em-tiny-moe-pool-a-0"
_ROOM = 100_000
_SPARE_FILES = 4
"""The usage journal and the store open and close some."""
_START_S = 60.0
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What the gateway holds now, by its own metrics and by the kernel."""

    open_requests: int
    in_flight: int
    queued: int
    idle_to_ranks: int
    usage_pending: int
    clients: int
    """Their connections."""
    files: int
    rss_bytes: int

    @property
    def own_files(self) -> int:
        """Without connections; those to ranks stay open for the next request."""
        return self.files - self.idle_to_ranks - self.clients


@dataclass(slots=True)
class GatewayProcess:
    port: int
    process: psutil.Process
    secret: str
    key_id: str
    database: Database
    controller: FakeController
    folder: Path

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def journal_bytes(self) -> int:
        """On disk, of all segments."""
        files = (self.state_dir / "usage").rglob("*.usage1")
        return sum(file.stat().st_blocks * 512 for file in files)

    def complaints(self) -> list[str]:
        """What the gateway's log says of faults."""
        lines = (self.folder / "gateway.err").read_text(errors="replace").splitlines()
        marks = (" ERROR ", "Traceback", "Fatal error", "never retrieved")
        return [line for line in lines if any(mark in line for mark in marks)]

    def head(self, path: str, length: int, secret: str | None = None, more: str = "") -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Authorization: Bearer {secret or self.secret}\r\n"
            f"Content-Type: application/json\r\n{more}Content-Length: {length}\r\n\r\n"
        ).encode()

    async def get(self, path: str, secret: str) -> tuple[int, bytes]:
        """Status and body, over a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        try:
            answer = await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body

    async def counts(self) -> Counts:
        status, text = await self.get("/metrics", MESH_TOKEN)
        assert status == 200, text
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                name = sample.name
                if name == "em_gateway_upstream_connections":
                    name = f"{name} {sample.labels['state']}"
                sums[name] = sums.get(name, 0.0) + sample.value
        clients = sum(
            connection.laddr.port == self.port and connection.status != psutil.CONN_LISTEN
            for connection in self.process.net_connections("tcp4")
        )
        return Counts(
            open_requests=int(sums["em_gateway_open_requests"]),
            in_flight=int(sums.get("em_gateway_in_flight_requests", 0)),
            queued=int(sums.get("em_gateway_queued_requests", 0)),
            idle_to_ranks=int(sums["em_gateway_upstream_connections idle"]),
            usage_pending=int(sums["em_gateway_usage_pending_records"]),
            clients=clients,
            files=self.process.num_fds(),
            rss_bytes=self.process.memory_info().rss,
        )

    async def at_rest(self, timeout_s: float = 10.0) -> Counts:
        """As soon as nothing is under way. Fails when that does not come."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            counts = await self.counts()
            busy = counts.open_requests + counts.in_flight + counts.queued + counts.usage_pending
            if not busy:
                return counts
            assert time.monotonic() < deadline_s, counts
            await asyncio.sleep(0.1)

    async def left(self, before: Counts, timeout_s: float = 10.0) -> Counts:
        """When no client is connected any more. Fails when one stays, or when files stay open."""
        deadline_s = time.monotonic() + timeout_s
        while (counts := await self.counts()).clients:
            assert time.monotonic() < deadline_s, counts
            await asyncio.sleep(0.1)
        assert counts.own_files <= before.own_files + _SPARE_FILES, (before, counts)
        return counts


@asynccontextmanager
async def gateway_process(
    folder: Path,
    rank_urls: Sequence[str],
    *,
    bounds: Mapping[str, float] | None = None,
    send_buffer_bytes: int | None = None,
    key_limits: Limits | None = None,
    max_wait_s: float = 30.0,
) -> AsyncIterator[GatewayProcess]:
    """The command itself, or with `bounds` (fields of GatewayLimits) what it runs, so bounded."""
    store_url = f"sqlite+aiosqlite:///{folder}/store.db"
    controller = FakeController(MESH_TOKEN)
    controller.fleet = _fleet(rank_urls, max_wait_s)
    await controller.start()
    database = await open_database(store_url)
    key = await KeyBook(database).create(
        "team-a", "test", time.time(), limits=key_limits or Limits()
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    state_dir = folder / "state"
    command: tuple[str, ...]
    if bounds is None:
        command = (
            *("-m", "expertmesh", "gateway", "--host", "127.0.0.1", "--port", str(port)),
            *("--controller-url", controller.url, "--store", store_url),
            *("--state-dir", str(state_dir), "--drain-timeout-s", "2"),
        )
    else:
        settings = Settings(
            port,
            controller.url,
            store_url,
            str(state_dir),
            {"drain_timeout_s": 2.0, **bounds},
            send_buffer_bytes,
        )
        text = msgspec.json.encode(settings).decode()
        command = ("-m", "tests.gateway.abuse.bounded_gateway", text)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("EXPERTMESH_")}
    with (folder / "gateway.out").open("wb") as out, (folder / "gateway.err").open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={
                **inherited,
                "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
                "EXPERTMESH_MESH_TOKEN": MESH_TOKEN,
            },
        )
    gateway = GatewayProcess(
        port, psutil.Process(process.pid), key.secret, key.id, database, controller, folder
    )
    try:
        await _ready(gateway, process)
        yield gateway
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        await controller.stop()
        await database.close()


def _fleet(rank_urls: Sequence[str], max_wait_s: float) -> Fleet:
    ranks = tuple(Rank(index, url) for index, url in enumerate(rank_urls))
    group = Group(GROUP, MODEL, "pool-a", GroupState.READY, ranks=ranks, world_size=len(ranks))
    model = replace(served_model(max_wait_s=max_wait_s), aliases=(ALIAS,))
    asleep = served_model(ASLEEP, max_wait_s)
    return Fleet(1, (model, asleep), (group,), {GROUP: GroupLoad(max_running=_ROOM)})


async def _ready(gateway: GatewayProcess, process: asyncio.subprocess.Process) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        if process.returncode is not None:
            text = (gateway.folder / "gateway.err").read_text(errors="replace")
            raise AssertionError(f"the gateway ended with {process.returncode}: {text[-2000:]}")
        try:
            status, body = await gateway.get("/readyz", "")
        except OSError:
            status, body = 0, b"no connection"
        if status == 200:
            return
        assert time.monotonic() < deadline_s, body
        await asyncio.sleep(0.05)
