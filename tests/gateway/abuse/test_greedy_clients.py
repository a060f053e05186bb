"""Clients that would have the server hold more for them than they are worth."""

import asyncio
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from tests.gateway.test_client_connection import (
    HOST,
    LIMITS,
    Wire,
    get,
    serving,
    statuses,
    until,
)

from expertmesh.gateway.client_connection import ClientConnection

CHUNKED = b"POST /p HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    patient = replace(LIMITS, head_timeout_s=10.0, body_timeout_s=10.0)
    async with serving(patient) as started:
        yield started


@contextmanager
def small_buffers() -> Iterator[socket.socket]:
    """A client's socket that takes little before its owner reads."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        yield connection


class Unread(asyncio.Transport):
    """Its peer takes nothing, so that it never comes to its end by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(
    "endless",
    [b"0\r\n" + b"X: y\r\n" * 200_000, b"0\r\nX: " + b"y" * 1_000_000, b"1;" + b"x" * 1_000_000],
    ids=["trailers", "a trailer", "a chunk's extension"],
)
async def test_what_is_around_chunks_does_not_come_without_end(endless: bytes) -> None:
    async with serving(replace(LIMITS, body_timeout_s=10.0)) as wire:
        answer = await wire.exchange(CHUNKED + b"5\r\nhello\r\n" + endless)
        assert statuses(answer) == [431]
        assert not wire.echo.handled


async def test_a_body_in_the_smallest_chunks_is_taken() -> None:
    body = b"1\r\nx\r\n" * 100_000
    async with serving(replace(LIMITS, body_timeout_s=10.0)) as wire:
        answer = await wire.exchange(CHUNKED + body + b"0\r\n\r\n" + get("/end", close=True))
        assert statuses(answer) == [200, 200]
        assert wire.echo.handled[0].body == b"x" * 100_000


async def test_a_body_in_small_chunks_takes_no_more_memory_than_its_bytes() -> None:
    limits = replace(LIMITS, body_bytes=4_000_000, body_timeout_s=30.0)
    async with serving(limits) as wire:
        _, writer = await wire.open()
        writer.write(CHUNKED)
        await writer.drain()
        tracemalloc.start()
        for _ in range(100):
            writer.write(b"2\r\nxy\r\n" * 5_000)
            await writer.drain()
        (connection,) = wire.server._connections
        await until(lambda: len(connection._body) == 1_000_000)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 3_000_000
        writer.close()


async def test_a_later_head_is_not_longer_than_the_first_may_be(wire: Wire) -> None:
    huge = b"GET /b HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 10_000 + b"\r\n\r\n"
    assert statuses(await wire.exchange(get("/a") + huge)) == [200, 431]
    reader, writer = await wire.open()
    writer.write(get("/a"))
    await reader.readuntil(b"/a ")
    writer.write(huge)
    assert b" 431 " in await reader.read()
    writer.close()


async def test_a_long_body_before_a_head_does_not_count_for_it(wire: Wire) -> None:
    body = b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 50000\r\n\r\n" + b"x" * 50_000
    data = body + get("/b", close=True)
    assert statuses(await wire.exchange(data)) == [200, 200]
    reader, writer = await wire.open()
    writer.write(data[:-10])
    await reader.readuntil(b"x" * 100)
    await asyncio.sleep(0.05)
    writer.write(data[-10:])
    assert b"GET /b " in await reader.read()
    writer.close()


@pytest.mark.parametrize("version", [b" HTTP/0.9", b""], ids=["0.9", "none"])
async def test_versions_of_another_age(wire: Wire, version: bytes) -> None:
    answer = await wire.exchange(b"GET /a" + version + b"\r\n" + HOST + b"\r\n")
    assert statuses(answer) == [400]
    assert not wire.echo.handled


async def test_a_client_that_takes_no_answers_gets_no_more_of_them() -> None:
    async with serving(replace(LIMITS, client_stall_timeout_s=0.5)) as wire:
        with small_buffers() as connection:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", wire.port))
            # Each request is far shorter than its answer.
            body = b"x" * 50_000
            request = b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 50000\r\n\r\n" + body
            sending = asyncio.create_task(loop.sock_sendall(connection, request * 2000))
            await until(lambda: wire.server.connections)
            await until(lambda: not wire.server.connections)
            # The kernel has taken some; the server has neither asked for all nor answered all.
            assert 0 < len(wire.echo.handled) < 1000
            assert wire.echo.gone == 0
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def test_a_client_that_takes_its_answers_late_gets_all() -> None:
    async with serving(replace(LIMITS, client_stall_timeout_s=10.0)) as wire:
        body = b"x" * 50_000
        request = b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 50000\r\n\r\n" + body
        count = 300
        reader, writer = await wire.open()
        writer.write(request * count + get("/end", close=True))
        await asyncio.sleep(0.3)
        handled = len(wire.echo.handled)
        assert 0 < handled < count
        answer = await reader.read()
        assert statuses(answer) == [200] * (count + 1)
        writer.close()


async def test_more_requests_behind_the_last_one_are_dropped_quietly(wire: Wire) -> None:
    failures: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    answer = await wire.exchange(get("/a", close=True) + get("/b") * 100)
    assert statuses(answer) == [200]
    assert failures == []


async def test_an_answer_that_nobody_takes_does_not_keep_its_connection() -> None:
    """Too little is left for the connection to count as full, and the server has closed it."""
    async with serving(replace(LIMITS, client_stall_timeout_s=0.5)) as wire:
        transport = Unread()
        connection = ClientConnection(wire.echo, wire.server._connections, LIMITS, lambda: 100.0)
        connection.connection_made(transport)
        connection.data_received(get("/a", close=True))
        assert transport.closing and not transport.aborted
        connection.check(100.3)
        assert not transport.aborted
        connection.check(100.5)
        assert transport.aborted
        connection.connection_lost(None)
