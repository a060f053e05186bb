"""One gateway worker: the server and the application, with the tasks that keep them informed."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.routing.retry_budget import RetryBudget
from expertmesh.core.routing.router import Router, RoutingConfig
from expertmesh.gateway.access_log import AccessLog
from expertmesh.gateway.admission import Admission
from expertmesh.gateway.app import Gateway
from expertmesh.gateway.asgi_bridge import AsgiApp, AsgiBridge
from expertmesh.gateway.auth import KeyRing, KeySource
from expertmesh.gateway.cors import Cors
from expertmesh.gateway.exchange import Exchange
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.limiter import Limiter
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.prices import PriceBook
from expertmesh.gateway.prober import Prober
from expertmesh.gateway.rank_connection import RankPool
from expertmesh.gateway.relay import Relay
from expertmesh.gateway.server import GatewayServer
from expertmesh.gateway.settlement import Settlement
from expertmesh.gateway.usage import PromptSizes
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.telemetry.traces import Tracing

_log = logging.getLogger(__name__)

_RESTART_PAUSE_S: Final = 1.0
_SWEEP_PERIOD_S: Final = 0.25
_IDLE_CONNECTION_S: Final = 15.0
"""Below the 90 s after which Ray Serve closes an idle connection, so that none is used while it
closes."""


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    """Unique for each start: `<host>-<pid>-<start time>`."""
    controller_url: str
    """One, or several with commas between."""
    mesh_token: str = field(repr=False)
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    slots: SlotRules = field(default_factory=SlotRules)
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is given: all that reaches beyond its own memory."""

    keys: KeySource
    limiter: Limiter
    writer: UsageWriter
    metrics: GatewayMetrics
    access_log: AccessLog
    tracing: Tracing
    admin: AsgiApp
    environment: Mapping[str, str] = field(repr=False)
    """Holds the keys of external providers."""


class GatewayService:
    """What runs inside `running`."""

    def __init__(
        self,
        app: Gateway,
        server: GatewayServer,
        relay: Relay,
        admission: Admission,
        view: FleetView,
        ring: KeyRing,
        limits: GatewayLimits,
    ) -> None:
        self.app: Final = app
        self.server: Final = server
        self.view: Final = view
        self.ring: Final = ring
        self._relay: Final = relay
        self.admission: Final = admission
        self._limits = limits

    async def listen(self, listener: socket.socket) -> None:
        await self.server.start(listener)

    def use(self, limits: GatewayLimits, cors_origins: tuple[str, ...]) -> None:
        """New bounds for what comes from now on; what is under way goes on."""
        self._limits = limits
        self.app.cors = Cors(cors_origins)
        self._relay.limits = limits
        self.admission.use(limits)
        self.server.use(limits)

    def drain(self) -> None:
        """Turn unready and refuse what still waits for a group; open requests go on."""
        self.app.draining = True
        self.admission.close()

    async def finish(self, force: asyncio.Event) -> None:
        """Take no more connections and wait for open requests, up to the time-out or `force`."""
        draining = asyncio.create_task(
            self.server.drain(self._limits.drain_timeout_s, lambda: self._relay.open_calls)
        )
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((draining, forced), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, forced):
            task.cancel()
        await asyncio.gather(draining, forced, return_exceptions=True)
        self._relay.shut_down()
        self.server.close()
        await asyncio.sleep(0)  # what has been written gets out


async def _keep_up(run: Callable[[], Awaitable[None]]) -> None:
    """A fault in one round must not end the task while the worker looks healthy."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("gateway: a task failed and starts again")
            await asyncio.sleep(_RESTART_PAUSE_S)


@asynccontextmanager
async def running(worker: Worker, parts: Parts) -> AsyncIterator[GatewayService]:
    """Leave it when the last request is done; the ledger is written to its end then."""
    limits = worker.limits
    now_s = asyncio.get_running_loop().time
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as http:
        router = Router(worker.routing, worker.name)
        view = FleetView(router, worker.slots, now_s)
        pool = RankPool(limits.connect_timeout_s, _IDLE_CONNECTION_S, now_s)
        wake = asyncio.Event()
        admission = Admission(view, parts.metrics, limits, wake.set, now_s)
        relay = Relay(
            pool,
            view,
            admission,
            RetryBudget(),
            parts.metrics,
            limits,
            worker.mesh_token,
            parts.environment,
            now_s,
        )
        ring = KeyRing(parts.keys, limits.keys_period_s)
        sizes, prices = PromptSizes(), PriceBook()
        settlement = Settlement(
            parts.limiter,
            admission,
            view,
            parts.writer,
            parts.metrics,
            parts.access_log,
            parts.tracing,
            sizes,
            prices,
            now_s,
        )
        relay.settlement = settlement
        exchange = Exchange(
            http,
            worker.controller_url,
            worker.mesh_token,
            worker.name,
            view,
            admission,
            limits,
            wake,
        )
        prober = Prober(
            http,
            router,
            worker.mesh_token,
            parts.environment,
            limits,
            admission.fleet_changed,
            now_s,
        )
        parts.metrics.watch(view, admission, relay, parts.writer, parts.access_log)
        bridge = AsgiBridge(parts.admin)
        app = Gateway(
            ring,
            view,
            parts.limiter,
            admission,
            relay,
            parts.metrics,
            parts.metrics.exposition,
            parts.access_log,
            sizes,
            prices,
            parts.tracing,
            bridge,
            Cors(worker.cors_origins),
            worker.mesh_token,
            now_s,
        )
        server = GatewayServer(app, limits, now_s)

        async def sweep() -> None:
            rounds = 0
            while True:
                await asyncio.sleep(_SWEEP_PERIOD_S)
                at_s = now_s()
                admission.sweep(at_s)
                relay.sweep(at_s)
                rounds += 1
                if rounds % 4 == 0:
                    server.sweep(at_s)
                    pool.sweep(at_s)

        runs = (
            ring.run,
            exchange.run,
            prober.run,
            parts.writer.run,
            parts.limiter.run,
            parts.access_log.run,
            parts.metrics.run,
            sweep,
        )
        tasks = [asyncio.create_task(_keep_up(run), name=run.__qualname__) for run in runs]
        try:
            yield GatewayService(app, server, relay, admission, view, ring, limits)
        finally:
            relay.shut_down()
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await bridge.close()
            # The controller learns at once that nothing is in flight here any more.
            await exchange.once()
            await pool.close()
            await parts.writer.close(limits.flush_timeout_s)
            await parts.limiter.close()
            parts.access_log.close()
            parts.metrics.close()
            parts.tracing.close()
