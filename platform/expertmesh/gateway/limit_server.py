"""One limit book for all workers of a host, behind a Unix socket."""

import asyncio
import logging
import os
import socket
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import msgspec

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import Estimate, Reserved
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.errors import SetupError
from expertmesh.gateway.limit_wire import (
    Adopt,
    Answer,
    Define,
    Denied,
    Done,
    FrameError,
    FrameReader,
    Granted,
    Hello,
    Question,
    Reserve,
    Settle,
    Welcome,
    decode_questions,
    frames,
)
from expertmesh.gateway.limiter import expire_for_ever

_log = logging.getLogger(__name__)

_MOST_PATH_BYTES = 107
"""Of a Unix socket, in Linux."""
_MOST_UNREAD_BYTES = 64 * 1024 * 1024
"""A worker that reads no answers is cut off; it comes back when it can."""


class LimitServer:
    def __init__(
        self, book: LimitBook, path: Path, grace_s: float = 5.0, adopt_s: float = 0.0
    ) -> None:
        """The book has been seeded with what was spent before.

        A worker whose connection is lost may come back within `grace_s`; after that its open
        reservations stay as estimated. Workers of an earlier server have `adopt_s` from the start
        to tell what is open, before anything is granted.
        """
        self.book: Final = book
        self._path: Final = path
        self._grace_s: Final = grace_s
        self._adopt_s: Final = adopt_s
        self._grants_from_s = 0.0
        self._id: Final = uuid.uuid4().hex
        self._workers: dict[str, _Worker] = {}
        self._connections: set[_Connection] = set()
        self._accounts: dict[str, Account] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises SetupError when the socket cannot be made, or is another server's."""
        await free_place(self._path)
        loop = asyncio.get_running_loop()
        self._grants_from_s = loop.time() + self._adopt_s
        self._server = await loop.create_unix_server(
            lambda: _Connection(self), sock=_listener(self._path), backlog=1024
        )

    async def run(self) -> None:
        await expire_for_ever(self.book)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
            self._server = None
        for worker in self._workers.values():
            worker.stop_waiting()
        for connection in list(self._connections):
            connection.abort()

    def _account(self, name: str, limits: Limits) -> Account:
        """The same object for the same limits: the book compares by identity first."""
        account = self._accounts.get(name)
        if account is None or account.limits != limits:
            account = self._accounts[name] = Account(name, limits)
        return account

    def _worker(self, name: str, connection: "_Connection") -> "_Worker":
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = _Worker(name)
        worker.stop_waiting()
        if worker.connection is not None:
            worker.connection.abort()
        worker.connection = connection
        return worker

    def _lost(self, worker: "_Worker") -> None:
        worker.connection = None
        if self._server is not None:
            worker.wait(self._grace_s, lambda: self._give_up(worker))

    def _give_up(self, worker: "_Worker") -> None:
        del self._workers[worker.name]
        for reservation_id in worker.open:
            self.book.forfeit(reservation_id)
        if worker.open:
            _log.warning(
                "limits: worker %s is gone; its %d open reservations are kept as estimated",
                worker.name,
                len(worker.open),
            )


