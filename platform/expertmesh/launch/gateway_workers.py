"""The gateway as a whole: one worker in this process, or several behind one port.

Workers are forked before any of them has a loop or a thread. The kernel spreads connections over
their sockets; a worker that dies is replaced; they end with this process.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NoReturn

import uvloop

from expertmesh.core.domain.gateway import LimitStore
from expertmesh.errors import ExpertMeshError, UpstreamUnavailable
from expertmesh.gateway.limit_server import LimitServer, free_place
from expertmesh.gateway.usage_journal import UsageJournal
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.launch.gateway import (
    JOURNAL_FOLDER,
    LIMITS_SOCKET,
    GatewaySettings,
    listen,
    log_to_stderr,
    redis_url,
    run_worker,
    seeded_book,
)
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.spend import LedgerSpend

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_RESTART_PAUSE_S: Final = 1.0
"""Longer than workers need to write to the ledger what they have settled: what counts limits
anew reads it from there."""
_ADOPT_S: Final = 0.3
"""Workers look for a limit server that is away every 0.1 s."""
_THREAD_END_S: Final = 5.0
_HEEDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_LIMITS: Final = -1
"""Place of the process that counts for all workers."""


def _raise_file_limit() -> None:
    """Each stream has two sockets, and the usual soft limit of 1,024 is meant for `select`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_gateway(settings: GatewaySettings) -> None:
    """Until SIGTERM or SIGINT. Raises SetupError or UpstreamUnavailable when it cannot start."""
    log_to_stderr()
    _raise_file_limit()
    config = settings.config
    if config.workers == 1:
        run_worker(settings, listen(config.host, config.port))
        return
    with contextlib.closing(_take_port(config.host, config.port)) as place:
        port = place.getsockname()[1]
        settings = replace(settings, config=replace(config, port=port))
        asyncio.run(_prepare(settings))
        # The store's driver leaves its threads to end by themselves.
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(_THREAD_END_S)
        _Workers(settings).run()


def _take_port(host: str, port: int) -> socket.socket:
    """Held by all, served by none: keeps the port, and says at once when it is taken."""
    if port:
        # Another gateway's workers would share the port without a word.
        listen(host, port).close()
    return listen(host, port, shared=True)


async def _prepare(settings: GatewaySettings) -> None:
    """What is done once for all workers; and what keeps them from starting is told once.

    The ledger is complete then: from it follows what is left of the budgets.
    """
    limits = settings.config.limits
    if limits.store is LimitStore.REDIS:
        redis_url(settings.config)
    else:
        path = settings.state_dir / LIMITS_SOCKET
        with contextlib.suppress(OSError):
            # Kubernetes opens all of a volume to the group.
            path.parent.chmod(0o700)
        await free_place(path)
    database = await open_database(settings.store_url)
    try:
        journal = UsageJournal.open(settings.state_dir / JOURNAL_FOLDER, "start")
        writer = UsageWriter(Ledger(database), journal, settings.limits.ledger_period_s)
        try:
            if not await writer.recover():
                raise UpstreamUnavailable(
                    "store: does not take the usage that an earlier start left; start again when "
                    "it answers"
                )
        finally:
            await writer.close(settings.limits.flush_timeout_s)
    finally:
        await database.close()


class _Workers:
    """Signals wait until they are looked for, so none comes between a fork and its note."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._pids: dict[int, int] = {}
        """Process to its place."""
        self._due_s: dict[int, float] = {}
        """Monotonic time at which a place gets its next process."""
        self._stopping = False
        self._failed = False

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEEDED)
        config = self._settings.config
        with_limits = config.limits.store is LimitStore.MEMORY
        if with_limits:
            self._start(_LIMITS)
        for place in range(config.workers):
            self._start(place)
        while self._pids or self._due_s:
            self._heed(self._next_signal())
            self._collect()
            if self._stopping:
                self._end_limits()
            self._start_due()
        if with_limits:
            (self._settings.state_dir / LIMITS_SOCKET).unlink(missing_ok=True)
        if self._failed:
            sys.exit(1)

    def _next_signal(self) -> int | None:
        if not self._due_s:
            return signal.sigwait(_HEEDED)
        wait_s = max(0.0, min(self._due_s.values()) - time.monotonic())
        found = signal.sigtimedwait(_HEEDED, wait_s)
        return None if found is None else found.si_signo

    def _heed(self, number: int | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stopping = True
            self._due_s.clear()
            self._tell_workers(signal.SIGTERM)
        elif number == signal.SIGHUP and not self._stopping:
            self._reload()

    def _reload(self) -> None:
        """Read here too: for workers that start later, and so that a fault is told once."""
        settings = self._settings
        if settings.reload is None:
            return
        try:
            self._settings = settings.reloaded(settings.reload())
        except ExpertMeshError as error:
            _log.error("gateway: keeps its configuration: %s", error)
        else:
            self._tell_workers(signal.SIGHUP)

    def _collect(self) -> None:
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            place = self._pids.pop(pid, None)
            if place is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            if not self._stopping:
                _log.error("gateway: %s ended with %d and is replaced", _name(place), code)
                self._due_s[place] = time.monotonic() + _RESTART_PAUSE_S
                continue
            # One that was still starting did not know the signal yet.
            self._failed = self._failed or code not in (0, -signal.SIGTERM)

    def _end_limits(self) -> None:
        """When the last worker has settled."""
        if set(self._pids.values()) == {_LIMITS}:
            (pid,) = self._pids
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._pids.clear()

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for place, due_s in list(self._due_s.items()):
            if due_s <= now_s:
                del self._due_s[place]
                self._start(place)

    def _start(self, place: int) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._pids[pid] = place
        elif place == _LIMITS:
            # Nobody needs it when this process is gone, and another one would need its place.
            _become(parent, signal.SIGKILL, self._limits)
        else:
            _become(parent, signal.SIGTERM, self._serve)

    def _serve(self) -> None:
        config = self._settings.config
        run_worker(self._settings, listen(config.host, config.port, shared=True))

    def _limits(self) -> None:
        # It outlives the workers' drain; the parent ends it.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        uvloop.run(self._count())

    async def _count(self) -> None:
        settings = self._settings
        database = await open_database(settings.store_url)
        try:
            book = await seeded_book(LedgerSpend(database))
        finally:
            await database.close()
        path = settings.state_dir / LIMITS_SOCKET
        server = LimitServer(book, path, adopt_s=_ADOPT_S)
        await server.start()
        await server.run()

    def _tell_workers(self, number: int) -> None:
        for pid, place in self._pids.items():
            if place != _LIMITS:
                os.kill(pid, number)


def _name(place: int) -> str:
    return "the limit server" if place == _LIMITS else f"worker {place}"


def _become(parent: int, at_its_end: int, run: Callable[[], None]) -> NoReturn:
    """In the forked process: do that and nothing else, and end with the parent."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGHUP,))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, at_its_end)
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
