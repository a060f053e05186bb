"""Stands in for a rank: the part of vLLM's HTTP API that a gateway uses, with words for tokens.

A real server on a real socket, on a bare asyncio protocol so that it costs little beside what is
measured against it. It answers in vLLM's formats, and fails on request in the ways that a rank
does. No model runs here: tests of what a model says need the real engine.

    python tests/mock_rank.py --port 9000 --tokens 64 --token-interval-ms 20
"""

import argparse
import asyncio
import base64
import contextlib
import json
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found"}
_STREAMING_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail. `after_events` counts events of a stream that still come, for all but
    `refuse` and `hang`, which come before anything else."""

    kind: str
    """refuse: answer with `status`. hang: no answer at all. reset: abort the connection.
    end: end the body in good order, too early. stall: fall silent. error: send an error event.
    none: no failure, for `probe`."""
    after_events: int = 0
    status: int = 500
    body: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class MockRank:
    model: str = "tiny-moe"
    group: str = "em-tiny-moe-mock-0"
    rank: int = 0
    prefix: str = ""
    """Route prefix, as of a Serve application."""
    mesh_token: str | None = None
    """Wanted of who asks, as our ranks do."""
    api_key: str | None = None
    """Wanted as bearer token, as external providers do."""
    tokens: int = 8
    """Completion tokens where the request names no limit, and the most that are given."""
    first_token_s: float = 0.0
    token_interval_s: float = 0.0
    max_model_len: int = 4096
    cached_tokens: int | None = None
    split_bytes: int | None = None
    """Cut a stream into chunks of this size, whatever the events."""
    spaced: bool = False
    """Write the events' JSON with spaces, as some providers do."""
    line_end: bytes = b"\n"
    """Of the lines of events."""
    gate: asyncio.Event | None = None
    """No answer begins before it is set."""
    faults: deque[Fault] = field(default_factory=deque)
    """The next request with a body takes the first one."""
    always: Fault | None = None
    probe: Fault | None = None
    """What requests without a body get instead of `always`."""
    seen: list[Seen] = field(default_factory=list)
    """Requests with a body."""
    probes: list[Seen] = field(default_factory=list)
    """Those without."""
    aborted_at_s: list[float] = field(default_factory=list)
    """Monotonic times at which a client left before its answer was whole."""
    port: int = 0
    running: int = 0
    _server: asyncio.Server | None = None
    _connections: set["_Connection"] = field(default_factory=set)

    async def start(self, port: int = 0) -> str:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", port, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self.base_url

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    async def stop(self) -> None:
        """As when the process is killed: connections are reset, new ones refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            connection.abort()
        for _ in range(100):
            if not self._connections:
                break
            await asyncio.sleep(0.001)

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def answer(self, seen: Seen, connection: "_Connection") -> None:
        if not seen.body:
            fault = self.probe or self.always
        else:
            fault = self.faults.popleft() if self.faults else self.always
        if fault is not None and fault.kind == "hang":
            await asyncio.Event().wait()
        if fault is not None and fault.kind == "refuse":
            body = fault.body
            if body is None:
                body = _error("Something broke.", "InternalServerError", fault.status)
            connection.write_whole(fault.status, body, fault.content_type, fault.headers)
            return
        if self.mesh_token and seen.headers.get("x-em-mesh-token") != self.mesh_token:
            connection.write_json(401, {"detail": "mesh token"})
            return
        if self.api_key and seen.headers.get("authorization") != f"Bearer {self.api_key}":
            error = _error("Incorrect API key provided", "invalid_request_error", 401)
            connection.write_whole(401, error, "application/json", ())
            return
        path = seen.path.removeprefix(self.prefix)
        if not seen.path.startswith(self.prefix + "/"):
            text = f"Path '{seen.path}' not found. Ping http://.../-/routes for available routes."
            connection.write_whole(404, text.encode(), "text/plain", ())
            return
        if seen.body:
            await self._post(path, seen, connection, fault)
        else:
            self._get(path, connection)

    def _get(self, path: str, connection: "_Connection") -> None:
        info = {
            "group": self.group,
            "model": self.model,
            "rank": self.rank,
            "world_size": 1,
            "running": self.running,
            "waiting": 0,
            "kv_usage": 0.0,
            "expert_tokens": {},
        }
        if path == "/em/info":
            connection.write_json(200, info)
        elif path == "/v1/models":
            connection.write_json(200, {"object": "list", "data": [{"id": self.model}]})
        elif path in ("/health", "/server_info", "/get_server_info", "/model_info"):
            connection.write_json(200, {"model_path": self.model})
        else:
            connection.write_json(404, {"detail": "Not Found"})

    async def _post(
        self, path: str, seen: Seen, connection: "_Connection", fault: Fault | None
    ) -> None:
        asked = seen.json()
        if path not in _MAKERS:
            connection.write_json(404, {"detail": "Not Found"})
            return
        prompt_tokens = _words_of(asked)
        named = asked.get("max_completion_tokens") or asked.get("max_tokens")
        named = named or asked.get("max_output_tokens")
        limit = named or self.tokens
        if prompt_tokens + limit > self.max_model_len:
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, you "
                f"requested {limit} output tokens and your prompt contains {prompt_tokens} input "
                f"tokens, for a total of {prompt_tokens + limit} tokens. Please reduce the length "
                "of the input prompt or the number of requested output tokens."
            )
            connection.write_whole(400, self._refusal(path, message), "application/json", ())
            return
        reply = _Reply(
            id=seen.headers.get("x-request-id", "none"),
            model=self.model,
            asked=asked,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.cached_tokens,
            words=tuple(f"w{number} " for number in range(min(limit, self.tokens))),
            cut_short=named is not None and named <= self.tokens,
        )
        self.running += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            whole, events = _MAKERS[path]
            if asked.get("stream") and events is not None:
                await self._stream(events(reply), connection, fault)
            else:
                await asyncio.sleep(self.first_token_s + self.token_interval_s * len(reply.words))
                if fault is not None and fault.kind == "reset":
                    connection.abort()
                    return
                if fault is not None and fault.kind in ("end", "stall"):
                    connection.write(
                        _STREAMING_HEAD.replace(b"text/event-stream", b"application/json")
                    )
                    if fault.kind == "end":
                        connection.abort()
                    await asyncio.Event().wait()
                connection.write_json(200, whole(reply))
        finally:
            self.running -= 1

    def _refusal(self, path: str, message: str) -> bytes:
        if path.startswith("/v1/messages"):
            error = {"type": "BadRequestError", "message": message}
            return json.dumps({"type": "error", "error": error}).encode()
        return _error(message, "BadRequestError", 400, "input_tokens")

    async def _stream(
        self, events: Iterator[bytes], connection: "_Connection", fault: Fault | None
    ) -> None:
        if self.first_token_s:
            await asyncio.sleep(self.first_token_s)
        if fault is not None and fault.kind == "reset" and fault.after_events == 0:
            connection.abort()
            return
        connection.write(_STREAMING_HEAD)
        for count, event in enumerate(events):
            if fault is not None and count == fault.after_events:
                await self._fail(fault, connection)
                return
            if count and self.token_interval_s:
                await asyncio.sleep(self.token_interval_s)
            if count % 1000 == 999:
                await asyncio.sleep(0)
            if self.spaced:
                event = _spaced(event)
            if self.line_end != b"\n":
                event = event.replace(b"\n", self.line_end)
            step = self.split_bytes or len(event)
            for start in range(0, len(event), step):
                connection.write_chunk(event[start : start + step])
                if self.split_bytes:
                    await asyncio.sleep(0)
        connection.write(b"0\r\n\r\n")

    async def _fail(self, fault: Fault, connection: "_Connection") -> None:
        if fault.kind == "stall":
            await asyncio.Event().wait()
        elif fault.kind == "reset":
            # What was written before must get out first, as it would from a process that dies.
            await asyncio.sleep(0.02)
            connection.abort()
        else:
            if fault.kind == "error":
                error = fault.body or _error("EngineCore died", "InternalServerError", fault.status)
                connection.write_chunk(b"data: " + error + b"\n\ndata: [DONE]\n\n")
            connection.write(b"0\r\n\r\n")


@dataclass(frozen=True, slots=True)
class _Reply:
    id: str
    model: str
    asked: dict[str, Any]
    prompt_tokens: int
    cached_tokens: int | None
    words: tuple[str, ...]
    cut_short: bool

    @property
    def reason(self) -> str:
        return "length" if self.cut_short else "stop"

    @property
    def stop_reason(self) -> str:
        """The same in messages."""
        return "max_tokens" if self.cut_short else "end_turn"

    @property
    def text(self) -> str:
        return "".join(self.words)

    def usage(self, completion: int | None = None) -> dict[str, Any]:
        completion = len(self.words) if completion is None else completion
        details = None if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": details,
        }

    def anthropic_usage(self, completion: int) -> dict[str, Any]:
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": completion}
        if self.cached_tokens is not None:
            usage["input_tokens"] -= self.cached_tokens
            usage["cache_read_input_tokens"] = self.cached_tokens
        return usage

    def wants_usage(self) -> bool:
        return bool((self.asked.get("stream_options") or {}).get("include_usage"))


def _words_of(asked: dict[str, Any]) -> int:
    prompt = asked.get("messages", asked.get("input", asked.get("prompt")))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return sum(len(each.split()) for each in prompt)
    return len(json.dumps(prompt).split())


def _spaced(event: bytes) -> bytes:
    """The same with JSON as Python writes it by default."""
    kind, mark, data = event.partition(b"data: {")
    return (
        kind + b"data: " + json.dumps(json.loads(b"{" + data)).encode() + b"\n\n" if mark else event
    )


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _data(value: Any) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


def _event(kind: str, value: dict[str, Any]) -> bytes:
    return f"event: {kind}\n".encode() + _data({"type": kind, **value})


def _error(message: str, kind: str, code: int, param: str | None = None) -> bytes:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def _chat(reply: _Reply) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.text, "tool_calls": []}
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": 1,
        "model": reply.model,
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.reason}
        ],
        "usage": reply.usage(),
    }


def _chat_events(reply: _Reply) -> Iterator[bytes]:
    head = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": reply.model,
    }
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
    yield _data({**head, "choices": [{**role, "logprobs": None, "finish_reason": None}]})
    start = b"data: " + _dump(head)[:-1] + b',"choices":[{"index":0,"delta":{"content":"'
    for word in reply.words[:-1]:
        yield start + word.encode() + b'"},"logprobs":null,"finish_reason":null}]}\n\n'
    for word in reply.words[-1:]:
        end = b'"},"logprobs":null,"finish_reason":"%b"}]}\n\n' % reply.reason.encode()
        yield start + word.encode() + end
    if reply.wants_usage():
        yield _data({**head, "choices": [], "usage": reply.usage()})
    yield b"data: [DONE]\n\n"


def _completion(reply: _Reply) -> dict[str, Any]:
    choice = {"index": 0, "text": reply.text, "logprobs": None, "finish_reason": reply.reason}
    return {
        "id": f"cmpl-{reply.id}",
        "object": "text_completion",
        "created": 1,
        "model": reply.model,
        "choices": [choice],
        "usage": reply.usage(),
    }


def _completion_events(reply: _Reply) -> Iterator[bytes]:
    head = {
        "id": f"cmpl-{reply.id}",
        "object": "text_completion",
        "created": 1,
        "model": reply.model,
    }
    for number, word in enumerate(reply.words, 1):
        last = number == len(reply.words)
        choice = {"index": 0, "text": word, "finish_reason": reply.reason if last else None}
        yield _data({**head, "choices": [choice]})
    if reply.wants_usage():
        yield _data({**head, "choices": [], "usage": reply.usage()})
    yield b"data: [DONE]\n\n"


def _response(reply: _Reply, status: str = "completed") -> dict[str, Any]:
    content = {"type": "output_text", "text": reply.text, "annotations": []}
    usage = {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens or 0},
        "output_tokens": len(reply.words),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + len(reply.words),
    }
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": 1,
        "status": status,
        "model": reply.model,
        "output": [
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [content],
            }
        ],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if status == "completed" else None,
    }


def _response_events(reply: _Reply) -> Iterator[bytes]:
    started = {"response": {**_response(reply, "in_progress"), "output": []}}
    yield _event("response.created", {"sequence_number": 0, **started})
    yield _event("response.in_progress", {"sequence_number": 1, **started})
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    for number, word in enumerate(reply.words, 2):
        delta = {**place, "sequence_number": number, "delta": word, "logprobs": []}
        yield _event("response.output_text.delta", delta)
    yield _event(
        "response.completed",
        {"sequence_number": len(reply.words) + 2, "response": _response(reply)},
    )


def _message(reply: _Reply) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{reply.id}",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": reply.text}],
        "model": reply.model,
        "stop_reason": reply.stop_reason,
        "usage": reply.anthropic_usage(len(reply.words)),
    }


def _message_events(reply: _Reply) -> Iterator[bytes]:
    message = {
        **_message(reply),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": reply.anthropic_usage(0),
    }
    yield _event("message_start", {"message": message})
    block = {"type": "text", "text": ""}
    yield _event("content_block_start", {"index": 0, "content_block": block})
    for word in reply.words:
        delta = {"type": "text_delta", "text": word}
        yield _event("content_block_delta", {"index": 0, "delta": delta})
    yield _event("content_block_stop", {"index": 0})
    usage = reply.anthropic_usage(len(reply.words))
    yield _event("message_delta", {"delta": {"stop_reason": reply.stop_reason}, "usage": usage})
    yield _event("message_stop", {})


def _embeddings(reply: _Reply) -> dict[str, Any]:
    given = reply.asked["input"]
    count = len(given) if isinstance(given, list) else 1
    vectors = [[0.5 + n, -0.5][: reply.asked.get("dimensions", 2)] for n in range(count)]
    in_base64 = reply.asked.get("encoding_format") == "base64"
    return {
        "id": f"embd-{reply.id}",
        "object": "list",
        "created": 1,
        "model": reply.model,
        "data": [
            {
                "index": index,
                "object": "embedding",
                "embedding": _base64(vector) if in_base64 else vector,
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": {**reply.usage(0), "completion_tokens": 0},
    }


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


_MAKERS: dict[str, Any] = {
    "/v1/chat/completions": (_chat, _chat_events),
    "/v1/completions": (_completion, _completion_events),
    "/v1/responses": (_response, _response_events),
    "/v1/messages": (_message, _message_events),
    "/v1/messages/count_tokens": (lambda reply: {"input_tokens": reply.prompt_tokens}, None),
    "/v1/embeddings": (_embeddings, None),
    "/tokenize": (
        lambda reply: {"count": 2, "max_model_len": 4096, "tokens": [1, 2], "token_strs": None},
        None,
    ),
    "/detokenize": (lambda reply: {"prompt": "two words"}, None),
}


class _Connection(asyncio.Protocol):
    def __init__(self, rank: MockRank) -> None:
        self._rank = rank
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._rank._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rank._connections.discard(self)
        if self._task is not None and not self._task.done():
            self._rank.aborted_at_s.append(time.monotonic())
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        path = httptools.parse_url(self._url).path.decode()
        seen = Seen(path, self._headers, b"".join(self._body))
        (self._rank.seen if seen.body else self._rank.probes).append(seen)
        self._task = asyncio.get_running_loop().create_task(self._rank.answer(seen, self))

    def abort(self) -> None:
        self._transport.abort()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def write_chunk(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def write_json(self, status: int, value: Any) -> None:
        self.write_whole(status, _dump(value), "application/json", ())

    def write_whole(
        self,
        status: int,
        body: bytes,
        content_type: str,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}\r\n"
        head += f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers)
        self._transport.write(head.encode() + b"\r\n" + body)


@contextlib.asynccontextmanager
async def started(rank: MockRank, port: int = 0) -> AsyncIterator[MockRank]:
    await rank.start(port)
    try:
        yield rank
    finally:
        await rank.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--group", default="em-tiny-moe-mock-0")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--mesh-token")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--first-token-ms", type=float, default=0.0)
    parser.add_argument("--token-interval-ms", type=float, default=0.0)
    asked = parser.parse_args()
    rank = MockRank(
        model=asked.model,
        group=asked.group,
        rank=asked.rank,
        prefix=asked.prefix,
        mesh_token=asked.mesh_token,
        tokens=asked.tokens,
        first_token_s=asked.first_token_ms / 1000,
        token_interval_s=asked.token_interval_ms / 1000,
        # A benchmark sends too many to keep.
        seen=deque(maxlen=1),  # type: ignore[arg-type]
        probes=deque(maxlen=1),  # type: ignore[arg-type]
    )

    async def serve() -> None:
        async with started(rank, asked.port):
            print(f"mock rank on {rank.base_url}", flush=True)
            await asyncio.Event().wait()

    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve())


if __name__ == "__main__":
    main()
