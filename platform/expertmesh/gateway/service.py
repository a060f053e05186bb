"""One gateway worker: the application with the tasks that keep it informed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from prometheus_client import CollectorRegistry

from expertmesh.core.routing.policy import RoutingConfig
from expertmesh.gateway.app import Gateway
from expertmesh.gateway.auth import KeyRing, KeySource
from expertmesh.gateway.exchange import Exchange
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.gate import Gate
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.relay import Relay
from expertmesh.gateway.usage_writer import UsageLedger, UsageWriter

_log = logging.getLogger(__name__)

_RESTART_PAUSE_S = 1.0
_IDLE_CONNECTION_S = 15.0
"""Below the 90 s after which Ray Serve closes an idle connection, so that none is used while it
closes."""


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    """Unique for each start: `<host>-<pid>-<start time>`."""
    controller_url: str
    mesh_token: str = field(repr=False)
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    routing: RoutingConfig = field(default_factory=RoutingConfig)


class GatewayService:
    """What runs inside `running`."""

    def __init__(self, app: Gateway, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    def drain(self) -> None:
        """Turn unready and refuse what still waits for a group; open requests go on."""
        self.app.draining = True
        self._gate.close()


async def _keep_up(run: Callable[[], Awaitable[None]]) -> None:
    """A fault in one round must not end the task while the worker looks healthy."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("gateway: a task failed and starts again")
            await asyncio.sleep(_RESTART_PAUSE_S)


@asynccontextmanager
async def running(
    worker: Worker, keys: KeySource, ledger: UsageLedger, registry: CollectorRegistry
) -> AsyncIterator[GatewayService]:
    """Leave it when the last request is done; the ledger is written to its end then."""
    limits = worker.limits
    now_s = asyncio.get_running_loop().time
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=_IDLE_CONNECTION_S, ttl_dns_cache=30
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_timeout_s)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept"),
        trust_env=False,
    ) as http:
        view = FleetView(worker.routing, now_s)
        gate = Gate(view, limits, now_s)
        ring = KeyRing(keys, limits.keys_period_s)
        writer = UsageWriter(ledger, limits.ledger_period_s)
        metrics = GatewayMetrics(registry)
        relay = Relay(http, worker.mesh_token, view, gate, metrics, limits, now_s)
        exchange = Exchange(
            http, worker.controller_url, worker.mesh_token, worker.name, view, gate, limits
        )
        app = Gateway(ring, view, gate, relay, writer, metrics, worker.mesh_token, limits, now_s)
        tasks = [
            asyncio.create_task(_keep_up(run), name=run.__qualname__)
            for run in (ring.run, exchange.run, writer.run, relay.sweep)
        ]
        try:
            yield GatewayService(app, gate)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # The controller learns at once that nothing is in flight here any more.
            await exchange.once()
            await writer.close(limits.flush_timeout_s)