class _Worker:
    """Outlives its connection for a while."""

    __slots__ = ("_waiting", "connection", "name", "open")

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: set[str] = set()
        self.connection: _Connection | None = None
        self._waiting: asyncio.TimerHandle | None = None

    def wait(self, grace_s: float, then: Callable[[], None]) -> None:
        self._waiting = asyncio.get_running_loop().call_later(grace_s, then)

    def stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Connection(asyncio.Protocol):
    def __init__(self, server: LimitServer) -> None:
        self._server: Final = server
        self._reader: Final = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._worker: _Worker | None = None
        self._handles: dict[int, Account] = {}
        self._accounts: dict[tuple[int, ...], tuple[Account, ...]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._server._connections.add(self)
        if self._server._server is None:
            self.abort()  # It was accepted while the server closed.

    def connection_lost(self, exc: Exception | None) -> None:
        self._server._connections.discard(self)
        if self._worker is not None and self._worker.connection is self:
            self._server._lost(self._worker)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        answers: list[Answer] = []
        last_seq = 0
        try:
            for payload in self._reader.feed(data):
                for question in decode_questions(payload):
                    last_seq = self._answer(question, answers) or last_seq
        except (FrameError, msgspec.DecodeError, KeyError, ValueError) as error:
            _log.warning("limits: a worker sent what is no call: %s", error)
            self.abort()
            return
        if last_seq:
            answers.append(Done(last_seq))
        if answers and self._transport is not None:
            self._transport.write(frames(answers))
            if self._transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
                self.abort()

    def _answer(self, question: Question, answers: list[Answer]) -> int | None:
        """The number of a call that is done."""
        if isinstance(question, Hello):
            self._worker = self._server._worker(question.worker, self)
            wait_s = self._server._grants_from_s - asyncio.get_running_loop().time()
            answers.append(Welcome(self._server._id, max(0.0, wait_s)))
            return None
        worker = self._worker
        if worker is None:
            raise FrameError("a call before the greeting")
        book = self._server.book
        if isinstance(question, Reserve):
            reservation_id = question.reservation_id
            outcome = book.reserve(
                reservation_id,
                self._accounts_of(question.handles),
                Estimate(question.tokens, question.pico_usd),
                question.now_s,
            )
            if isinstance(outcome, Reserved):
                worker.open.add(reservation_id)
                answers.append(Granted(question.seq, outcome.headroom))
            else:
                answers.append(
                    Denied(
                        question.seq,
                        outcome.kind,
                        outcome.account,
                        outcome.limit,
                        outcome.retry_after_s,
                        outcome.headroom,
                    )
                )
            return question.seq
        if isinstance(question, Settle):
            book.settle(question.reservation_id, question.tokens, question.pico_usd, question.now_s)
            worker.open.discard(question.reservation_id)
            return question.seq
        if isinstance(question, Define):
            self._handles[question.handle] = self._server._account(question.name, question.limits)
            self._accounts.clear()
            return None
        self._adopt(question, worker)
        return None

    def _adopt(self, question: Adopt, worker: _Worker) -> None:
        self._server.book.adopt(
            question.reservation_id,
            self._accounts_of(question.handles),
            Estimate(question.tokens, question.pico_usd),
            question.now_s,
        )
        worker.open.add(question.reservation_id)

    def _accounts_of(self, handles: tuple[int, ...]) -> tuple[Account, ...]:
        accounts = self._accounts.get(handles)
        if accounts is None:
            accounts = tuple(self._handles[handle] for handle in handles)
            self._accounts[handles] = accounts
        return accounts


async def free_place(path: Path) -> None:
    """Makes the socket's folder and removes what a killed server left there. Raises SetupError
    when no server can have its socket there."""
    _make_folder(path.parent)
    await asyncio.to_thread(_remove_stale, path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise SetupError(f"limits: {folder}: {error.strerror or error}") from error
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SetupError(
            f"limits: {folder}: other users may write there; "
            "make it this user's with mode 0700, or name another folder"
        )


def _listener(path: Path) -> socket.socket:
    """Whoever may connect may spend: only this user."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    others = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SetupError(f"limits: {path}: {error.strerror or error}") from error
    finally:
        os.umask(others)
    return listener


def _remove_stale(path: Path) -> None:
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise SetupError(
            f"limits: {path}: too long for a socket; name one of at most {_MOST_PATH_BYTES} bytes"
        )
    if path.exists() and not path.is_socket():
        raise SetupError(f"limits: {path}: is there and no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # Its server was killed.
            return
        except OSError as error:
            raise SetupError(f"limits: {path}: {error.strerror or error}") from error
    raise SetupError(f"limits: {path}: another limit server answers there; stop it first")
