"""Gateways as processes of their own, before a mock rank and a fake controller, on a real store."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.gateway.fake_controller import FakeController
from tests.gateway.stand import MESH_TOKEN, MODEL, group_of, served_model
from tests.mock_rank import MockRank, started

from expertmesh.core.domain.fleet import Fleet, Group
from expertmesh.core.domain.tenant import Limits, Tenant
from expertmesh.core.metering.usage import UsageRecord
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, NewKey
from expertmesh.store.ledger import Ledger
from expertmesh.store.tenants import TenantBook

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
_COMMAND = "import typer; from expertmesh.cli.gateway import gateway; typer.run(gateway)"
_PROMPTS = 32


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def until(condition: Callable[[], Awaitable[object] | object], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        met = condition()
        if await met if isinstance(met, Awaitable) else met:
            return
        assert time.monotonic() < deadline_s, "the awaited condition did not come"
        await asyncio.sleep(0.02)


async def until_above(count: Callable[[], int], bound: int, timeout_s: float = 30) -> None:
    await until(lambda: count() > bound, timeout_s)


def write_platform(file: Path, **gateway: Any) -> Path:
    """A platform file with this part `gateway`."""
    pool = {"name": "pool-a", "market": "local", "usd_per_node_hour": 0.1}
    platform: dict[str, Any] = {"kind": "Platform", "name": "test", "pools": [pool]}
    file.write_text(yaml.safe_dump({**platform, "gateway": {"port": 8080, **gateway}}))
    return file


async def launch(
    *arguments: str,
    stdout: Any = asyncio.subprocess.PIPE,
    stderr: Any = asyncio.subprocess.PIPE,
    **environment: str,
) -> asyncio.subprocess.Process:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("EXPERTMESH_")}
    return await asyncio.create_subprocess_exec(
        # The kernel stops it when the test run is killed.
        *("setpriv", "--pdeathsig", "KILL", sys.executable, "-c", _COMMAND),
        *arguments,
        stdout=stdout,
        stderr=stderr,
        env={**inherited, "PYTHONPATH": str(ROOT / "platform"), **environment},
        start_new_session=True,
    )


@dataclass(frozen=True, slots=True)
class Got:
    """What a client saw of an answer."""

    status: int
    """0: no connection was made."""
    whole: bool = False
    tokens: int = 0
    """Of a stream, as far as it came."""
    counted: tuple[int, int] | None = None
    """Prompt and completion tokens, as the answer's usage says."""
    headers: dict[str, str] = field(default_factory=dict)


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    key: NewKey,
    number: int = 0,
    stream: bool = False,
    **headers: str,
) -> Got:
    """No two numbers below 32 * 4000 have the same token counts."""
    words, tokens = divmod(number, _PROMPTS)
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a " * words + "a"}],
        "max_tokens": tokens + 1,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {key.secret}", **headers}
    status, seen, usage = 0, 0, None
    shown: dict[str, str] = {}
    try:
        async with http.post(url + CHAT, json=body, headers=headers) as response:
            status = response.status
            shown = {name.lower(): value for name, value in response.headers.items()}
            if not stream or status != 200:
                answer = await response.json()
                usage = answer.get("usage")
                return Got(status, True, 0, _counted(usage), shown)
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    return Got(status, True, seen, _counted(usage), shown)
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        break
                    usage = event.get("usage") or usage
                    seen += bool(event["choices"] and event["choices"][0]["delta"].get("content"))
    except aiohttp.ClientConnectorError:
        pass
    except (aiohttp.ClientError, ConnectionError):
        return Got(status or -1, False, seen, None, shown)
    return Got(status, False, seen, None, shown)


def _counted(usage: dict[str, int] | None) -> tuple[int, int] | None:
    return None if usage is None else (usage["prompt_tokens"], usage["completion_tokens"])


@dataclass
class GatewayProcess:
    process: asyncio.subprocess.Process
    url: str
    access_log: Path
    error_log: Path

    @property
    def errors(self) -> str:
        return self.error_log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def stop(self, timeout_s: float = 20) -> int:
        self.signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def kill_all(self) -> None:
        """With its workers, in no order."""
        family = self.children()
        pids = [self.process.pid, *(one.pid for one in family)]
        for pid in random.sample(pids, len(pids)):
            os.kill(pid, signal.SIGKILL)
        await self.process.wait()
        await until(lambda: not any(one.is_running() for one in family))


