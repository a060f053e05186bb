"""Limits in the server of this host, for one of several workers."""

import asyncio
import logging
import time
from collections import deque
from pathlib import Path
from typing import Final, cast

import msgspec

from expertmesh.core.admission.reservation import Estimate, Refused, Reserved
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.gateway.limit_wire import (
    MOST_INTEGER,
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
    decode_answers,
    frames,
)
from expertmesh.gateway.limiter import OnUnavailable, unavailable

_log = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.1
_CONNECT_TIMEOUT_S = 1.0
_SECOND_LOOK_S = 0.01
_MOST_UNSETTLED = 100_000
"""Some 60 MB; what is dropped stays as estimated."""

_UNLIMITED = Reserved(None)


class SharedLimiter:
    """All calls of one turn of the event loop travel in one write."""

    def __init__(
        self,
        path: Path,
        worker: str,
        on_unavailable: OnUnavailable,
        timeout_s: float = 0.25,
    ) -> None:
        """`worker` is unique per start of a worker. A call that has no answer within `timeout_s`
        gets what `on_unavailable` says, and so do all others until the server is back.
        """
        self._path: Final = path
        self._worker: Final = worker
        self._unavailable: Final = unavailable(on_unavailable)
        self._timeout_s: Final = timeout_s
        self._connection: _Connection | None = None
        """Only when the server takes reservations."""
        self._server: str | None = None
        self._seq = 0
        self._asked: dict[int, tuple[asyncio.Future[Reserved | Refused], Reserve, float]] = {}
        """Not yet answered, in order, with the time until which they wait."""
        self._open: dict[str, tuple[tuple[Account, ...], Reserve]] = {}
        self._unsettled: deque[Settle] = deque()
        """Not yet acknowledged, in order; the server takes repetitions."""
        self._settling: dict[str, tuple[tuple[Account, ...], Reserve]] = {}
        """What the unsettled ones had reserved."""
        self._handles: dict[str, tuple[int, Limits]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._settled_by_s: float | None = None
        self._suspect = False
        self._changed = asyncio.Event()
        self.unavailable_calls = 0
        self.dropped_settlements = 0

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def reserve(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> Reserved | Refused | asyncio.Future[Reserved | Refused]:
        if not accounts:
            return _UNLIMITED
        connection = self._connection
        if connection is None:
            self.unavailable_calls += 1
            return self._unavailable
        loop = connection.loop
        self._seq = seq = self._seq + 1
        question = Reserve(
            seq,
            reservation_id,
            self._handles_of(accounts, connection),
            estimate.tokens,
            min(estimate.pico_usd, MOST_INTEGER),
            now_s,
        )
        future: asyncio.Future[Reserved | Refused] = loop.create_future()
        self._asked[seq] = (future, question, loop.time() + self._timeout_s)
        self._open[reservation_id] = (accounts, question)
        connection.send(question)
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._look_for_late)
        return future

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        """What is not open at the server has nothing to settle there: unlimited, or let in while it
        was away."""
        reserved = self._open.pop(reservation_id, None)
        if reserved is not None:
            self._settling[reservation_id] = reserved
            self._settle(reservation_id, tokens, pico_usd, now_s)

    async def run(self) -> None:
        failing = False
        while True:
            try:
                lost = await self._connect()
            except (OSError, TimeoutError) as error:
                if not failing:
                    _log.warning("limits: %s: %s", self._path, str(error) or type(error).__name__)
                failing = True
            else:
                if failing:
                    _log.info("limits: %s: the server is back", self._path)
                failing = False
                await lost
                _log.warning("limits: %s: the connection is lost", self._path)
            await asyncio.sleep(_RETRY_PAUSE_S)

    async def wait_connected(self, timeout_s: float) -> bool:
        """For a worker that opens its port only when limits can be read."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._connection is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Waits for the acknowledgement of what was settled, for a second at most."""
        deadline_s = time.monotonic() + 1.0
        while self._unsettled and self._connection is not None:
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.01)
        if self._unsettled:
            _log.warning(
                "limits: %d settlements did not reach the server; they stay as estimated",
                len(self._unsettled),
            )
        if self._connection is not None:
            self._connection.abort()
        self._give_up_all()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _connect(self) -> asyncio.Future[None]:
        """Returns what is done when the connection is lost, which was made and greeted."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, connection = await loop.create_unix_connection(
                lambda: _Connection(self, loop), str(self._path)
            )
            try:
                connection.send(Hello(self._worker))
                await asyncio.shield(connection.greeted)
            except BaseException:
                connection.abort()
                raise
        return connection.lost

    def _welcome(self, welcome: Welcome, connection: "_Connection") -> None:
        """First what was open at a server that is gone, then what is not settled, in order.

        What was settled at its end is told as open too. Whether the ledger had it when the new one
        read it nobody knows: a budget may be charged twice for it, and is never overspent.
        """
        self._handles.clear()
        if self._server is not None and welcome.server != self._server:
            for accounts, question in (*self._settling.values(), *self._open.values()):
                connection.send(
                    Adopt(
                        question.reservation_id,
                        self._handles_of(accounts, connection),
                        question.tokens,
                        question.pico_usd,
                        question.now_s,
                    )
                )
        self._server = welcome.server
        for settlement in self._unsettled:
            connection.send(settlement)
        if welcome.wait_s > 0:
            connection.loop.call_later(welcome.wait_s, self._begin, connection, self._seq)
        else:
            self._begin(connection, self._seq)

    def _begin(self, connection: "_Connection", told_seq: int) -> None:
        """Reservations may be asked for; settlements up to `told_seq` have been told."""
        if connection.is_lost:
            return
        self._connection = connection
        for settlement in self._unsettled:
            if settlement.seq > told_seq:
                connection.send(settlement)
        self._expect(connection)
        self._changed.set()

    def _disconnected(self, connection: "_Connection") -> None:
        if self._connection is connection:
            self._connection = None
            self._settled_by_s = None
            self._suspect = False
            self._give_up_all()

    def _answered(self, answers: list[Answer]) -> None:
        asked = self._asked
        for answer in answers:
            if isinstance(answer, Granted):
                call = asked.pop(answer.seq, None)
                if call is not None:
                    if call[0].done():
                        # The caller went away: nothing was used.
                        self.settle(call[1].reservation_id, 0, 0, call[1].now_s)
                    else:
                        call[0].set_result(
                            _UNLIMITED if answer.headroom is None else Reserved(answer.headroom)
                        )
            elif isinstance(answer, Denied):
                call = asked.pop(answer.seq, None)
                if call is not None:
                    self._open.pop(call[1].reservation_id, None)
                    if not call[0].done():
                        call[0].set_result(
                            Refused(
                                answer.kind,
                                answer.account,
                                answer.limit,
                                answer.retry_after_s,
                                answer.headroom,
                            )
                        )
            elif isinstance(answer, Done):
                unsettled = self._unsettled
                while unsettled and unsettled[0].seq <= answer.seq:
                    self._settling.pop(unsettled.popleft().reservation_id, None)
                self._settled_by_s = None
                if unsettled and self._connection is not None:
                    self._expect(self._connection)

    def _settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        self._seq = seq = self._seq + 1
        settlement = Settle(
            seq, reservation_id, min(tokens, MOST_INTEGER), min(pico_usd, MOST_INTEGER), now_s
        )
        if len(self._unsettled) >= _MOST_UNSETTLED:
            self._settling.pop(self._unsettled.popleft().reservation_id, None)
            self.dropped_settlements += 1
        self._unsettled.append(settlement)
        connection = self._connection
        if connection is not None:
            connection.send(settlement)
            if self._settled_by_s is None:
                self._expect(connection)

    def _expect(self, connection: "_Connection") -> None:
        """An acknowledgement, in time."""
        if self._unsettled:
            self._settled_by_s = connection.loop.time() + 4 * self._timeout_s
            if self._timer is None:
                self._timer = connection.loop.call_later(self._timeout_s, self._look_for_late)

    def _look_for_late(self) -> None:
        self._timer = None
        connection = self._connection
        if connection is None:
            return
        due_s = self._settled_by_s
        if self._asked:
            _, _, asked_by_s = next(iter(self._asked.values()))
            due_s = asked_by_s if due_s is None else min(due_s, asked_by_s)
        if due_s is None:
            self._suspect = False
            return
        loop = connection.loop
        late = due_s <= loop.time()
        if late and self._suspect:
            _log.warning("limits: %s: no answer in time", self._path)
            connection.abort()
            self._disconnected(connection)
            return
        # A loop that was busy for so long has not read the answer yet: it gets one more turn.
        self._suspect = late
        pause_s = _SECOND_LOOK_S if late else self._timeout_s / 4
        self._timer = loop.call_later(pause_s, self._look_for_late)

    def _give_up_all(self) -> None:
        """Nobody knows whether the server granted them, so they are settled as unused later."""
        asked, self._asked = self._asked, {}
        for future, question, _ in asked.values():
            self.settle(question.reservation_id, 0, 0, question.now_s)
            if not future.done():
                self.unavailable_calls += 1
                future.set_result(self._unavailable)

    def _handles_of(
        self, accounts: tuple[Account, ...], connection: "_Connection"
    ) -> tuple[int, ...]:
        handles = []
        for account in accounts:
            known = self._handles.get(account.name)
            if known is None or known[1] is not account.limits:
                known = self._define(account, known, connection)
            handles.append(known[0])
        return tuple(handles)

    def _define(
        self, account: Account, known: tuple[int, Limits] | None, connection: "_Connection"
    ) -> tuple[int, Limits]:
        handle = len(self._handles) if known is None else known[0]
        if known is None or known[1] != account.limits:
            connection.send(Define(handle, account.name, account.limits))
        entry = self._handles[account.name] = (handle, account.limits)
        return entry


class _Connection(asyncio.Protocol):
    def __init__(self, limiter: SharedLimiter, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._limiter: Final = limiter
        self._reader: Final = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[Question] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._limiter._disconnected(self)
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionResetError("the server hung up"))
            self.greeted.exception()  # Whoever waited may have given up: that is no fault.
        if not self.lost.done():
            self.lost.set_result(None)

    @property
    def is_lost(self) -> bool:
        return self._transport is None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def send(self, question: Question) -> None:
        if not self._outgoing:
            self.loop.call_soon(self._flush)
        self._outgoing.append(question)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._reader.feed(data):
                answers = decode_answers(payload)
                if answers and isinstance(answers[0], Welcome):
                    self._limiter._welcome(answers[0], self)
                    if not self.greeted.done():
                        self.greeted.set_result(None)
                self._limiter._answered(answers)
        except (FrameError, msgspec.DecodeError) as error:
            _log.warning("limits: the server sent no answer: %s", error)
            self.abort()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._transport is not None and outgoing:
            self._transport.write(frames(outgoing))
