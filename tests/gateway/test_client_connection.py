"""HTTP/1.1 as the gateway's own server speaks it, over real sockets, before an echo."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from expertmesh.gateway.api import ApiError
from expertmesh.gateway.client_connection import ClientConnection, Request
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.server import GatewayServer

LIMITS = GatewayLimits(
    body_bytes=100_000,
    head_bytes=4096,
    headers=20,
    head_timeout_s=0.3,
    body_timeout_s=0.3,
    keep_alive_s=0.4,
    client_stall_timeout_s=0.4,
)
HOST = b"Host: x\r\n"


class Echo:
    """Answers `<method> <path> <body>`; `/later` after a moment, `/stream` in three parts."""

    def __init__(self) -> None:
        self.handled: list[Request] = []
        self.gone = 0
        self.full = False

    def screen(self, request: Request) -> ApiError | None:
        if request.path == "/forbidden":
            return ApiError(403, "You may not.")
        return None

    def refuse(self, request: Request, client: ClientConnection, error: ApiError) -> None:
        client.send_whole(error.status, b"", error.message.encode())

    def handle(self, request: Request, client: ClientConnection) -> None:
        self.handled.append(request)
        client.watcher = self
        text = b"%b %b %b" % (request.method, request.path.encode(), request.body)
        if request.path == "/later":
            asyncio.get_running_loop().call_later(0.05, lambda: client.send_whole(200, b"", text))
        elif request.path == "/stream":
            client.begin_stream(b"content-type: text/event-stream\r\n")
            client.send(b"one ")
            client.send(b"two ")
            client.end_stream(b"three")
        elif request.path == "/flood":
            client.begin_stream(b"")
            while not self.full and not client.gone:
                client.send(b"x" * 10_000)
        elif request.path != "/never":
            client.send_whole(200, b"x-echo: 1\r\n", text)

    def client_gone(self) -> None:
        self.gone += 1

    def client_full(self) -> None:
        self.full = True

    def client_drained(self) -> None:
        self.full = False


class Wire:
    def __init__(self, port: int, echo: Echo, server: GatewayServer) -> None:
        self.port = port
        self.echo = echo
        self.server = server

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, data: bytes, pieces: int | None = None) -> bytes:
        """All that comes back until the server closes; `pieces`: bytes sent at once."""
        reader, writer = await self.open()
        if pieces is None:
            writer.write(data)
        else:
            for start in range(0, len(data), pieces):
                writer.write(data[start : start + pieces])
                await writer.drain()
                await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(limits: GatewayLimits = LIMITS) -> AsyncIterator[Wire]:
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    echo = Echo()
    server = GatewayServer(echo, limits, loop.time)
    await server.start(listener)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(0.02)
            server.sweep(loop.time())

    sweeping = asyncio.create_task(sweep())
    try:
        yield Wire(listener.getsockname()[1], echo, server)
    finally:
        sweeping.cancel()
        server.close()
        await asyncio.sleep(0.01)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with serving() as started:
        yield started


def get(path: str, close: bool = False, version: str = "1.1") -> bytes:
    tail = b"Connection: close\r\n" if close else b""
    return b"GET %b HTTP/%b\r\n%b%b\r\n" % (path.encode(), version.encode(), HOST, tail)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


async def test_requests_on_one_connection_are_answered_in_their_order(wire: Wire) -> None:
    answer = await wire.exchange(get("/later") + get("/b") + get("/c", close=True))
    assert statuses(answer) == [200, 200, 200]
    assert re.findall(rb"GET (/\w+)", answer) == [b"/later", b"/b", b"/c"]


@pytest.mark.parametrize("pieces", [1, 3, 7, 64])
async def test_a_request_may_come_in_pieces_of_any_size(wire: Wire, pieces: int) -> None:
    body = b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello"
    answer = await wire.exchange(body + get("/end", close=True), pieces)
    assert b"POST /p hello" in answer
    assert statuses(answer) == [200, 200]


async def test_chunks_extensions_and_trailers_are_taken_and_trailers_are_no_headers(
    wire: Wire,
) -> None:
    answer = await wire.exchange(
        b"POST /p HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        b"3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nAuthorization: Bearer smuggled\r\n\r\n"
    )
    assert b"POST /p hello" in answer
    assert wire.echo.handled[0].headers.secret is None


SMUGGLING = {
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "two equal lengths": b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "list of lengths": b"Content-Length: 5, 5\r\n\r\nhello",
    "signed length": b"Content-Length: +5\r\n\r\nhello",
    "negative length": b"Content-Length: -1\r\n\r\n",
    "hexadecimal length": b"Content-Length: 0x5\r\n\r\nhello",
    "unknown encoding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "encodings after chunked": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "tab before the colon": b"Content-Length\t: 5\r\n\r\nhello",
    "space before the colon": b"Content-Length : 5\r\n\r\nhello",
    "folded header": b"X-A: b\r\n Content-Length: 5\r\n\r\nhello",
    "line feed alone": b"X-A: b\nContent-Length: 5\r\n\r\nhello",
    "carriage return alone": b"X-A: b\rContent-Length: 5\r\n\r\nhello",
    "null in a value": b"X-A: a\x00b\r\n\r\n",
    "no name": b": b\r\n\r\n",
    "space in the chunk size": b"Transfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
    "signed chunk size": b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    "hexadecimal mark": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk longer than said": b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
    "huge chunk size": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    "second host": b"Host: y\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_what_two_servers_could_read_differently_is_refused(wire: Wire, name: str) -> None:
    head = b"POST /p HTTP/1.1\r\n" + HOST
    answer = await wire.exchange(head + SMUGGLING[name] + get("/smuggled"))
    assert statuses(answer) == [400]
    assert b"connection: close" in answer
    assert not wire.echo.handled


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Expect: magic\r\nContent-Length: 1\r\n\r\nx", 417),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 30 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 5000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 1_000_000, 431),
    ],
)
async def test_heads_that_are_refused(wire: Wire, data: bytes, expected: int) -> None:
    answer = await wire.exchange(data)
    assert statuses(answer) == [expected]
    assert not wire.echo.handled


async def test_what_is_answered_before_a_fault_keeps_its_answer(wire: Wire) -> None:
    answer = await wire.exchange(get("/later") + b"NONSENSE\r\n\r\n" + get("/lost"))
    assert statuses(answer) == [200, 400]
    assert [request.path for request in wire.echo.handled] == ["/later"]


async def test_an_expected_continue_comes_before_the_body(wire: Wire) -> None:
    reader, writer = await wire.open()
    writer.write(
        b"POST /p HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    assert b" 200 " in await reader.readuntil(b"hello")
    writer.close()


async def test_a_body_that_nobody_wants_is_refused_before_it_is_sent(wire: Wire) -> None:
    answer = await wire.exchange(
        b"POST /forbidden HTTP/1.1\r\n"
        + HOST
        + b"Expect: 100-continue\r\nContent-Length: 50000\r\n\r\n"
    )
    assert statuses(answer) == [403]


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_client_that_sends_too_much_still_gets_to_read_why(
    wire: Wire, framing: str
) -> None:
    size = 5_000_000
    if framing == "length":
        data = b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    else:
        chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
        data = b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 100
    answer = await wire.exchange(b"POST /p HTTP/1.1\r\n" + HOST + data)
    assert statuses(answer) == [413]


async def test_http_1_0_gets_a_whole_stream_without_chunks(wire: Wire) -> None:
    answer = await wire.exchange(get("/stream", version="1.0"))
    assert answer.endswith(b"\r\n\r\none two three")
    assert b"chunked" not in answer


async def test_http_1_0_may_keep_its_connection(wire: Wire) -> None:
    first = b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    answer = await wire.exchange(first + get("/b", version="1.0"))
    assert statuses(answer) == [200, 200]
    assert b"connection: keep-alive" in answer


async def test_head_has_the_length_and_no_body(wire: Wire) -> None:
    answer = await wire.exchange(b"HEAD /p HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"content-length: 8\r\n" in answer


async def test_an_upgrade_is_not_taken_and_the_request_is_answered(wire: Wire) -> None:
    answer = await wire.exchange(
        b"GET /p HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    )
    assert statuses(answer) == [200]


async def test_a_request_line_for_proxies_names_the_same_path(wire: Wire) -> None:
    answer = await wire.exchange(
        b"GET http://elsewhere/p?q=1 HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    )
    assert b"GET /p " in answer
    assert wire.echo.handled[0].query == b"q=1"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost", [408]),
        (b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhel", [408]),
        (b"", []),
        (get("/a"), [200]),
    ],
)
async def test_a_slow_or_idle_client_loses_its_connection(
    wire: Wire, data: bytes, expected: list[int]
) -> None:
    answer = await asyncio.wait_for(wire.exchange(data), 8)
    assert statuses(answer) == expected


@pytest.mark.parametrize("half", [True, False])
async def test_a_client_that_leaves_is_noticed_at_once(wire: Wire, half: bool) -> None:
    _, writer = await wire.open()
    writer.write(get("/never"))
    await until(lambda: wire.echo.handled)
    if half:
        writer.write_eof()
    else:
        writer.close()
    await until(lambda: wire.echo.gone, 0.1)
    writer.close()


async def test_a_client_that_reads_nothing_is_cut_off_and_holds_little() -> None:
    async with serving(replace(LIMITS, client_stall_timeout_s=0.3)) as wire:
        _, writer = await wire.open()
        writer.write(get("/flood"))
        await until(lambda: wire.echo.full)
        await until(lambda: wire.echo.gone)
        writer.close()


async def test_many_pipelined_requests_are_answered_in_order_without_deep_stacks(
    wire: Wire,
) -> None:
    count = 3000
    data = b"".join(get(f"/n{number}") for number in range(count)) + get("/end", close=True)
    answer = await wire.exchange(data)
    assert re.findall(rb"GET (/n\d+) ", answer) == [b"/n%d" % n for n in range(count)]


async def test_draining_answers_what_is_under_way_and_closes_the_rest(wire: Wire) -> None:
    idle_reader, idle_writer = await wire.open()
    reader, writer = await wire.open()
    writer.write(get("/later"))
    await until(lambda: wire.echo.handled)
    drained = await wire.server.drain(5.0, lambda: 0)
    assert drained
    answer = await reader.read()
    assert statuses(answer) == [200] and b"connection: close" in answer
    assert await idle_reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await wire.open()
    writer.close()
    idle_writer.close()
