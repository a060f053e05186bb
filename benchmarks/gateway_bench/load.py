"""The load generator: bare connections that send prepared bytes and take times.

One process, one loop, no HTTP library: what it costs itself has to stay far below what it measures.
Counts and times go into a `Tally`; whoever drives the load reads it before and after a window.
"""

import asyncio
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

from benchmarks.gateway_bench.upstream import MODEL

PROMPT_BYTES = 1024
ASLEEP_MODEL = "bench-asleep"
"""In the fleet, without a group: requests for it are held."""
_CONVERSATIONS = 64
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength:\s*(\d+)").search
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_SHORT = len(_LAST_CHUNK)


class LoadError(Exception):
    """What was measured answers wrongly, so that its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Way:
    """Where requests go: straight to the upstream, or through one gateway."""

    name: str
    ports: tuple[int, ...]
    """On 127.0.0.1; connections take them in turn."""
    key: str = ""
    beside_text: int = 3
    """Events of a stream that bring no text: the role, the reason of its end, and [DONE]."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request."""

    stream: bool = False
    events: int = 0
    """That bring text, of a stream."""
    pace_ms: int = 0
    """Between them; 0 for full speed."""
    model: str = MODEL

    def bytes_for(self, way: Way) -> tuple[bytes, ...]:
        """The whole requests of several conversations: caches and affinities see no single one."""
        return tuple(self._request(way, number) for number in range(_CONVERSATIONS))

    def _request(self, way: Way, number: int) -> bytes:
        pace = f"pace={self.pace_ms}ms " if self.pace_ms else ""
        text = f"Conversation {number:02}. {pace}"
        text += "The quick brown fox jumps over the lazy dog. " * (PROMPT_BYTES // 45 + 1)
        limit = self.events or 64
        stream = ',"stream":true' if self.stream else ""
        body = (
            f'{{"model":"{self.model}","messages":[{{"role":"user","content":'
            f'"{text[:PROMPT_BYTES]}"}}],"max_tokens":{limit},"temperature":0{stream}}}'
        )
        key = f"Authorization: Bearer {way.key}\r\n" if way.key else ""
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{way.ports[0]}\r\n{key}"
            f"Content-Type: application/json\r\nAccept: */*\r\nContent-Length: {len(body)}\r\n\r\n"
            f"{body}"
        ).encode()


WHOLE = Ask()


