"""The load generator must count right: its figures are believed without being looked at."""

import asyncio
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, cast

import pytest
from benchmarks.gateway_bench.load import Ask, Connection, Tally, Way
from benchmarks.gateway_bench.upstream import _Connection, _Sender
from hypothesis import given
from hypothesis import strategies as st


@dataclass
class Wire:
    """In place of a transport."""

    written: list[bytes] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        pass


def transport(wire: Wire) -> asyncio.Transport:
    return cast(asyncio.Transport, wire)


async def upstream_answer(request: bytes) -> bytes:
    wire = Wire()
    loop = asyncio.get_running_loop()
    upstream = _Connection(loop, _Sender(loop))
    upstream.connection_made(transport(wire))
    # In two parts, as a large one may come.
    upstream.data_received(request[:100])
    upstream.data_received(request[100:])
    for _ in range(1000):
        await asyncio.sleep(0)
    return b"".join(wire.written)


def client(tally: Tally, expected_events: int = 0) -> Connection:
    connection = Connection(tally, lambda _: None)
    connection.connection_made(transport(Wire()))
    connection.expected_events = expected_events
    connection.send(b"")
    return connection


WAY = Way("test", (1,))
EVENTS = 5
CUTS = st.lists(st.integers(1, 2500), max_size=12)


@cache
def stream() -> bytes:
    return asyncio.run(upstream_answer(Ask(stream=True, events=EVENTS).bytes_for(WAY)[0]))


@cache
def whole() -> bytes:
    return asyncio.run(upstream_answer(Ask().bytes_for(WAY)[0]))


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    return [data[begin:end] for begin, end in pairwise(edges)]


def test_a_prompt_has_the_promised_size() -> None:
    request = Ask(model="m").bytes_for(WAY)[0]
    head, body = request.split(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert 1024 < len(body) < 1200


def test_conversations_differ() -> None:
    assert len(set(Ask().bytes_for(WAY))) > 1


@given(CUTS)
def test_a_stream_is_counted_right_however_it_is_cut(cuts: list[int]) -> None:
    tally = Tally()
    connection = client(tally, expected_events=EVENTS + WAY.beside_text)
    for part in parts(stream(), cuts):
        assert connection.busy
        connection.data_received(part)
    assert (tally.done, tally.failed, connection.busy) == (1, 0, False)
    assert tally.events == EVENTS + WAY.beside_text
    assert len(tally.firsts_s) == 1


@given(CUTS)
def test_a_whole_answer_ends_at_its_length(cuts: list[int]) -> None:
    tally = Tally()
    connection = client(tally)
    for part in parts(whole(), cuts):
        assert connection.busy
        connection.data_received(part)
    assert (tally.done, tally.failed, connection.busy) == (1, 0, False)


def test_a_stream_that_lacks_an_event_is_a_failure() -> None:
    tally = Tally()
    client(tally, expected_events=EVENTS + WAY.beside_text + 1).data_received(stream())
    assert (tally.done, tally.failed) == (0, 1)
    assert tally.first_failure == "8 events instead of 9"


def test_a_refusal_is_a_failure() -> None:
    tally = Tally()
    client(tally).data_received(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
    assert (tally.done, tally.failed) == (0, 1)
    assert tally.first_failure.startswith("HTTP/1.1 429")


@pytest.mark.parametrize("end", [0, 40, 400, -3])
def test_a_connection_that_closes_within_an_answer_is_a_failure(end: int) -> None:
    tally = Tally()
    connection = client(tally)
    if end:
        connection.data_received(stream()[:end])
    connection.connection_lost(None)
    assert (tally.done, tally.failed, connection.lost) == (0, 1, True)


async def test_usage_comes_only_when_asked_for() -> None:
    request = Ask(stream=True, events=2).bytes_for(WAY)[0]
    assert b'"usage"' not in await upstream_answer(request)
    head, body = request.split(b"\r\n\r\n")
    asking = body[:-1] + b',"stream_options":{"include_usage":true}}'
    head = head.replace(str(len(body)).encode(), str(len(asking)).encode())
    answer: Any = await upstream_answer(head + b"\r\n\r\n" + asking)
    assert answer.count(b'"choices":[],"usage":') == 1
