"""Connections to ranks: kept open between requests, one answer at a time on each."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import httptools
import msgspec

_MOST_IDLE: Final = 256
"""Idle connections kept to one rank."""
_MOST_BARREN_BYTES: Final = 64 * 1024
"""Of an answer without a byte of its body: a head, chunk extensions or trailers."""


@dataclass(frozen=True, slots=True)
class Origin:
    host: str
    port: int
    tls: bool = False
    name: str = ""
    """Of all three; connections are kept by it."""

    @classmethod
    def of(cls, url: str) -> "Origin":
        """Of an http or https URL."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if tls else 80)
        return cls(host, port, tls, f"{parts.scheme}://{host}:{port}")


class AnswerHead(msgspec.Struct, frozen=True, gc=False):
    status: int
    content_type: bytes
    retry_after: bytes


class Asker(Protocol):
    """Who has a request under way on a connection."""

    def connected(self, connection: "RankConnection") -> None: ...
    def not_connected(self, reason: str) -> None: ...
    def answer_began(self, head: AnswerHead) -> None: ...
    def answer_part(self, data: bytes) -> None: ...
    def answer_ended(self) -> None:
        """The connection has been given back already."""
        ...

    def answer_lost(self, reason: str, fresh: bool) -> None:
        """`fresh`: nothing of the answer had come, over a connection that had stood idle: it may
        have been closed just then."""
        ...


class RankConnection(asyncio.Protocol):
    __slots__ = (
        "_asker",
        "_barren_bytes",
        "_complete",
        "_content_type",
        "_excess",
        "_framed",
        "_head",
        "_kept",
        "_parser",
        "_parts",
        "_pool",
        "_reading_paused",
        "_retry_after",
        "_reused",
        "_transport",
        "_write_full",
        "idle_since_s",
        "origin",
    )

    def __init__(self, pool: "RankPool", origin: Origin) -> None:
        self.origin = origin
        self.idle_since_s = 0.0
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._asker: Asker | None = None
        self._reused = False
        self._reading_paused = False
        self._head: AnswerHead | None = None
        self._barren_bytes = 0
        """Since the last byte of the body."""
        self._content_type = b""
        self._retry_after = b""
        self._framed = False
        self._parts: list[bytes] = []
        self._complete = False
        self._excess = False
        """More has come than the answer."""
        self._kept = False

    def ask(self, asker: Asker, request: bytes, reused: bool) -> None:
        self._asker = asker
        self._reused = reused
        self._head = None
        self._barren_bytes = 0
        self._content_type = self._retry_after = b""
        self._framed = self._complete = self._excess = False
        self._transport.write(request)

    def pause(self) -> None:
        """Take no more of the answer until `resume`."""
        if not self._reading_paused and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def drop(self) -> None:
        """Give up on the answer; the rank sees the connection end and stops its work."""
        self._asker = None
        self._transport.abort()

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    # The transport calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        asker, self._asker = self._asker, None
        if asker is None:
            return
        if self._head is not None and not self._framed:
            asker.answer_ended()  # its end is that of the connection
        else:
            reason = str(exc) if exc is not None else "the rank closed the connection"
            nothing_came = self._head is None and not self._barren_bytes
            asker.answer_lost(reason, self._reused and nothing_came)

    def data_received(self, data: bytes) -> None:
        asker = self._asker
        if asker is None:
            self._transport.abort()  # nobody has asked
            return
        began = self._head is not None
        self._barren_bytes += len(data)
        fault = ""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            fault = f"sent no valid HTTP: {error}"
        if self._head is None:
            if not fault and self._barren_bytes > _MOST_BARREN_BYTES:
                fault = "sent a head without end"
            if fault:
                self._fail(fault)
            return
        if not began:
            asker.answer_began(self._head)
        parts = self._parts
        if parts:
            self._parts = []
            self._barren_bytes = 0
            # The asker may have dropped this connection for what it has been given.
            if self._asker is asker:
                asker.answer_part(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._asker is not asker:
            return
        if self._complete:
            self._end(asker, bool(fault))
        elif fault:
            self._fail(fault)
        elif self._barren_bytes > _MOST_BARREN_BYTES:
            self._fail("sent a chunk's extension or trailers without end")

    # The parser calls these.

    def on_message_begin(self) -> None:
        self._excess = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name)
        if size == 12:
            if name.lower() == b"content-type":
                self._content_type = value
        elif size == 14:
            if name.lower() == b"content-length":
                self._framed = True
        elif size == 17:
            if name.lower() == b"transfer-encoding":
                self._framed = True
        elif size == 11 and name.lower() == b"retry-after":
            self._retry_after = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self._excess:
            self._head = AnswerHead(status, self._content_type, self._retry_after)

    def on_body(self, body: bytes) -> None:
        if not self._excess:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        # An interim answer (1xx) is none.
        if self._head is not None:
            self._complete = True
            # Afterwards the parser knows nothing of this answer any more.
            self._kept = self._parser.should_keep_alive()

    def _end(self, asker: Asker, fault_behind: bool) -> None:
        self._asker = None
        self.resume()
        if self._excess or fault_behind:
            # Whatever it is, it must not become the answer to another request.
            self._transport.abort()
        elif self._kept and not self._transport.is_closing():
            self._pool.give_back(self)
        else:
            self._transport.close()
        asker.answer_ended()

    def _fail(self, reason: str) -> None:
        asker, self._asker = self._asker, None
        self._transport.abort()
        if asker is not None:
            asker.answer_lost(reason, False)