@dataclass(slots=True)
class Tally:
    done: int = 0
    """Answers that are whole and good."""
    failed: int = 0
    first_failure: str = ""
    events: int = 0
    """Server-sent events of all kinds, also of streams under way."""
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    """From sending to the end of the answer."""
    firsts_s: "array[float]" = field(default_factory=lambda: array("d"))
    """From sending to the first event."""
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Between arrivals within a stream."""

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or reason


class Connection(asyncio.Protocol):
    """One request at a time, on a connection that stays open."""

    def __init__(self, tally: Tally, finished: Callable[["Connection"], None]) -> None:
        """`finished` is called after each answer, good or bad, and may send the next request."""
        self._tally = tally
        self._finished = finished
        self._transport: asyncio.Transport | None = None
        self._held = b""
        self._in_body = False
        self._chunked = False
        self._rest = 0
        self._tail = b""
        self._good = False
        self._events = 0
        self._last_s = 0.0
        self.keeps_gaps = False
        self.expected_events = 0
        """Of a stream; an answer with another number is a failure."""
        self.sent_s = 0.0
        self.took_s = 0.0
        """The last answer, from sending to its end."""
        self.busy = False

    @property
    def lost(self) -> bool:
        return self._transport is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> None:
        if self._transport is None:
            self._tally.fail("the connection was closed between two requests")
            return
        self.busy = True
        self.sent_s = perf_counter()
        self._transport.write(request)

    def abort(self) -> None:
        self.busy = False
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.busy:
            self._tally.fail(f"the connection was closed within an answer: {exc or 'end'}")
            self._end(False, perf_counter())

    def data_received(self, data: bytes) -> None:
        if not self.busy:
            return
        now_s = perf_counter()
        if not self._in_body:
            if self._held:
                data = self._held + data
                self._held = b""
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                self._held = data
                return
            self._in_body = True
            self._good = data[9:12] == b"200"
            if not self._good:
                self._tally.fail(data[:600].decode(errors="replace"))
            found = _LENGTH(data, 0, end)
            if found is not None:
                self._chunked = False
                self._rest = int(found[1]) - len(data) + end
                if not self._rest:
                    self._end(self._good, now_s)
                return
            self._chunked = True
            self._tail = b"\r\n"
            self._events = 0
            data = data[end:]
            if not data:
                return
        if self._chunked:
            self._take_chunks(data, now_s)
            return
        self._rest -= len(data)
        if self._rest <= 0:
            self._end(self._good, now_s)

    def _take_chunks(self, data: bytes, now_s: float) -> None:
        tally = self._tally
        count = data.count(b"\n\n")
        tail = self._tail
        if data[0] == 10 and tail[-1] == 10:
            count += 1
        if count:
            if not self._events:
                tally.firsts_s.append(now_s - self.sent_s)
            elif self.keeps_gaps:
                tally.gaps_s.append(now_s - self._last_s)
            self._last_s = now_s
            self._events += count
            tally.events += count
        if len(data) < _SHORT:
            data = tail + data
        self._tail = data[-_SHORT:]
        if data.endswith(_LAST_CHUNK):
            good = self._good
            if good and self.expected_events and self._events != self.expected_events:
                good = False
                tally.fail(f"{self._events} events instead of {self.expected_events}")
            self._end(good, now_s)

    def _end(self, good: bool, now_s: float) -> None:
        self.busy = False
        self._in_body = False
        if good:
            self.took_s = now_s - self.sent_s
            self._tally.done += 1
            self._tally.times_s.append(self.took_s)
        self._finished(self)


async def connect(
    way: Way, number: int, tally: Tally, finished: Callable[[Connection], None]
) -> Connection:
    loop = asyncio.get_running_loop()
    port = way.ports[number % len(way.ports)]
    _, connection = await loop.create_connection(
        lambda: Connection(tally, finished), "127.0.0.1", port
    )
    return connection


async def _finish(connections: Sequence[Connection], patience_s: float) -> None:
    for _ in range(int(patience_s * 100)):
        if not any(connection.busy for connection in connections):
            break
        await asyncio.sleep(0.01)
    for connection in connections:
        connection.abort()


class ClosedLoop:
    """Each connection sends its next request when it has the answer to the last one."""

    def __init__(self, way: Way, ask: Ask, connections: int, keeps_gaps: bool = False) -> None:
        self.way = way
        self.tally = Tally()
        self._ask = ask
        self._requests = ask.bytes_for(way)
        self._number = connections
        self._keeps_gaps = keeps_gaps
        self._turn = 0
        self._open: list[Connection] = []
        self._stopping = False
        self._loop = asyncio.get_running_loop()

    async def start(self, spread_s: float = 0.0) -> None:
        """`spread_s`: the connections begin evenly within this time instead of at once."""
        self._open = [
            await connect(self.way, number, self.tally, self._next)
            for number in range(self._number)
        ]
        for number, connection in enumerate(self._open):
            connection.keeps_gaps = self._keeps_gaps
            if self._ask.stream:
                connection.expected_events = self._ask.events + self.way.beside_text
            self._loop.call_later(spread_s * number / self._number, self._next, connection)

    def _next(self, connection: Connection) -> None:
        if self._stopping:
            return
        if connection.lost:
            self._loop.create_task(self._reconnect(connection))
            return
        turn = self._turn
        self._turn = turn + 1
        connection.send(self._requests[turn % _CONVERSATIONS])

    async def _reconnect(self, lost: Connection) -> None:
        try:
            connection = await connect(self.way, len(self._open), self.tally, self._next)
        except OSError as error:
            self.tally.fail(f"no connection: {error}")
            return
        connection.keeps_gaps, connection.expected_events = lost.keeps_gaps, lost.expected_events
        self._open[self._open.index(lost)] = connection
        self._next(connection)

    async def stop(self, patience_s: float = 5.0) -> None:
        """Lets answers under way end; what is still open after `patience_s` is cut off."""
        self._stopping = True
        await _finish(self._open, patience_s)


class OpenLoop:
    """Requests leave at a fixed rate, whatever becomes of the earlier ones."""

    _TICK_S = 0.001
    _MOST_CONNECTIONS = 512

    def __init__(self, way: Way, ask: Ask, rate: float) -> None:
        self.way = way
        self.tally = Tally()
        self.unsent = 0
        """Were due while all connections were busy."""
        self._requests = ask.bytes_for(way)
        self._rate = rate
        self._loop = asyncio.get_running_loop()
        self._free: list[Connection] = []
        self._open: list[Connection] = []
        self._sent = 0
        self._started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        number = max(8, min(self._MOST_CONNECTIONS, int(self._rate * 0.1)))
        for index in range(number):
            self._open.append(await connect(self.way, index, self.tally, self._free.append))
        self._free.extend(self._open)
        self._started_s = self._loop.time()
        self._tick()

    def _tick(self) -> None:
        due = int((self._loop.time() - self._started_s) * self._rate)
        while self._sent < due:
            self._sent += 1
            if not self._free:
                self.unsent += 1
                continue
            connection = self._free.pop()
            if connection.lost:
                continue
            connection.send(self._requests[self._sent % _CONVERSATIONS])
        self._timer = self._loop.call_later(self._TICK_S, self._tick)

    async def stop(self, patience_s: float = 5.0) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await _finish(self._open, patience_s)


class OneAtATime:
    """A single connection, for differences between ways."""

    def __init__(self, way: Way, ask: Ask = WHOLE) -> None:
        self.way = way
        self.tally = Tally()
        self._ask = ask
        self._requests = ask.bytes_for(way)
        self._turn = 0
        self._connection: Connection | None = None
        self._answered: asyncio.Future[None] | None = None

    async def start(self) -> None:
        self._connection = await connect(self.way, 0, self.tally, self._finished)
        if self._ask.stream:
            self._connection.expected_events = self._ask.events + self.way.beside_text

    def _finished(self, _: Connection) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    async def ask_s(self) -> float:
        """Seconds of one request. Raises LoadError when it fails."""
        assert self._connection is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._turn += 1
        self._connection.send(self._requests[self._turn % _CONVERSATIONS])
        if self.tally.failed:
            raise LoadError(f"{self.way.name}: {self.tally.first_failure}")
        await self._answered
        if self.tally.failed:
            raise LoadError(f"{self.way.name}: {self.tally.first_failure}")
        return self._connection.took_s

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.abort()


async def hold(
    way: Way, number: int, model: str = ASLEEP_MODEL
) -> tuple[Tally, Sequence[Connection]]:
    """`number` requests that get no answer for now; the caller ends them."""
    tally = Tally()
    requests = Ask(model=model).bytes_for(way)
    held = []
    for index in range(number):
        connection = await connect(way, index, tally, lambda _: None)
        connection.send(requests[index % _CONVERSATIONS])
        held.append(connection)
    return tally, held
