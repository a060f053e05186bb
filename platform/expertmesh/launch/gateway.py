"""Wires the gateway to the real store and a real socket, and runs it until it is told to stop."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import uvloop
from prometheus_client import CollectorRegistry

from expertmesh.errors import SetupError
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.server import BACKLOG, GatewayServer
from expertmesh.gateway.service import GatewayService, Worker, running
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    host: str
    port: int
    controller_url: str
    store_url: str = field(repr=False)
    """May hold a password."""
    mesh_token: str = field(repr=False)
    limits: GatewayLimits = field(default_factory=GatewayLimits)


def run_gateway(settings: GatewaySettings) -> None:
    """As a process of its own, until SIGTERM or SIGINT."""
    _log_to_stderr()
    uvloop.run(serve_gateway(settings))


async def serve_gateway(settings: GatewaySettings, stop: asyncio.Event | None = None) -> None:
    """Returns after SIGTERM, SIGINT or `stop`, when open requests are done and the ledger is
    written. A second signal does not wait for open requests."""
    listener = _listen(settings.host, settings.port)
    try:
        database = await open_database(settings.store_url)
    except BaseException:
        listener.close()
        raise
    worker = Worker(
        name=f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}",
        controller_url=settings.controller_url,
        mesh_token=settings.mesh_token,
        limits=settings.limits,
    )
    stop = stop or asyncio.Event()
    try:
        async with running(
            worker, KeyBook(database), Ledger(database), CollectorRegistry()
        ) as service:
            host, port = listener.getsockname()[:2]
            _log.info("gateway: listens on http://%s:%d", host, port)
            await _serve(service, listener, settings.limits, stop)
    finally:
        listener.close()
        await database.close()
    _log.info("gateway: stopped")


async def _serve(
    service: GatewayService, listener: socket.socket, limits: GatewayLimits, stop: asyncio.Event
) -> None:
    server = GatewayServer(service.app, limits.drain_timeout_s)
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            server.force_exit = True
        stop.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        service.drain()
        if not serving.done():
            await asyncio.sleep(limits.drain_delay_s)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        for number in signals:
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
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
        listener.bind(address)
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


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("uvicorn.error", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    access = logging.getLogger("expertmesh.gateway.access")
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(lines)
    access.propagate = False
