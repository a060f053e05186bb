"""Ranks that do not keep to HTTP, or to what they have announced."""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, standing, until
from tests.mock_rank import MockRank

from expertmesh.core.domain.fleet import Group, GroupState, Rank

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "one"}]}
STREAM = {**CHAT, "stream": True}
_LENGTH = re.compile(rb"content-length: (\d+)\r\n").search


def whole(text: str, *lines: str) -> bytes:
    body = json.dumps({"id": text, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
    more = "".join(f"{line}\r\n" for line in lines)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w0"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Script:
    """Answers each request with the next bytes, the last ones again and again."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.requests = 0
        self.connections = 0
        self.ended = 0
        """Connections that the gateway has closed."""
        self.closes = False
        """Close after each answer."""
        self.fills = b""
        """Sent again and again after the answer, until the gateway closes."""
        self.writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = _LENGTH(head)
                await reader.readexactly(int(found[1]) if found else 0)
                self.requests += 1
                answer = self.answers[0]
                if len(self.answers) > 1:
                    self.answers.pop(0)
                writer.write(answer)
                await writer.drain()
                if self.fills:
                    while True:
                        writer.write(self.fills)
                        await writer.drain()
                        # Full speed would leave this loop no time for the client.
                        await asyncio.sleep(0.001)
                if self.closes:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.ended += 1
        writer.close()


@pytest.fixture
async def script(stand: Stand) -> AsyncIterator[Script]:
    script = Script()
    url = await script.start()
    await stand.show(scripted(url))
    yield script
    script.stop()


def scripted(*urls: str, name: str = "em-tiny-moe-pool-a-9") -> Group:
    ranks = tuple(Rank(index, url) for index, url in enumerate(urls))
    return Group(name, MODEL, "pool-a", GroupState.READY, ranks=ranks, world_size=len(ranks))


async def at_rest(stand: Stand) -> None:
    """Nothing is under way, and nothing is believed to be."""
    await until(lambda: not stand.count("em_gateway_open_requests"))
    await until(lambda: not stand.count("em_gateway_in_flight_requests"))


async def ask(stand: Stand, body: Any = CHAT) -> tuple[int, str]:
    async with asyncio.timeout(5):
        async with stand.post("/v1/chat/completions", body) as response:
            return response.status, await response.text()


GARBAGE = {
    "no HTTP": b"\x00\x01\x02\x03 garbage \xff\xff\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "another version": b"HTTP/3.7 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}}",
    "a length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"
    b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a null in a header": b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000,
    "interim answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
    "a chunk size that is none": STREAM_HEAD + b"zz\r\n{}\r\n",
    "a chunk longer than said": STREAM_HEAD + b"1\r\n{}\r\n0\r\n\r\n",
    "a huge chunk size": STREAM_HEAD + b"f" * 20 + b"\r\n",
}


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_a_failed_attempt_and_another_group_answers(
    stand: Stand, script: Script, name: str, body: Any
) -> None:
    script.answers = [GARBAGE[name]]
    status, text = await ask(stand, body)
    assert status == 502
    assert json.loads(text)["error"]["code"] == "upstream_unavailable"
    assert script.requests >= 1
    good = await stand.rank()
    await stand.show(scripted(script_url(script)), group_of(good))
    await at_rest(stand)
    for _ in range(4):
        status, text = await ask(stand, body)
        assert status == 200, text
    await at_rest(stand)
    await until(lambda: script.ended == script.connections)


def script_url(script: Script) -> str:
    assert script._server is not None
    return f"http://127.0.0.1:{script._server.sockets[0].getsockname()[1]}"


ENDLESS = {
    "a head": (b"HTTP/1.1 200 OK\r\nx: y\r\n", b"x: y\r\n" * 1000),
    "a header": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 10_000),
    "trailers": (STREAM_HEAD + CHUNK + b"0\r\n", b"x: y\r\n" * 1000),
    "a trailer": (STREAM_HEAD + CHUNK + b"0\r\nx: ", b"y" * 10_000),
    "a chunk's extension": (STREAM_HEAD + CHUNK + b"5;", b"y" * 10_000),
    "an event": (STREAM_HEAD + CHUNK, b"2710\r\n" + b"y" * 10_000 + b"\r\n"),
    "a first event": (STREAM_HEAD, b"2710\r\n" + b"y" * 10_000 + b"\r\n"),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_does_not_end_is_cut_off_before_it_fills_the_memory(
    stand: Stand, script: Script, name: str
) -> None:
    first, script.fills = ENDLESS[name]
    script.answers = [first]
    status, text = await ask(stand, STREAM)
    if status == 200:
        error = json.loads(text.rstrip().rsplit("data: ", 1)[1])["error"]
        assert error["code"] == "upstream_failed"
    else:
        assert status == 502
    await at_rest(stand)
    await until(lambda: script.ended == script.connections)


async def test_an_answer_before_a_fault_keeps_its_beginning(stand: Stand, script: Script) -> None:
    script.answers = [STREAM_HEAD + CHUNK + CHUNK]
    script.fills = b"zz\r\n"
    status, text = await ask(stand, STREAM)
    assert status == 200
    assert text.count('"content":"w0"') == 2
    assert '"code":"upstream_failed"' in text


TOO_MUCH = {
    "more bytes than announced": whole("first") + b"more",
    "a second answer": whole("first") + whole("second"),
    "half of a second answer": whole("first") + whole("second")[:20],
    "more after the last chunk": STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    + b'e\r\n{"id":"first"}\r\n0\r\n\r\nmore',
    "more though it closes": whole("first", "connection: close") + b"more",
    "a second answer though it closes": whole("first", "connection: close") + whole("second"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
async def test_more_than_the_answer_is_dropped_with_the_connection(
    stand: Stand, script: Script, name: str
) -> None:
    script.answers = [TOO_MUCH[name], whole("third")]
    status, text = await ask(stand)
    assert (status, json.loads(text)["id"]) == (200, "first")
    await until(lambda: script.ended)
    status, text = await ask(stand)
    assert (status, json.loads(text)["id"]) == (200, "third")
    assert (script.requests, script.connections) == (2, 2)
    await at_rest(stand)


async def test_a_second_answer_that_comes_later_reaches_nobody(
    stand: Stand, script: Script
) -> None:
    script.answers = [whole("first"), whole("third")]
    assert json.loads((await ask(stand))[1])["id"] == "first"
    script.writers[0].write(whole("second"))
    await until(lambda: script.ended)
    assert json.loads((await ask(stand))[1])["id"] == "third"
    assert script.connections == 2


async def test_an_answer_shorter_than_announced_is_none(stand: Stand, script: Script) -> None:
    script.answers = [whole("first")[:-5]]
    script.closes = True
    status, _ = await ask(stand)
    assert status == 502
    await at_rest(stand)


async def test_an_answer_without_a_length_ends_with_its_connection(
    stand: Stand, script: Script
) -> None:
    script.answers = [
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"id":"first"}',
        whole("second"),
    ]
    script.closes = True
    assert json.loads((await ask(stand))[1])["id"] == "first"
    assert json.loads((await ask(stand))[1])["id"] == "second"


async def test_an_answer_that_closes_is_not_asked_again(stand: Stand, script: Script) -> None:
    script.answers = [whole("first", "connection: close"), whole("second")]
    assert json.loads((await ask(stand))[1])["id"] == "first"
    assert json.loads((await ask(stand))[1])["id"] == "second"
    assert script.connections == 2


async def test_a_good_connection_is_used_again(stand: Stand, script: Script) -> None:
    script.answers = [whole("first"), STREAM_HEAD + CHUNK + DONE, whole("third")]
    await ask(stand)
    assert (await ask(stand, STREAM))[1].endswith("data: [DONE]\n\n")
    await ask(stand)
    assert (script.requests, script.connections) == (3, 1)


@pytest.mark.parametrize("way", ["reset", "close", "reset as it is used"])
async def test_an_idle_connection_that_ends_is_not_seen_by_clients(
    stand: Stand, script: Script, way: str
) -> None:
    script.answers = [whole("first"), whole("second")]
    await ask(stand)
    if way == "reset":
        script.writers[0].transport.abort()
        await until(lambda: not stand.count("em_gateway_upstream_connections", state="idle"))
    elif way == "close":
        script.writers[0].close()
        await until(lambda: not stand.count("em_gateway_upstream_connections", state="idle"))
    else:
        # The rank reads nothing any more, and resets when the next request comes.
        cast(asyncio.Transport, script.writers[0].transport).pause_reading()
        asyncio.get_running_loop().call_later(0.2, script.writers[0].transport.abort)
    status, text = await ask(stand)
    assert (status, json.loads(text)["id"]) == (200, "second")
    assert stand.count("em_gateway_retries_total") == 0
    await at_rest(stand)


ABSURD: dict[str, Callable[[], bytes]] = {
    "negative tokens": lambda: usage(-5),
    "tokens that are no number": lambda: usage("many"),
    "no object": lambda: json_answer(b"[1,2]"),
    "no JSON": lambda: json_answer(b"{"),
    "deep nesting": lambda: json_answer(b"[" * 100_000),
    "nothing": lambda: json_answer(b""),
}


def usage(tokens: Any) -> bytes:
    value = {"id": "x", "usage": {"prompt_tokens": tokens, "completion_tokens": tokens}}
    return json_answer(json.dumps(value).encode())


def json_answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


@pytest.mark.parametrize("name", ABSURD)
async def test_absurd_usage_harms_neither_the_client_nor_the_ledger(
    stand: Stand, script: Script, name: str
) -> None:
    script.answers = [ABSURD[name](), whole("second")]
    status, _ = await ask(stand)
    assert status == 200
    status, text = await ask(stand)
    assert (status, json.loads(text)["id"]) == (200, "second")
    rows = await stand.rows(2)
    assert all(0 <= row.prompt_tokens < 2**63 for row in rows)
    await at_rest(stand)


async def test_more_tokens_than_the_ledger_holds_are_cut_down(stand: Stand, script: Script) -> None:
    script.answers = [usage(10**18), whole("second")]
    assert (await ask(stand))[0] == 200
    assert json.loads((await ask(stand))[1])["id"] == "second"
    rows = await stand.rows(2)
    assert sorted(row.prompt_tokens for row in rows) == [1, 2**40]
    await at_rest(stand)


async def test_events_with_carriage_returns_are_events(stand: Stand, script: Script) -> None:
    event = EVENT.replace(b"\n", b"\r\n")
    done = b"data: [DONE]\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (event, event, done))
    script.answers = [STREAM_HEAD + chunks + b"0\r\n\r\n"]
    status, text = await ask(stand, STREAM)
    assert status == 200
    assert text == (EVENT + EVENT + b"data: [DONE]\n\n").decode()


async def test_a_rank_that_reads_nothing_holds_no_request_for_ever() -> None:
    limits = replace(QUICK, whole_answer_timeout_s=0.3, max_attempts=1)
    async with standing(limits) as stand:
        hanging: list[asyncio.StreamWriter] = []

        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            cast(asyncio.Transport, writer.transport).pause_reading()
            hanging.append(writer)

        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        await stand.show(scripted(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 5_000_000}]}
        headers = {"Authorization": f"Bearer {SECRET}"}
        url = f"{stand.url}/v1/chat/completions"
        data = io.BytesIO(json.dumps(body).encode())
        async with stand.http.post(url, data=data, headers=headers) as response:
            assert response.status == 504
        await at_rest(stand)
        server.close()
        for writer in hanging:
            writer.transport.abort()


async def test_a_good_rank_beside_bad_ones(stand: Stand) -> None:
    """Whatever a rank sends, the next request is answered as if nothing had been."""
    scripts = [Script(answer) for answer in (*GARBAGE.values(), *TOO_MUCH.values())]
    urls = [await script.start() for script in scripts]
    good: MockRank = await stand.rank()
    groups = [scripted(url, name=f"em-bad-{number}") for number, url in enumerate(urls)]
    await stand.show(*groups, group_of(good))
    seen = [await ask(stand) for _ in range(60)]
    assert {status for status, _ in seen} <= {200, 502}
    assert [status for status, _ in seen[-5:]] == [200] * 5
    await at_rest(stand)
    for script in scripts:
        script.stop()