class RankPool:
    def __init__(self, connect_timeout_s: float, idle_s: float, now_s: Callable[[], float]) -> None:
        """`idle_s` stays below the time after which ranks close idle connections, so that hardly
        one is used while it closes. `now_s` is a monotonic clock."""
        self.connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._now_s = now_s
        self._idle: dict[str, list[RankConnection]] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._tls: ssl.SSLContext | None = None

    def take(self, origin: Origin) -> RankConnection | None:
        """The idle connection that was used last; None when there is none."""
        idle = self._idle.get(origin.name)
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def connect(self, origin: Origin, asker: Asker) -> "asyncio.Task[None]":
        """Tells the asker how it went; cancel the task to stop that."""
        task = asyncio.get_running_loop().create_task(self._connect(origin, asker))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    def give_back(self, connection: RankConnection) -> None:
        idle = self._idle.get(connection.origin.name)
        if idle is None:
            idle = self._idle[connection.origin.name] = []
        if len(idle) >= _MOST_IDLE:
            connection.drop()
            return
        connection.idle_since_s = self._now_s()
        idle.append(connection)

    def lost(self, connection: RankConnection) -> None:
        idle = self._idle.get(connection.origin.name)
        if idle and connection in idle:
            idle.remove(connection)

    def sweep(self, now_s: float) -> None:
        """Closes what has been idle for too long: called about once a second."""
        for origin, idle in list(self._idle.items()):
            # The oldest come first: the newest are taken first.
            while idle and now_s - idle[0].idle_since_s > self._idle_s:
                idle.pop(0).drop()
            if not idle:
                del self._idle[origin]

    @property
    def idle_connections(self) -> int:
        return sum(map(len, self._idle.values()))

    async def close(self) -> None:
        for idle in self._idle.values():
            for connection in list(idle):
                connection.drop()
        self._idle.clear()
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)

    async def _connect(self, origin: Origin, asker: Asker) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: RankConnection(self, origin),
                    origin.host,
                    origin.port,
                    ssl=self._tls_context() if origin.tls else None,
                )
        except TimeoutError:
            asker.not_connected(f"no connection within {self.connect_timeout_s:g} s")
        except OSError as error:
            asker.not_connected(f"no connection: {error.strerror or error}")
        else:
            asker.connected(connection)

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
