"""The gateway as a whole: one worker in this process, or several behind one port.

Workers are forked before any of them has a loop or a thread. The kernel spreads connections over
their sockets; a worker that dies is replaced; they end with this process.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Final, NoReturn

import uvloop

from expertmesh.core.domain.gateway import LimitStore
from expertmesh.errors import ExpertMeshError
from expertmesh.gateway.limit_server import LimitServer
from expertmesh.launch.gateway import (
    LIMITS_SOCKET,
    GatewaySettings,
    listen,
    log_to_stderr,
    run_worker,
    seeded_book,
)
from expertmesh.store.database import open_database
from expertmesh.store.spend import LedgerSpend

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_RESTART_PAUSE_S: Final = 1.0
_LIMITS: Final = -1
"""Place of the process that counts for all workers."""


def run_gateway(settings: GatewaySettings) -> None:
    """Until SIGTERM or SIGINT. Raises SetupError when it cannot start."""
    log_to_stderr()
    config = settings.config
    if config.workers == 1:
        run_worker(settings, listen(config.host, config.port))
        return
    # Held by all, served by none: keeps the port, and says at once when it is taken.
    with contextlib.closing(listen(config.host, config.port, shared=True)) as place:
        port = place.getsockname()[1]
        settings = replace(settings, config=replace(config, port=port))
        asyncio.run(_prepare(settings))
        _Workers(settings).run()


async def _prepare(settings: GatewaySettings) -> None:
    """The store is brought to its newest schema once, and its faults are told once."""
    database = await open_database(settings.store_url)
    await database.close()


class _Workers:
    def __init__(self, settings: GatewaySettings) -> None:
        self._settings: Final = settings
        self._pids: dict[int, int] = {}
        """Process to its place."""
        self._stopping = False
        self._failed = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        config = self._settings.config
        if config.limits.store is LimitStore.MEMORY:
            self._start(_LIMITS)
        for place in range(config.workers):
            self._start(place)
        self._watch()
        if self._failed:
            sys.exit(1)

    def _watch(self) -> None:
        while self._pids:
            pid, status = os.wait()
            place = self._pids.pop(pid, None)
            if place is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            if self._stopping:
                self._failed = self._failed or code != 0
                if all(place == _LIMITS for place in self._pids.values()):
                    # The last worker has settled: nobody counts any more.
                    self._signal_all(signal.SIGKILL)
                continue
            _log.error("gateway: worker %d ended with %d and is replaced", place, code)
            time.sleep(_RESTART_PAUSE_S)
            self._start(place)

    def _start(self, place: int) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(parent, self._limits if place == _LIMITS else self._serve)
        self._pids[pid] = place

    def _serve(self) -> None:
        config = self._settings.config
        run_worker(self._settings, listen(config.host, config.port, shared=True))

    def _limits(self) -> None:
        # It outlives the workers' drain; the parent ends it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        uvloop.run(self._count())

    async def _count(self) -> None:
        settings = self._settings
        database = await open_database(settings.store_url)
        try:
            book = await seeded_book(LedgerSpend(database))
        finally:
            await database.close()
        server = LimitServer(book, settings.state_dir / LIMITS_SOCKET)
        await server.start()
        await server.run()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._stopping = True
        self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for pid, place in list(self._pids.items()):
            if place == _LIMITS and number != signal.SIGKILL:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _become(parent: int, run: Callable[[], None]) -> NoReturn:
    """In the forked process: do that and nothing else, and end with the parent."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            run()
            code = 0
    except ExpertMeshError as error:
        _log.error("gateway: %s", error)
    except BaseException:
        _log.exception("gateway: a worker failed")
    finally:
        logging.shutdown()
        os._exit(code)
