"""The controller as a process: its parts wired together, its HTTP API, its end."""

import asyncio
import errno
import logging
import os
import secrets
import signal
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from expertmesh.clients.ray_serve import RayServeClient
from expertmesh.controller.announce import AnnouncedJournal
from expertmesh.controller.api import build_api
from expertmesh.controller.configs import Shared, scaling_config, served_model
from expertmesh.controller.console import Console
from expertmesh.controller.console_access import ConsoleAccess
from expertmesh.controller.fence import FencedJournal, FencedServe, Term
from expertmesh.controller.leadership import Leadership, LeaseKeeper
from expertmesh.controller.lease import LeaseStore, LeaseView
from expertmesh.controller.loop import Controller, ControllerParts
from expertmesh.controller.memory_lease import MemoryLease
from expertmesh.controller.notices import AllNotices, FileNotices, HttpNotices
from expertmesh.controller.observe import HttpRankProbe, SpotNotices
from expertmesh.controller.retention import keep_decisions
from expertmesh.controller.today import TodayReader
from expertmesh.controller.traced_journal import TracedJournal
from expertmesh.core.scaling.contract import Timing
from expertmesh.errors import SetupError
from expertmesh.spec.catalog_hardware import accelerators
from expertmesh.spec.load import System
from expertmesh.store.database import Database, open_database
from expertmesh.store.journal import Journal
from expertmesh.store.keys import KeyBook
from expertmesh.store.leases import LeaseTable
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_cells
from expertmesh.store.served_work import served_work
from expertmesh.store.spend import LedgerSpend
from expertmesh.telemetry.traces import DecisionTracing

if TYPE_CHECKING:
    from expertmesh.launch.kubernetes import KubernetesParts

_log = logging.getLogger(__name__)

_CONNECTIONS = 256
"""To the ranks and to Ray's dashboard together."""
_SHUTDOWN_TIMEOUT_S = 2.0
_LEASE = "controller"
_ANY_HOST = ("", "0.0.0.0", "::")
_KUBERNETES = "kubernetes"
_FILE = "file:"


class LeaseKind(StrEnum):
    """By what several controllers agree on a leader."""

    DATABASE = "database"
    """A row in the store that they share."""
    KUBERNETES = "kubernetes"
    """A Lease in the namespace of this pod."""
    NONE = "none"
    """There is no other controller."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    host: str
    port: int
    dashboard_url: str
    """Of Ray's head node, for example http://127.0.0.1:8265."""
    mesh_token: str = field(repr=False)
    store_url: str = field(repr=False)
    """May hold a password."""
    manifests: System
    ray_token: str | None = field(default=None, repr=False)
    serve_listen_host: str = "0.0.0.0"
    """Address that the ranks bind: the loopback address when everything is on one machine."""
    lease: LeaseKind = LeaseKind.DATABASE
    advertise_url: str | None = None
    """Where gateways reach this controller; by default as it listens, at this host's address."""
    spot_notices: tuple[str, ...] = ()
    """`kubernetes`, `file:PATH` or an HTTP URL, any number of them."""
    gateway_url: str | None = None
    """As browsers reach the gateway, for the console's chat."""
    kubeconfig: Path | None = None
    """Without one, the service account of this pod."""
    ray_cluster: str | None = None
    """The RayCluster that decisions are told of, in Kubernetes' events."""
    keep_decisions_s: float = 30 * 86_400.0
    """Older entries of the journal are deleted, but for the newest of each model."""

    def __post_init__(self) -> None:
        for source in self.spot_notices:
            known = source == _KUBERNETES or source.startswith(("http://", "https://"))
            if not known and not (source.startswith(_FILE) and source != _FILE):
                raise SetupError(
                    f"--spot-notices: {source!r}: write kubernetes, file:PATH or http://host/path"
                )

    @property
    def needs_kubernetes(self) -> str | None:
        """The option that does."""
        if self.lease is LeaseKind.KUBERNETES:
            return "--lease kubernetes"
        if _KUBERNETES in self.spot_notices:
            return "--spot-notices kubernetes"
        return "--ray-cluster" if self.ray_cluster is not None else None

    @property
    def url(self) -> str:
        if self.advertise_url is not None:
            return self.advertise_url.rstrip("/")
        host = _own_address() if self.host in _ANY_HOST else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.port}"


