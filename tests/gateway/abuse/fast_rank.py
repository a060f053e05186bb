"""A rank that thousands of streams can be asked of at once: prepared bytes, no tasks.

It reads requests strictly: what the gateway sends on must be good HTTP to a path that ranks have.
`plan=<id>:<events>:<ms>:<bytes>` in the prompt asks for a stream of so many events, so many
milliseconds apart, each with so many bytes of text, and for a note when it is broken off.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import httptools

_PLAN = re.compile(rb"plan=([\w-]+):(\d+):(\d+):(\d+)").search
_STREAM = re.compile(rb'"stream"\s*:\s*(?:true|1|"true")').search
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
_OTHER_USAGE = {"input_tokens": 3, "output_tokens": 2}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _whole(value: Any) -> bytes:
    body = _json(value)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def _stream(*events: bytes) -> bytes:
    return _STREAM_HEAD + b"".join(map(_chunk, events)) + b"0\r\n\r\n"


def _named(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + _json({"type": kind, **fields}) + b"\n\n"


_EVENT = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{'
_FINISH = _EVENT + b'"content":""},"finish_reason":"stop"}]}\n\n'
_CHAT_USAGE = b'data: {"id":"c","choices":[],"usage":' + _json(_USAGE) + b"}\n\n"
_DONE = b"data: [DONE]\n\n"
_CHAT_STREAM = (_EVENT + b'"content":"w0 "}}]}\n\n', _FINISH, _CHAT_USAGE, _DONE)
_ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "/v1/chat/completions": (
        _whole({"id": "c", "choices": [{"message": {"content": "w0 w1"}}], "usage": _USAGE}),
        _stream(*_CHAT_STREAM),
    ),
    "/v1/completions": (
        _whole({"id": "c", "choices": [{"text": "w0 w1"}], "usage": _USAGE}),
        _stream(*_CHAT_STREAM),
    ),
    "/v1/responses": (
        _whole({"id": "r", "object": "response", "output": [], "usage": _OTHER_USAGE}),
        _stream(
            _named("response.output_text.delta", delta="w0 "),
            _named("response.completed", response={"id": "r", "usage": _OTHER_USAGE}),
        ),
    ),
    "/v1/messages": (
        _whole({"id": "m", "type": "message", "content": [], "usage": _OTHER_USAGE}),
        _stream(
            _named("message_start", message={"id": "m", "usage": _OTHER_USAGE}),
            _named("content_block_delta", index=0, delta={"type": "text_delta", "text": "w0"}),
            _named("message_delta", delta={"stop_reason": "end_turn"}, usage=_OTHER_USAGE),
            _named("message_stop"),
        ),
    ),
    "/v1/embeddings": (_whole({"object": "list", "data": [], "usage": _USAGE}), b""),
    "/v1/messages/count_tokens": (_whole({"input_tokens": 3}), b""),
    "/tokenize": (_whole({"count": 1, "tokens": [1]}), b""),
    "/detokenize": (_whole({"prompt": "w0"}), b""),
}
_NO_PATH = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"


class FastRank:
    def __init__(self) -> None:
        self.requests = 0
        self.open: set[str] = set()
        """Planned streams under way."""
        self.gone_at_s: dict[str, float] = {}
        """Planned streams that were broken off, and when, by the monotonic clock."""
        self.faults: list[str] = []
        """What the gateway should not have sent."""
        self.on_begin: Callable[[str], None] = lambda stream: None
        self.url = ""
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def start(self) -> str:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self, loop), "127.0.0.1", 0, backlog=4096
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.url

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()


@asynccontextmanager
async def fast_rank() -> AsyncIterator[FastRank]:
    rank = FastRank()
    await rank.start()
    try:
        yield rank
    finally:
        rank.stop()


class _Connection(asyncio.Protocol):
    def __init__(self, rank: FastRank, loop: asyncio.AbstractEventLoop) -> None:
        self._rank = rank
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._stream = ""
        self._next = self._last = 0
        self._pace_s = self._start_s = 0.0
        self._pad = b""
        self._paused = self._waits = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._rank._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rank._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._stream:
            self._rank.gone_at_s[self._stream] = time.monotonic()
            self._rank.open.discard(self._stream)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._waits:
            self._waits = False
            self._send_event()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._rank.faults.append(f"{error}: {data[:300]!r}")
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    # The parser calls these.

    def on_message_begin(self) -> None:
        self._url = b""
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        rank = self._rank
        path = self._url.decode("latin-1")
        answers = _ANSWERS.get(path)
        if answers is None or self._parser.get_method() != b"POST":
            if path != "/em/info":  # the gateway's probe
                rank.faults.append(f"{self._parser.get_method()!r} {path[:200]}")
            self._transport.write(_NO_PATH)
            return
        rank.requests += 1
        body = b"".join(self._body)
        plan = _PLAN(body)
        if plan is not None:
            self._begin(plan[1].decode(), *map(int, plan.groups()[1:]))
            return
        whole, stream = answers
        self._transport.write(stream if stream and _STREAM(body) else whole)

    # A planned stream.

    def _begin(self, stream: str, events: int, pace_ms: int, pad_bytes: int) -> None:
        self._stream = stream
        self._next, self._last = 0, events
        self._pace_s = pace_ms / 1000
        self._pad = b"x" * pad_bytes
        self._start_s = self._loop.time()
        self._rank.open.add(stream)
        self._transport.write(_STREAM_HEAD)
        self._rank.on_begin(stream)
        self._timer = self._loop.call_later(self._pace_s, self._send_event)

    def _send_event(self) -> None:
        if self._transport.is_closing():
            return
        if self._paused:
            self._waits = True
            return
        number = self._next
        self._next += 1
        if number < self._last:
            text = b'"content":"w%d %b"}}]}\n\n' % (number, self._pad)
            self._transport.write(_chunk(_EVENT + text))
            due_s = self._start_s + (number + 2) * self._pace_s
            self._timer = self._loop.call_later(
                max(0.0, due_s - self._loop.time()), self._send_event
            )
            return
        self._rank.open.discard(self._stream)
        self._stream = ""
        usage = {"prompt_tokens": 3, "completion_tokens": self._last}
        last = b'data: {"id":"c","choices":[],"usage":' + _json(usage) + b"}\n\n"
        self._transport.write(b"".join(map(_chunk, (_FINISH, last, _DONE))) + b"0\r\n\r\n")
