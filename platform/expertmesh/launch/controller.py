"""The controller as a process: its parts wired together, its HTTP API, its end."""

import asyncio
import errno
import logging
import signal
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from expertmesh.clients.ray_serve import RayServeClient
from expertmesh.controller.api import build_api
from expertmesh.controller.configs import scaling_config, served_model
from expertmesh.controller.loop import Controller, ControllerParts
from expertmesh.controller.observe import HttpRankProbe
from expertmesh.core.scaling.contract import Timing
from expertmesh.errors import SetupError
from expertmesh.spec.load import System
from expertmesh.store.database import Database, open_database
from expertmesh.store.journal import Journal
from expertmesh.store.ledger import Ledger

_log = logging.getLogger(__name__)

_CONNECTIONS = 256
"""To the ranks and to Ray's dashboard together."""
_SHUTDOWN_TIMEOUT_S = 2.0


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
    connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as http:
        controller = _wire(settings, database, http)
        runner = web.AppRunner(
            build_api(controller, settings.mesh_token),
            access_log=None,
            shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        try:
            await _listen(runner, settings.host, settings.port)
            _log.info("controller listens on http://%s:%d", settings.host, settings.port)
            await controller.run(stop)
        finally:
            await runner.cleanup()
    _log.info("controller stopped; the groups go on running")


def _wire(
    settings: ControllerSettings, database: Database, http: aiohttp.ClientSession
) -> Controller:
    timing = Timing()
    system = settings.manifests
    parts = ControllerParts(
        serve=RayServeClient(
            http, settings.dashboard_url, settings.ray_token, settings.serve_listen_host
        ),
        probe=HttpRankProbe(http, settings.mesh_token),
        journal=Journal(database),
        ledger=Ledger(database),
        now_s=time.time,
    )
    return Controller(
        parts,
        [scaling_config(model, system.pools, timing) for model in system.models],
        [served_model(model) for model in system.models],
        timing,
    )


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
