"""A whole gateway on a loopback port, before mock ranks and a fake controller."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry
from tests.gateway.fake_controller import FakeController
from tests.gateway.memory_store import MemoryKeys, MemoryLedger
from tests.mock_rank import MockRank

from expertmesh.core.domain.fleet import Fleet, Group, GroupState, Rank, ServedModel
from expertmesh.core.metering.usage import UsageRecord
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.server import GatewayServer
from expertmesh.gateway.service import GatewayService, Worker, running

MESH_TOKEN = "mesh-secret"
SECRET = "sk-em-" + "a" * 43
MODEL = "tiny-moe"
QUICK = GatewayLimits(
    exchange_period_s=0.05,
    keys_period_s=0.05,
    ledger_period_s=0.05,
    lost_grace_s=0.2,
    drain_timeout_s=2.0,
    flush_timeout_s=2.0,
)


def served_model(name: str = MODEL, max_wait_s: float = 0.0) -> ServedModel:
    return ServedModel(
        name=name,
        max_model_len=4096,
        usd_per_mtok_in=0.2,
        usd_per_mtok_cached=0.05,
        usd_per_mtok_out=0.6,
        max_wait_s=max_wait_s,
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
    _stack: AsyncExitStack
    _models: tuple[ServedModel, ...] = field(default=(served_model(),))

    async def rank(self, group: str = "em-tiny-moe-pool-a-0", **options: Any) -> MockRank:
        rank = MockRank(
            **{"group": group, "mesh_token": MESH_TOKEN, "prefix": f"/{group}", **options}
        )
        await rank.start()
        self._stack.push_async_callback(rank.stop)
        return rank

    async def show(self, *groups: Group, models: tuple[ServedModel, ...] | None = None) -> None:
        """Make this the fleet, and wait until the gateway has it."""
        if models is not None:
            self._models = models
        fleet = Fleet(self.controller.fleet.version + 1, self._models, groups)
        self.controller.fleet = fleet
        view = self.service.app._view
        await until(lambda: view.fleet == fleet)

    async def rows(self, count: int = 1) -> list[UsageRecord]:
        await until(lambda: len(self.ledger.rows) >= count)
        await asyncio.sleep(0.1)
        assert len(self.ledger.rows) == count
        return list(self.ledger.rows.values())

    def post(self, path: str, json: Any, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {SECRET}", **options.pop("headers", {})}
        return self.http.post(self.url + path, json=json, headers=headers, **options)

    def count(self, metric: str, **labels: str) -> float:
        return self.registry.get_sample_value(metric, labels) or 0.0


@asynccontextmanager
async def standing(limits: GatewayLimits = QUICK) -> AsyncIterator[Stand]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = listener.getsockname()[1]
    controller, keys, ledger = FakeController(MESH_TOKEN), MemoryKeys(), MemoryLedger()
    keys.add(SECRET, "team-a")
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        await controller.start()
        stack.push_async_callback(controller.stop)
        worker = Worker("test-1", controller.url, MESH_TOKEN, limits)
        service = await stack.enter_async_context(running(worker, keys, ledger, registry))
        server = GatewayServer(service.app, limits.drain_timeout_s)
        serving = asyncio.create_task(server.serve(sockets=[listener]))

        async def stop() -> None:
            service.drain()
            server.should_exit = True
            await serving

        stack.push_async_callback(stop)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stand = Stand(
            f"http://127.0.0.1:{port}", http, service, controller, keys, ledger, registry, stack
        )
        await until(lambda: server.started and service.app._ring.loaded)
        yield stand