@dataclass
class Site:
    folder: Path
    store: str
    rank: MockRank
    controller: FakeController
    database: Database
    http: aiohttp.ClientSession
    """Keeps connections."""
    spread: aiohttp.ClientSession
    """Makes a connection for each request, which any worker may get."""
    _stack: AsyncExitStack
    _started: int = 0

    def __post_init__(self) -> None:
        self.keys = KeyBook(self.database)
        self.ledger = Ledger(self.database)
        self.state = self.folder / "state"

    async def key(self, tenant: str = "team-a", limits: Limits | None = None) -> NewKey:
        """Limits are the tenant's."""
        if limits is not None:
            await TenantBook(self.database).put(Tenant(tenant, limits=limits), time.time())
        return await self.keys.create(tenant, "test", time.time())

    def arguments(self, port: int, state: Path | None = None) -> tuple[str, ...]:
        return (
            *("--controller-url", self.controller.url, "--store", self.store),
            *("--port", str(port), "--state-dir", str(state or self.state)),
        )

    async def start(
        self,
        *arguments: str,
        port: int | None = None,
        state: Path | None = None,
        stdout: Any = None,
        **environment: str,
    ) -> GatewayProcess:
        """Returns when it is ready."""
        port = port or free_port()
        self._started += 1
        access_log = self.folder / f"access-{self._started}.log"
        error_log = self.folder / f"errors-{self._started}.log"
        with access_log.open("wb") as out, error_log.open("wb") as err:
            process = await launch(
                *self.arguments(port, state),
                *arguments,
                stdout=out if stdout is None else stdout,
                stderr=err,
                EXPERTMESH_MESH_TOKEN=MESH_TOKEN,
                **environment,
            )
        self._stack.push_async_callback(_end, process)
        gateway = GatewayProcess(process, f"http://127.0.0.1:{port}", access_log, error_log)
        await self.ready(gateway)
        return gateway

    async def show(self, *groups: Group, max_wait_s: float = 0.0) -> None:
        """Make this the fleet, and wait until the gateway that reported last has it."""
        version = self.controller.fleet.version + 1
        self.controller.fleet = Fleet(version, (served_model(max_wait_s=max_wait_s),), groups)
        await until(lambda: self.controller.last.fleet_version == version)

    async def ready(self, gateway: GatewayProcess) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                async with self.spread.get(f"{gateway.url}/readyz") as response:
                    if response.status == 200:
                        return
            assert gateway.process.returncode is None, gateway.errors
            assert time.monotonic() < deadline_s, f"not ready: {gateway.errors}"
            await asyncio.sleep(0.02)

    async def metric(self, gateway: GatewayProcess, name: str, **labels: str) -> float:
        """As one of the workers tells, summed over the labels that are not named."""
        headers = {"Authorization": f"Bearer {MESH_TOKEN}"}
        async with self.spread.get(f"{gateway.url}/metrics", headers=headers) as response:
            assert response.status == 200
            text = await response.text()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def rows(self, count: int, tenant: str | None = None) -> list[UsageRecord]:
        """Of the ledger, when there are so many."""

        async def of_tenant() -> list[UsageRecord]:
            rows = await self.ledger.usage()
            return [row for row in rows if tenant in (None, row.tenant)]

        async def are_there() -> bool:
            return len(await of_tenant()) >= count

        await until(are_there)
        rows = await of_tenant()
        assert len(rows) == count
        return rows

    def served(self) -> dict[int, int]:
        """Requests by the process of the worker, as the workers' reports tell."""
        return {
            int(report.gateway.split("-")[-2]): sum(
                group.requests_total for group in report.groups.values()
            )
            for report in self.controller.reports
        }


async def _end(process: asyncio.subprocess.Process) -> None:
    """With all that it has started, also when it is gone itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@asynccontextmanager
async def site(
    folder: Path, rank: MockRank | None = None, store: str | None = None
) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        rank = await stack.enter_async_context(started(rank or MockRank(mesh_token=MESH_TOKEN)))
        controller = FakeController(MESH_TOKEN)
        await controller.start()
        stack.push_async_callback(controller.stop)
        controller.fleet = Fleet(1, (served_model(),), (group_of(rank),))
        store = store or f"sqlite+aiosqlite:///{folder}/store.db"
        database = await open_database(store)
        stack.push_async_callback(database.close)
        keeping, closing = (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=force_close),
                timeout=aiohttp.ClientTimeout(30),
            )
            for force_close in (False, True)
        )
        for session in (keeping, closing):
            await stack.enter_async_context(session)
        yield Site(folder, store, rank, controller, database, keeping, closing, stack)
