"""One connection of a client: strict HTTP/1.1 in, answers out, one request at a time."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from expertmesh.gateway.api import ApiError
from expertmesh.gateway.headers import read_headers
from expertmesh.gateway.limits import GatewayLimits

_REASONS: Final = {
    200: b"OK",
    201: b"Created",
    204: b"No Content",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    409: b"Conflict",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    417: b"Expectation Failed",
    422: b"Unprocessable Content",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}
_STATUS_LINES: Final = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, reason) for status, reason in _REASONS.items()
}
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_SCREENED_BODY_BYTES: Final = 16 * 1024
"""A longer body is taken only after its head has been found good."""
_MOST_PIPELINED: Final = 32
_MOST_WAITING_BYTES: Final = 1024 * 1024
"""Of bodies behind the request under way; beyond either no more is read."""
_WIRE_BYTES_OF_A_BYTE: Final = 6
"""A chunk of one byte has that many."""
_LINGER_BYTES: Final = 32 * 1024 * 1024
_LINGER_S: Final = 2.0
"""So much of a refused body is still taken off the wire: a client that is cut off while it sends
does not get to see the answer."""

_NO_HEADERS: Final = read_headers(())


class Request:
    """One request as it came; `refusal` is set when its head or size already decides."""

    __slots__ = (
        "body",
        "extra_lines",
        "headers",
        "keep_alive",
        "look",
        "method",
        "path",
        "query",
        "refusal",
        "version",
    )

    def __init__(self) -> None:
        self.method = b""
        self.path = ""
        self.query = b""
        self.version = "1.1"
        self.headers = _NO_HEADERS
        self.body = b""
        self.extra_lines = b""
        """Header lines that go into any answer to it."""
        self.keep_alive = True
        self.look: asyncio.Future[None] | None = None
        """Until it is done, nobody can say whose request it is."""
        self.refusal: ApiError | None = None


class Watcher(Protocol):
    """Who answers the request under way, and wants to know what becomes of the client."""

    def client_gone(self) -> None: ...
    def client_full(self) -> None:
        """Send no more until it has drained."""
        ...

    def client_drained(self) -> None: ...


class Handler(Protocol):
    def screen(self, request: Request) -> ApiError | asyncio.Future[None] | None:
        """What the head alone decides, before a long body is taken; a future: ask again then."""
        ...

    def handle(self, request: Request, client: "ClientConnection") -> None:
        """Answer, now or later, with one of the connection's methods."""
        ...

    def refuse(self, request: Request, client: "ClientConnection", error: ApiError) -> None:
        """Answer with an error for which the connection itself has found the reason."""
        ...


