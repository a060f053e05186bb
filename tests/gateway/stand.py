"""A whole gateway on a loopback port, before mock ranks and a fake controller."""

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry
from tests.gateway.fake_controller import FakeController
from tests.gateway.memory_store import MemoryKeys, MemoryLedger
from tests.mock_rank import MockRank

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.fleet import Fleet, Group, GroupLoad, GroupState, Rank, ServedModel
from expertmesh.core.metering.usage import UsageRecord
from expertmesh.core.routing.router import RoutingConfig
from expertmesh.gateway.access_log import AccessLog
from expertmesh.gateway.asgi_bridge import AsgiApp
from expertmesh.gateway.auth import KeySource
from expertmesh.gateway.limiter import Limiter, LocalLimiter
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.service import GatewayService, Parts, Worker, running
from expertmesh.gateway.usage_journal import UsageJournal
from expertmesh.gateway.usage_writer import UsageLedger, UsageWriter
from expertmesh.telemetry.traces import Tracing

MESH_TOKEN = "mesh-secret"
SECRET = "sk-em-" + "a" * 43
MODEL = "tiny-moe"
QUICK = GatewayLimits(
    connect_timeout_s=10.0,
    exchange_period_s=0.05,
    keys_period_s=0.05,
    ledger_period_s=0.05,
    lost_grace_s=0.2,
    drain_timeout_s=2.0,
    flush_timeout_s=2.0,
)


def served_model(
    name: str = MODEL, max_wait_s: float = 0.0, aliases: tuple[str, ...] = ()
) -> ServedModel:
    return ServedModel(
        name=name,
        max_model_len=4096,
        usd_per_mtok_in=0.2,
        usd_per_mtok_cached=0.05,
        usd_per_mtok_out=0.6,
        max_wait_s=max_wait_s,
        aliases=aliases,
    )


def group_of(*ranks: MockRank, state: GroupState = GroupState.READY, **changes: Any) -> Group:
    return Group(
        name=ranks[0].group,
        model=ranks[0].model,
        pool="pool-a",
        state=state,
        ranks=tuple(Rank(index, rank.base_url) for index, rank in enumerate(ranks)),
        world_size=len(ranks),
        **changes,
    )


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the awaited condition did not come"
        await asyncio.sleep(0.005)


@dataclass
class Stand:
    url: str
    http: aiohttp.ClientSession
    service: GatewayService
    controller: FakeController
    keys: MemoryKeys
    ledger: MemoryLedger
    registry: CollectorRegistry
    access_log: Path
    _stack: AsyncExitStack
    _models: tuple[ServedModel, ...] = field(default=(served_model(),))

    async def rank(self, group: str = "em-tiny-moe-pool-a-0", **options: Any) -> MockRank:
        rank = MockRank(
            **{"group": group, "mesh_token": MESH_TOKEN, "prefix": f"/{group}", **options}
        )
        await rank.start()
        self._stack.push_async_callback(rank.stop)
        return rank

    async def key(self, tenant: str, **fields: Any) -> str:
        """The secret of a new key, once the gateway knows it; `fields` as those of Caller."""
        secret = f"sk-em-{len(self.keys.keys):043d}"
        caller = self.keys.add(secret, tenant, **fields)
        await until(lambda: self.service.ring.find(secret.encode(), 0.0) == caller)
        return secret

    async def show(
        self,
        *groups: Group,
        models: tuple[ServedModel, ...] | None = None,
        loads: dict[str, GroupLoad] | None = None,
    ) -> None:
        """Make this the fleet, and wait until the gateway has it."""
        if models is not None:
            self._models = models
        fleet = Fleet(self.controller.fleet.version + 1, self._models, groups, loads or {})
        self.controller.fleet = fleet
        await until(lambda: self.service.view.fleet == fleet)

    async def rows(self, count: int = 1) -> list[UsageRecord]:
        await until(lambda: len(self.ledger.rows) >= count)
        await asyncio.sleep(0.1)
        assert len(self.ledger.rows) == count
        return list(self.ledger.rows.values())

    def log_lines(self) -> list[dict[str, Any]]:
        """Those of the access log that are written by now."""
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]

    def post(self, path: str, json: Any, secret: str = SECRET, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {secret}", **options.pop("headers", {})}
        return self.http.post(self.url + path, json=json, headers=headers, **options)

    def count(self, metric: str, **labels: str) -> float:
        """Summed over the labels that are not named."""
        wanted = labels.items()
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == metric and wanted <= sample.labels.items()
        )


@asynccontextmanager
async def standing(
    limits: GatewayLimits = QUICK,
    slots: SlotRules | None = None,
    book: LimitBook | None = None,
    environment: Mapping[str, str] | None = None,
    cors_origins: tuple[str, ...] = (),
    tracing: Tracing | None = None,
    routing: RoutingConfig | None = None,
    fleet: Fleet | None = None,
    limiter: Limiter | None = None,
    keys: KeySource | None = None,
    ledger: UsageLedger | None = None,
    admin: AsgiApp | None = None,
) -> AsyncIterator[Stand]:
    """`fleet` is there from the start. `keys` and `ledger` take the place of those in memory."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setblocking(False)
    port = listener.getsockname()[1]
    controller, memory_keys, memory_ledger = (
        FakeController(MESH_TOKEN),
        MemoryKeys(),
        MemoryLedger(),
    )
    if fleet is not None:
        controller.fleet = fleet
    memory_keys.add(SECRET, "team-a")
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stand-")))
        await controller.start()
        stack.push_async_callback(controller.stop)
        worker = Worker(
            "test-1",
            controller.url,
            MESH_TOKEN,
            limits,
            routing=routing or RoutingConfig(),
            slots=slots or SlotRules(),
            cors_origins=cors_origins,
        )
        log = stack.enter_context((folder / "access.log").open("wb"))
        journal = UsageJournal.open(folder / "usage", worker.name)
        parts = Parts(
            keys=keys or memory_keys,
            limiter=limiter or LocalLimiter(book or LimitBook()),
            writer=UsageWriter(ledger or memory_ledger, journal, limits.ledger_period_s),
            metrics=GatewayMetrics(registry),
            access_log=AccessLog(log.fileno()),
            tracing=tracing or Tracing(),
            admin=admin or echo_admin,
            environment=environment or {},
        )
        service = await stack.enter_async_context(running(worker, parts))
        await service.listen(listener)

        async def stop() -> None:
            service.drain()
            await service.finish(asyncio.Event())

        stack.push_async_callback(stop)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stand = Stand(
            f"http://127.0.0.1:{port}",
            http,
            service,
            controller,
            memory_keys,
            memory_ledger,
            registry,
            folder / "access.log",
            stack,
        )
        await until(lambda: service.ring.loaded)
        yield stand


async def echo_admin(scope: Any, receive: Any, send: Any) -> None:
    """Stands in for the admin API: says who asks for what."""
    message = await receive()
    body = f"{scope['state']['caller'].key_id} {scope['method']} {scope['path']} ".encode()
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body + message["body"]})