async def serve_controller(settings: ControllerSettings) -> None:
    """Until SIGTERM or SIGINT. The groups go on running; the next controller continues them."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        database = await open_database(settings.store_url)
        try:
            await _serve(settings, database, stop)
        finally:
            await database.close()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _serve(settings: ControllerSettings, database: Database, stop: asyncio.Event) -> None:
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        kubernetes = await _kubernetes(settings, stack)
        tracing = DecisionTracing.from_environment(os.environ)
        stack.callback(tracing.close)
        leadership = _wire(settings, database, http, kubernetes, tracing)
        runner = web.AppRunner(
            build_api(
                leadership,
                settings.mesh_token,
                leadership,
                _console(settings, database, leadership),
            ),
            access_log=None,
            shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        # Before the lease: who listens here is the only one that can hold it under this URL.
        await _listen(runner, settings.host, settings.port)
        _log.info("controller listens on http://%s:%d", settings.host, settings.port)
        forgetting = asyncio.create_task(
            keep_decisions(Journal(database), settings.keep_decisions_s, time.time, stop)
        )
        try:
            await leadership.run(stop)
        finally:
            forgetting.cancel()
            await asyncio.gather(forgetting, return_exceptions=True)
    _log.info("controller stopped; the groups go on running")


def _console(settings: ControllerSettings, database: Database, leadership: Leadership) -> Console:
    return Console(
        leadership,
        ConsoleAccess(settings.mesh_token, KeyBook(database), time.time),
        name=settings.manifests.platform.name,
        gateway_url=settings.gateway_url,
        today=TodayReader(Ledger(database), LedgerSpend(database), time.time),
        role=leadership,
    )


async def _kubernetes(
    settings: ControllerSettings, stack: AsyncExitStack
) -> "KubernetesParts | None":
    if settings.needs_kubernetes is None:
        return None
    # Here, because its client takes a second and 80 MB, which only a cluster needs.
    from expertmesh.launch.kubernetes import kubernetes_parts

    return await stack.enter_async_context(
        kubernetes_parts(settings.needs_kubernetes, settings.kubeconfig, settings.ray_cluster)
    )


def _wire(
    settings: ControllerSettings,
    database: Database,
    http: aiohttp.ClientSession,
    kubernetes: "KubernetesParts | None",
    tracing: DecisionTracing,
) -> Leadership:
    timing = Timing()
    system = settings.manifests
    serve = RayServeClient(
        http, settings.dashboard_url, settings.ray_token, settings.serve_listen_host
    )
    journal = Journal(database)
    notices = _notices(settings, http, kubernetes)
    events = kubernetes.events() if kubernetes is not None else None

    def build(term: Term) -> Controller:
        fenced = TracedJournal(FencedJournal(journal, term), tracing)
        parts = ControllerParts(
            serve=serve,
            writer=FencedServe(serve, journal, term),
            probe=HttpRankProbe(http, settings.mesh_token),
            journal=AnnouncedJournal(fenced, events.say) if events is not None else fenced,
            ledger=Ledger(database),
            usage=partial(usage_cells, Ledger(database)),
            served=partial(served_work, database),
            now_s=time.time,
            notices=notices,
        )
        return Controller(
            parts,
            [scaling_config(model, system.pools, timing) for model in system.models],
            [served_model(model) for model in system.models],
            timing,
            Shared(system.pools, system.usd_per_hour_budget, accelerators()),
        )

    me = f"{socket.gethostname()}_{secrets.token_hex(4)}"
    view = LeaseView(me, settings.url)
    return Leadership(LeaseKeeper(_lease(settings, database, kubernetes), view), journal, build)


def _lease(
    settings: ControllerSettings, database: Database, kubernetes: "KubernetesParts | None"
) -> LeaseStore:
    if settings.lease is LeaseKind.NONE:
        return MemoryLease()
    if settings.lease is LeaseKind.KUBERNETES and kubernetes is not None:
        return kubernetes.lease(f"{settings.manifests.platform.name}-{_LEASE}")
    return LeaseTable(database, _LEASE)


def _notices(
    settings: ControllerSettings,
    http: aiohttp.ClientSession,
    kubernetes: "KubernetesParts | None",
) -> SpotNotices | None:
    sources: list[SpotNotices] = []
    for source in settings.spot_notices:
        if source.startswith(_FILE):
            sources.append(FileNotices(Path(source.removeprefix(_FILE))))
        elif source != _KUBERNETES:
            sources.append(HttpNotices(http, source))
        elif kubernetes is not None:
            sources.append(kubernetes.notices())
    return AllNotices(sources) if sources else None


def _own_address() -> str:
    """In a pod its own address, by the hosts file; else what this host's name stands for."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"controller.port: {port} on {host} is in use; stop the process that listens "
                "there, or choose another port with --port"
            ) from None
        raise SetupError(f"controller: cannot listen on {host}:{port}: {error.strerror}") from None
