"""Wires one gateway worker to the real store and a real socket, and runs it until told to stop."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import uvloop
from prometheus_client import CollectorRegistry

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.gateway import GatewayConfig, LimitStore
from expertmesh.core.routing.external import ExternalConfig
from expertmesh.core.routing.router import RoutingConfig
from expertmesh.errors import ExpertMeshError, SetupError
from expertmesh.gateway.access_log import AccessLog
from expertmesh.gateway.admin import build_admin
from expertmesh.gateway.admin_report import ReportProcess
from expertmesh.gateway.limit_client import SharedLimiter
from expertmesh.gateway.limiter import Limiter, LocalLimiter, seed_book
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.server import BACKLOG
from expertmesh.gateway.service import GatewayService, Parts, Worker, running
from expertmesh.gateway.usage_journal import UsageJournal
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger
from expertmesh.store.spend import LedgerSpend
from expertmesh.store.tenants import TenantBook
from expertmesh.telemetry.shared_tally import TallyFolder
from expertmesh.telemetry.traces import Tracing

_log = logging.getLogger(__name__)

LIMITS_SOCKET: Final = "limits.sock"
_JOURNAL_FOLDER: Final = "usage"
_METRICS_FOLDER: Final = "metrics"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    config: GatewayConfig
    controller_url: str
    state_dir: Path
    """Holds the usage that is not in the ledger yet; one gateway's own."""
    store_url: str = field(repr=False)
    """May hold a password."""
    mesh_token: str = field(repr=False)
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    reload: Callable[[], GatewayConfig] | None = None
    """Reads the configuration again; raises ExpertMeshError when it is not valid."""

    def bounds(self, config: GatewayConfig) -> GatewayLimits:
        return replace(
            self.limits,
            waiting_requests=config.admission.queued_requests,
            most_wait_s=config.admission.wait_s,
        )


def run_worker(settings: GatewaySettings, listener: socket.socket) -> None:
    """Serve on the socket until SIGTERM or SIGINT."""
    uvloop.run(serve_gateway(settings, listener))


async def serve_gateway(
    settings: GatewaySettings,
    listener: socket.socket,
    stop: asyncio.Event | None = None,
) -> None:
    """Returns after SIGTERM, SIGINT or `stop`, when open requests are done and the ledger is
    written. A second signal does not wait for open requests. SIGHUP reads the configuration
    again."""
    try:
        database = await open_database(settings.store_url)
    except BaseException:
        listener.close()
        raise
    try:
        config = settings.config
        worker = Worker(
            name=f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}",
            controller_url=settings.controller_url,
            mesh_token=settings.mesh_token,
            limits=settings.bounds(config),
            routing=RoutingConfig(external=ExternalConfig(config.external_requests)),
            slots=SlotRules(),
            cors_origins=config.cors_origins,
        )
        async with running(worker, await _parts(settings, database, worker)) as service:
            host, port = listener.getsockname()[:2]
            await service.listen(listener)
            _log.info("gateway: listens on http://%s:%d", host, port)
            await _until_told(service, settings, stop or asyncio.Event())
    finally:
        listener.close()
        await database.close()
    _log.info("gateway: stopped")


async def _parts(settings: GatewaySettings, database: Database, worker: Worker) -> Parts:
    journal = UsageJournal.open(settings.state_dir / _JOURNAL_FOLDER, worker.name)
    writer = UsageWriter(Ledger(database), journal, worker.limits.ledger_period_s)
    # What an earlier worker could not write is written before budgets are read from the ledger.
    await writer.recover()
    folder = None
    if settings.config.workers > 1:
        folder = TallyFolder(settings.state_dir / _METRICS_FOLDER)
    keys = KeyBook(database)
    return Parts(
        keys=keys,
        limiter=await _limiter(settings, database, worker.name),
        writer=writer,
        metrics=GatewayMetrics(CollectorRegistry(), folder),
        access_log=AccessLog(sys.stdout.fileno()),
        tracing=Tracing.from_environment(os.environ),
        admin=build_admin(keys, TenantBook(database), ReportProcess(settings.store_url), time.time),
        environment=os.environ,
    )


async def _limiter(settings: GatewaySettings, database: Database, worker: str) -> Limiter:
    config = settings.config
    chosen = config.limits
    spend = LedgerSpend(database)
    if chosen.store is LimitStore.REDIS:
        # Here, so that a gateway without Redis needs no client for it.
        from expertmesh.gateway.redis_limiter import RedisLimiter

        variable = chosen.redis_url_variable or ""
        url = os.environ.get(variable)
        if not url:
            raise SetupError(
                f"{variable}: is not set, and limits.store is redis; set it to the URL of the "
                "Redis, e.g. redis://host:6379/0"
            )
        return RedisLimiter(url, spend, chosen.on_unavailable.value)
    if config.workers > 1:
        socket_file = settings.state_dir / LIMITS_SOCKET
        return SharedLimiter(socket_file, worker, chosen.on_unavailable.value)
    return LocalLimiter(await seeded_book(spend))


async def seeded_book(spend: LedgerSpend) -> LimitBook:
    """Raises UpstreamUnavailable: without the ledger budgets would begin anew at every start."""
    book = LimitBook()
    await seed_book(book, spend, time.time())
    return book


async def _until_told(
    service: GatewayService, settings: GatewaySettings, stop: asyncio.Event
) -> None:
    loop = asyncio.get_running_loop()
    force = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            force.set()
        stop.set()

    def on_reload() -> None:
        if settings.reload is None:
            return
        try:
            config = settings.reload()
        except ExpertMeshError as error:
            _log.error("gateway: keeps its configuration: %s", error)
            return
        service.use(settings.bounds(config), config.cors_origins)
        _log.info("gateway: has read its configuration again")

    handlers = {
        signal.SIGTERM: on_signal,
        signal.SIGINT: on_signal,
        signal.SIGHUP: on_reload,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        await stop.wait()
        service.drain()
        await asyncio.sleep(settings.limits.drain_delay_s)
        await service.finish(force)
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """`shared`: other sockets may listen on the same port, and the kernel spreads connections."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SetupError(
            f"--host {host}: {error.strerror}; name an address of this host"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if not shared:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"--port {port}: is in use on {host}; stop what listens there or take another port"
            ) from error
        raise SetupError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}"
        ) from error
    listener.setblocking(False)
    return listener


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
