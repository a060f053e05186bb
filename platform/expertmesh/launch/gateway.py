"""Wires one gateway worker to the real store and a real socket, and runs it until told to stop."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
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
from expertmesh.errors import ExpertMeshError, SetupError, UpstreamUnavailable
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

LIMITS_SOCKET: Final = Path("limits", "server.sock")
"""In a folder of its own, that only this user may enter: others may write to a mounted volume."""
JOURNAL_FOLDER: Final = "usage"
_METRICS_FOLDER: Final = "metrics"
_MOST_READY_WAIT_S: Final = 5.0
"""So long a worker stays away from its port until it can serve."""
_READY_LOOK_S: Final = 0.02


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

    def reloaded(self, config: GatewayConfig) -> "GatewaySettings":
        """With all of a configuration that can change while the gateway runs."""
        chosen = replace(self.config, admission=config.admission, cors_origins=config.cors_origins)
        if chosen != replace(config, port=chosen.port):
            _log.warning(
                "gateway: of the configuration, what is not under admission or cors_origins "
                "counts from the next start only"
            )
        return replace(self, config=chosen)


def run_worker(settings: GatewaySettings, listener: socket.socket) -> None:
    """Serve on the socket until SIGTERM or, unless there are other workers, SIGINT."""
    # Until it is heeded it waits, instead of ending a worker that starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    uvloop.run(serve_gateway(settings, listener))


async def serve_gateway(
    settings: GatewaySettings,
    listener: socket.socket,
    stop: asyncio.Event | None = None,
) -> None:
    """Returns after a signal or `stop`, when open requests are done and the ledger is written. A
    second signal does not wait for open requests. SIGHUP reads the configuration again."""
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
        parts = await _parts(settings, database, worker)
        orders = _Orders(settings, stop or asyncio.Event())
        with orders.heeded():
            async with running(worker, parts) as service:
                orders.service = service
                if await _can_serve(service, parts.limiter, config.workers, orders.stop):
                    host, port = listener.getsockname()[:2]
                    await service.listen(listener)
                    # What lives for ever needs no look at in every collection, which takes some
                    # 40 ms otherwise.
                    gc.collect()
                    gc.freeze()
                    _log.info("gateway: listens on http://%s:%d", host, port)
                await orders.stop.wait()
                service.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.limits.drain_delay_s):
                        await orders.force.wait()
                await service.finish(orders.force)
    finally:
        listener.close()
        await database.close()
    _log.info("gateway: stopped")


async def _can_serve(
    service: GatewayService, limiter: Limiter, workers: int, stop: asyncio.Event
) -> bool:
    """Waits until it can, for a bounded time: other workers serve meanwhile, and limits that
    cannot be read yet would refuse requests, or let all in. False when told to stop."""
    deadline_s = time.monotonic() + _MOST_READY_WAIT_S
    while not stop.is_set() and time.monotonic() < deadline_s:
        informed = service.ring.loaded and service.view.fleet is not None
        if limiter.connected and (informed or workers == 1):
            break
        await asyncio.sleep(_READY_LOOK_S)
    return not stop.is_set()


async def _parts(settings: GatewaySettings, database: Database, worker: Worker) -> Parts:
    several = settings.config.workers > 1
    state_dir = settings.state_dir
    journal = UsageJournal.open(state_dir / JOURNAL_FOLDER, worker.name)
    writer = UsageWriter(Ledger(database), journal, worker.limits.ledger_period_s)
    try:
        # What an earlier worker could not write is written before budgets are read from the ledger.
        recovered = await writer.recover()
        keys = KeyBook(database)
        return Parts(
            keys=keys,
            limiter=await _limiter(settings, database, worker.name, recovered),
            writer=writer,
            metrics=GatewayMetrics(
                CollectorRegistry(), TallyFolder(state_dir / _METRICS_FOLDER) if several else None
            ),
            access_log=AccessLog(sys.stdout.fileno()),
            tracing=Tracing.from_environment(os.environ),
            admin=build_admin(
                keys, TenantBook(database), ReportProcess(settings.store_url), time.time
            ),
            environment=os.environ,
        )
    except BaseException:
        await writer.close(0.0)
        raise


async def _limiter(
    settings: GatewaySettings, database: Database, worker: str, recovered: bool
) -> Limiter:
    config = settings.config
    chosen = config.limits
    spend = LedgerSpend(database)
    if chosen.store is LimitStore.REDIS:
        # Here, so that a gateway without Redis needs no client for it.
        from expertmesh.gateway.redis_limiter import RedisLimiter

        url = redis_url(config)
        try:
            return RedisLimiter(url, spend, chosen.on_unavailable.value)
        except ValueError:
            # The error's text may hold the password.
            raise SetupError(
                f"{chosen.redis_url_variable}: holds no URL of a Redis; write it as "
                "redis://user:password@host:6379/0"
            ) from None
    if config.workers > 1:
        socket_file = settings.state_dir / LIMITS_SOCKET
        return SharedLimiter(socket_file, worker, chosen.on_unavailable.value)
    if not recovered:
        raise UpstreamUnavailable(
            "store: does not take the usage that an earlier start left, so what was spent is not "
            "known; start again when it answers"
        )
    return LocalLimiter(await seeded_book(spend))


def redis_url(config: GatewayConfig) -> str:
    """Raises SetupError when the environment does not name it."""
    variable = config.limits.redis_url_variable or ""
    url = os.environ.get(variable)
    if not url:
        raise SetupError(
            f"{variable}: is not set, and limits.store is redis; set it to the URL of the "
            "Redis, e.g. redis://host:6379/0"
        )
    return url


async def seeded_book(spend: LedgerSpend) -> LimitBook:
    """Raises UpstreamUnavailable: without the ledger budgets would begin anew at every start."""
    book = LimitBook()
    await seed_book(book, spend, time.time())
    return book


class _Orders:
    """What signals tell this worker."""

    def __init__(self, settings: GatewaySettings, stop: asyncio.Event) -> None:
        self._settings = settings
        self.stop: Final = stop
        self.force: Final = asyncio.Event()
        """Set to wait no longer for open requests."""
        self.service: GatewayService | None = None

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self._end, signal.SIGHUP: self._reload}
        if self._settings.config.workers == 1:
            # Of several workers, Ctrl-C reaches all and their parent, who then tells them once.
            handlers[signal.SIGINT] = self._end
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self.stop.is_set():
            self.force.set()
        self.stop.set()

    def _reload(self) -> None:
        settings, service = self._settings, self.service
        if settings.reload is None or service is None:
            return
        try:
            settings = self._settings = settings.reloaded(settings.reload())
        except ExpertMeshError as error:
            _log.error("gateway: keeps its configuration: %s", error)
            return
        config = settings.config
        service.use(settings.bounds(config), config.cors_origins)
        _log.info("gateway: has read its configuration again")


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """`shared`: other sockets may be bound to the same port, and the kernel spreads connections
    over those that listen; this one does not yet. Raises SetupError."""
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
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