class ClientConnection(asyncio.Protocol):
    """A closed half of a connection counts as a client that has gone: whoever wants an answer
    keeps both halves open, as all HTTP clients do."""

    __slots__ = (
        "_active",
        "_arrived",
        "_body",
        "_chunked",
        "_closing",
        "_connections",
        "_fed_size",
        "_first_size",
        "_handler",
        "_head_done",
        "_head_size",
        "_idle_since_s",
        "_input_ended",
        "_limits",
        "_linger_until_s",
        "_lingered",
        "_now_s",
        "_parser",
        "_paused_reading",
        "_raw_headers",
        "_receiving",
        "_since_s",
        "_streaming",
        "_stuck_since_s",
        "_transport",
        "_turning",
        "_undecided",
        "_url",
        "_wire_size",
        "gone",
        "watcher",
    )

    def __init__(
        self,
        handler: Handler,
        connections: "set[ClientConnection]",
        limits: GatewayLimits,
        now_s: Callable[[], float],
    ) -> None:
        """`now_s` is a monotonic clock."""
        self._handler = handler
        self._connections = connections
        self._limits = limits
        self._now_s = now_s
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._receiving: Request | None = None
        self._arrived: deque[Request] = deque()
        self._active: Request | None = None
        self._url = b""
        self._raw_headers: list[tuple[bytes, bytes]] = []
        self._body: bytes | bytearray = b""
        self._head_done = False
        self._fed_size = 0
        """Of what has come last."""
        self._first_size = 0
        """Of that in which the request began; other requests may be in it."""
        self._head_size = 0
        """Of the head, as far as it came later than that."""
        self._wire_size = 0
        """Of what came after the head."""
        self._turning = False
        self._streaming = False
        self._chunked = False
        self._closing = False
        self._input_ended = False
        """What still comes in is dropped."""
        self._paused_reading = False
        self._undecided: Request | None = None
        """It is to be screened again before more of its body is taken."""
        self._since_s = 0.0
        self._idle_since_s = now_s()
        self._stuck_since_s: float | None = None
        self._linger_until_s: float | None = None
        self._lingered = 0
        self.gone = False
        self.watcher: Watcher | None = None

    # The transport calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = self._closing = True
        self._connections.discard(self)
        self._arrived.clear()
        self._receiving = None
        self._body = b""
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.client_gone()

    def eof_received(self) -> bool:
        return False  # the transport closes

    def pause_writing(self) -> None:
        self._stuck_since_s = self._now_s()
        if self.watcher is not None:
            self.watcher.client_full()

    def resume_writing(self) -> None:
        self._stuck_since_s = None
        if self.watcher is not None:
            self.watcher.client_drained()
        if self._arrived and not self._turning:
            self._turn()

    def data_received(self, data: bytes) -> None:
        if self._input_ended:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self._transport.abort()
            return
        size = self._fed_size = len(data)
        if self._receiving is not None:
            if self._head_done:
                self._wire_size += size
            else:
                self._head_size += size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Another protocol is offered and need not be taken: what was asked is answered.
            self._arrived[-1].keep_alive = False
            self._input_ended = True
        except httptools.HttpParserError as error:
            # What stood whole before the fault is answered first.
            self._refuse(ApiError(400, f"The request is no valid HTTP/1.1: {_reason(error)}."))
            return
        receiving = self._receiving
        if receiving is not None:
            if receiving.refusal is not None:
                self._refuse(receiving.refusal)
                return
            if not self._head_done:
                if self._head_size > self._limits.head_bytes:
                    self._refuse(self._head_too_large())
                    return
            elif receiving.headers.chunked and self._framing_too_large():
                self._refuse(
                    ApiError(431, "The request's chunks have far more around them than in them.")
                )
                return
        if self._arrived and not self._turning:
            self._turn()
        if self._undecided is not None or (self._arrived and self._backlog_full()):
            self.hold()

    # The parser calls these.

    def on_message_begin(self) -> None:
        self._receiving = Request()
        self._head_done = False
        self._url = b""
        self._raw_headers = []
        self._body = b""
        self._first_size = self._fed_size
        self._head_size = self._wire_size = 0
        self._since_s = self._now_s()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come here too; nothing here has a use for one.
        if not self._head_done:
            self._raw_headers.append((name, value))

    def on_headers_complete(self) -> None:
        request = self._receiving
        assert request is not None
        self._head_done = True
        parser = self._parser
        request.method = parser.get_method()
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive()
        url = self._url
        if url[:1] != b"/":
            url = _without_authority(url)
        path, _, request.query = url.partition(b"?")
        request.path = path.decode("latin-1")
        headers = request.headers = read_headers(self._raw_headers)
        request.refusal = self._head_fault(request)
        if request.refusal is not None:
            return
        size = headers.content_length
        if (
            size > _SCREENED_BODY_BYTES
            or size > self._limits.body_bytes
            or headers.chunked
            or headers.expects_continue
        ):
            self._screen(request)

    def on_body(self, body: bytes) -> None:
        request = self._receiving
        if request is None or request.refusal is not None:
            return
        if not self._body:
            self._body = body
        else:
            if type(self._body) is bytes:
                self._body = bytearray(self._body)
            self._body += body
        if len(self._body) > self._limits.body_bytes:
            self._body = b""
            request.refusal = self._body_too_large()

    def on_message_complete(self) -> None:
        request = self._receiving
        assert request is not None
        self._receiving = None
        request.body = bytes(self._body)
        self._body = b""
        self._arrived.append(request)

    # The handler calls these.

    @property
    def full(self) -> bool:
        """The client reads more slowly than its answer comes."""
        return self._stuck_since_s is not None

    def hold(self) -> None:
        """Take no more from the client until `release`, or the end of this answer."""
        if not self._paused_reading and not self._closing:
            self._paused_reading = True
            self._transport.pause_reading()

    def release(self) -> None:
        if (
            self._paused_reading
            and not self._closing
            and self._undecided is None
            and not self._backlog_full()
        ):
            self._paused_reading = False
            self._since_s = self._now_s()  # what it could not send meanwhile was not late
            self._transport.resume_reading()

    def send_whole(self, status: int, headers: bytes, body: bytes) -> None:
        """A whole answer; `headers` are lines, without the length, the connection and the date."""
        request = self._active
        if request is None or self.gone:
            return
        parts = [
            _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status,
            headers,
            request.extra_lines,
            b"content-length: %d\r\n" % len(body),
            self._connection_line(request),
            b"\r\n",
        ]
        if request.method != b"HEAD":
            parts.append(body)
        self._transport.write(b"".join(parts))
        self._finish()

    def begin_stream(self, headers: bytes) -> None:
        request = self._active
        if request is None or self.gone:
            return
        self._streaming = True
        self._chunked = request.version != "1.0"
        if self._chunked:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            request.keep_alive = False
            framing = b""
        self._transport.write(
            b"%b%b%b%b%b\r\n"
            % (
                _STATUS_LINES[200],
                headers,
                request.extra_lines,
                framing,
                self._connection_line(request),
            )
        )

    def send(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if not self.gone:
            self._transport.write(data)

    def end_stream(self, data: bytes = b"") -> None:
        """The last bytes of the stream, and its end."""
        if self.gone:
            return
        if self._chunked:
            last = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data = last + b"0\r\n\r\n"
        if data:
            self._transport.write(data)
        self._streaming = self._chunked = False
        self._finish()

    # The server calls these.

    def close(self) -> None:
        """After what has been written; an answer under way is cut off."""
        self._closing = True
        self._transport.close()

    def drain(self) -> None:
        """Close when the request under way is answered."""
        self._closing = True
        if self._active is None:
            self._transport.close()

    def use(self, limits: GatewayLimits) -> None:
        self._limits = limits

    def check(self, now_s: float) -> None:
        """Ends what has taken too long: called about once a second."""
        limits = self._limits
        stuck_s = self._stuck_since_s
        if stuck_s is not None and now_s - stuck_s > limits.client_stall_timeout_s:
            self._transport.abort()
        elif self._linger_until_s is not None:
            if now_s > self._linger_until_s:
                self._transport.abort()
        elif self._closing and self._active is None:
            # The last bytes of an answer may be too few to make the connection full.
            if now_s - self._idle_since_s > limits.client_stall_timeout_s:
                self._transport.abort()
        elif self._receiving is not None and self._active is None:
            allowed_s = limits.body_timeout_s if self._head_done else limits.head_timeout_s
            if now_s - self._since_s > allowed_s:
                part = "body" if self._head_done else "head"
                self._refuse(
                    ApiError(408, f"The request's {part} was not whole after {allowed_s:g} s.")
                )
        elif self._active is None and now_s - self._idle_since_s > limits.keep_alive_s:
            self.close()

    # Inside.

    def _head_fault(self, request: Request) -> ApiError | None:
        """What the parser lets pass and this server does not."""
        raw, headers = self._raw_headers, request.headers
        if len(raw) > self._limits.headers:
            return ApiError(
                431,
                f"The request has {len(raw)} header fields; "
                f"at most {self._limits.headers} are accepted.",
            )
        if self._first_size + self._head_size > self._limits.head_bytes:
            # A part of the body may have come with the head.
            head_bytes = len(self._url) + sum(len(name) + len(value) + 4 for name, value in raw)
            if head_bytes > self._limits.head_bytes:
                return self._head_too_large()
        if request.version == "1.1":
            if headers.hosts != 1:
                return ApiError(400, "An HTTP/1.1 request has one Host header, not more or none.")
            if headers.transfer_encodings and not headers.chunked:
                return ApiError(501, "Of the transfer encodings only 'chunked' is offered.")
        elif request.version != "1.0":
            return ApiError(400, "Of HTTP only the versions 1.1 and 1.0 are spoken here.")
        elif headers.transfer_encodings:
            return ApiError(400, "HTTP/1.0 has no transfer encodings.")
        if headers.unknown_expectation:
            return ApiError(417, "Of the expectations only '100-continue' is met.")
        return None

    def _screen(self, request: Request) -> None:
        verdict = self._handler.screen(request)
        if isinstance(verdict, asyncio.Future):
            self._undecided = request
            verdict.add_done_callback(lambda _: self._screen_again(request))
            return
        request.refusal = verdict
        if request.refusal is None and request.headers.content_length > self._limits.body_bytes:
            request.refusal = self._body_too_large()
        if (
            request.headers.expects_continue
            and request.refusal is None
            and self._active is None
            and not self._arrived
        ):
            self._transport.write(_CONTINUE)

    def _screen_again(self, request: Request) -> None:
        if self._undecided is request:
            self._undecided = None
        if self.gone or self._closing:
            return
        self.release()  # what is refused is still taken off the wire
        if self._receiving is request and request.refusal is None:
            self._screen(request)
            if request.refusal is not None:
                self._refuse(request.refusal)

    def _turn(self) -> None:
        """Hand over requests, one after the other: the next when the one before is answered and
        the client takes its answers."""
        self._turning = True
        try:
            while (
                self._arrived
                and self._active is None
                and not self._closing
                and self._stuck_since_s is None
            ):
                request = self._arrived.popleft()
                self._active = request
                if request.refusal is not None:
                    request.keep_alive = False
                    self._input_ended = True
                    self._handler.refuse(request, self, request.refusal)
                else:
                    self._handler.handle(request, self)
        finally:
            self._turning = False

    def _finish(self) -> None:
        request = self._active
        self._active = None
        self.watcher = None
        self._idle_since_s = self._now_s()
        if self._closing or (request is not None and not request.keep_alive):
            self._closing = True
            if self._input_ended:
                self._linger()
            else:
                self._transport.close()
            return
        self.release()
        if self._arrived and not self._turning:
            self._turn()

    def _refuse(self, error: ApiError) -> None:
        """The input cannot be followed any further: this answer is the last one, after those to
        the requests before it."""
        request = self._receiving or Request()
        self._receiving = None
        self._body = b""
        self._input_ended = True
        request.refusal = error
        self._arrived.append(request)
        if not self._turning:
            self._turn()

    def _backlog_full(self) -> bool:
        arrived = self._arrived
        return (
            len(arrived) > _MOST_PIPELINED
            or sum(len(request.body) for request in arrived) > _MOST_WAITING_BYTES
        )

    def _framing_too_large(self) -> bool:
        """Chunk extensions and trailers are dropped, but they do not come without end."""
        allowed = _WIRE_BYTES_OF_A_BYTE * len(self._body) + self._limits.head_bytes
        return self._wire_size > allowed

    def _linger(self) -> None:
        """The client sees the end of the answer at once; its own bytes are taken a little longer,
        since a reset would destroy the answer on its way."""
        self._linger_until_s = self._now_s() + _LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _connection_line(self, request: Request) -> bytes:
        if self._closing or not request.keep_alive:
            request.keep_alive = False
            return b"connection: close\r\n"
        return b"connection: keep-alive\r\n" if request.version == "1.0" else b""

    def _head_too_large(self) -> ApiError:
        return ApiError(
            431, f"The request's head is over the limit of {self._limits.head_bytes} bytes."
        )

    def _body_too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request body is over the limit of {self._limits.body_bytes} bytes; "
            "send a shorter one.",
            code="request_too_large",
        )


def _without_authority(url: bytes) -> bytes:
    """Of a request line in the absolute form, which is meant for proxies."""
    scheme, separator, rest = url.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return url
    _, slash, path = rest.partition(b"/")
    return slash + path if slash else b"/"


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
