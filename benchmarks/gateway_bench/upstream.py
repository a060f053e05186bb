"""A model server without a model, made to cost far less than any gateway before it.

All answers are bytes that exist before the first request comes. Streams go out as vLLM's do: the
head at once, then each event in a write of its own. `max_tokens` is the number of events that bring
text; `pace=20ms` anywhere in the prompt spaces them, otherwise they come as fast as they can.

    python -m benchmarks.gateway_bench.upstream --port 9000 --port 9001
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
from collections import deque
from typing import Any, cast

import uvloop

MODEL = "bench-moe"
PROMPT_TOKENS = 256
WHOLE_TOKENS = 64
MOST_EVENTS = 4096
_ID = "chatcmpl-00000000000000000000000000000000"
_CREATED = 1_750_000_000
_STREAM = re.compile(rb'"stream"\s*:\s*true').search
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d+)').search
_PACE = re.compile(rb"pace=(\d+)ms").search
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)").search
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def word(number: int) -> str:
    return f"w{number} "


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _answer(body: bytes, content_type: str = "application/json", status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    common = {"id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": MODEL}
    return _chunk(_json({**common, "choices": choices, **more}))


def _choice(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _usage(tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + tokens,
        "completion_tokens": tokens,
        "prompt_tokens_details": None,
    }


_ROLE = _event([_choice({"role": "assistant", "content": ""})])
_WORDS = tuple(_event([_choice({"content": word(number)})]) for number in range(MOST_EVENTS))
_FINISH = _event([_choice({"content": ""}, "stop")])
_DONE = _chunk(b"[DONE]") + b"0\r\n\r\n"
_WHOLE = _answer(
    _json(
        {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "".join(map(word, range(WHOLE_TOKENS))),
                        "refusal": None,
                        "tool_calls": [],
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "usage": _usage(WHOLE_TOKENS),
        }
    )
)
_ABOUT = {
    "model_path": MODEL,
    "model_id": MODEL,
    "served_model_name": MODEL,
    "tokenizer_path": MODEL,
    "is_generation": True,
    "max_model_len": 4096,
    "version": "0.29.0",
}
_MODELS = {
    "object": "list",
    "data": [
        {
            "id": MODEL,
            "object": "model",
            "created": _CREATED,
            "owned_by": "vllm",
            "root": MODEL,
            "parent": None,
            "max_model_len": 4096,
        }
    ],
}
_GETS = {
    b"/health": _answer(b"", "text/plain"),
    b"/v1/models": _answer(_json(_MODELS)),
    b"/server_info": _answer(_json(_ABOUT)),
    b"/get_server_info": _answer(_json(_ABOUT)),
    b"/model_info": _answer(_json(_ABOUT)),
    b"/get_model_info": _answer(_json(_ABOUT)),
    b"/metrics": _answer(
        b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n", "text/plain"
    ),
}
_NOT_FOUND = _answer(_json({"detail": "Not Found"}), status="404 Not Found")


class _Sender:
    """Gives each stream at full speed one event per turn of the loop, so one system call each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: deque[_Connection] = deque()
        self._running = False

    def add(self, stream: "_Connection") -> None:
        self._streams.append(stream)
        if not self._running:
            self._running = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        streams = self._streams
        for _ in range(len(streams)):
            stream = streams.popleft()
            # A paused stream comes back by itself when it may write again.
            if stream.next_event():
                streams.append(stream)
        if streams:
            self._loop.call_soon(self._turn)
        else:
            self._running = False


class _Connection(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop, sender: _Sender) -> None:
        self._loop = loop
        self._sender = sender
        self._transport: asyncio.Transport | None = None
        self._held = b""
        self._paused = False
        self._waits = False
        self._next = 0
        self._last = 0
        self._end = b""
        self._pace_s = 0.0
        self._start_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._waits:
            self._waits = False
            self._go_on()

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
            self._held = b""
        while data:
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                self._held = data
                return
            head = data[:end].lower()
            found = _LENGTH(head)
            if found is not None:
                after = end + int(found[1])
            elif b"\r\ntransfer-encoding: chunked" in head:
                after = data.find(b"\r\n0\r\n\r\n", end - 2) + 7
                after = after if after > 6 else len(data) + 1
            else:
                after = end
            if after > len(data):
                self._held = data
                return
            self._answer(head, data[end:after])
            data = data[after:]

    def _answer(self, head: bytes, body: bytes) -> None:
        assert self._transport is not None
        if not head.startswith(b"post "):
            path = head.split(b" ", 2)[1]
            self._transport.write(_GETS.get(path, _NOT_FOUND))
        elif b"/v1/chat/completions " not in head:
            self._transport.write(_NOT_FOUND)
        elif b'"stream"' in body and _STREAM(body):
            self._transport.write(_STREAM_HEAD)
            self._begin(body)
        else:
            self._transport.write(_WHOLE)

    def _begin(self, body: bytes) -> None:
        limit, pace = _MAX_TOKENS(body), _PACE(body)
        self._last = min(int(limit[1]) if limit else WHOLE_TOKENS, MOST_EVENTS)
        usage = _event([], usage=_usage(self._last)) if b"include_usage" in body else b""
        self._end = _FINISH + usage + _DONE
        self._next = 0
        self._pace_s = int(pace[1]) / 1000 if pace else 0.0
        self._start_s = self._loop.time()
        # Not in the write of the head: vLLM answers with it before its first result.
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._pace_s:
            self._paced_event()
        else:
            self._sender.add(self)

    def next_event(self) -> bool:
        """False when nothing more can be written for now, or ever."""
        transport = self._transport
        if transport is None:
            return False
        if self._paused:
            self._waits = True
            return False
        number = self._next
        self._next = number + 1
        if number < self._last:
            # The role comes with the first result, as from vLLM.
            transport.write(_WORDS[number] if number else _ROLE + _WORDS[0])
            return True
        transport.write(self._end)
        return False

    def _paced_event(self) -> None:
        if self._transport is not None and self.next_event():
            due_s = self._start_s + self._next * self._pace_s
            self._timer = self._loop.call_later(
                max(0.0, due_s - self._loop.time()), self._paced_event
            )


def stopped_with_parent() -> asyncio.Event:
    """Set by a signal, and when the process ends that holds the other end of standard input."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 1):
            stopped.set()
            loop.remove_reader(sys.stdin.fileno())

    loop.add_reader(sys.stdin.fileno(), read)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    return stopped


async def _serve(host: str, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    sender = _Sender(loop)
    stopped = stopped_with_parent()
    servers = [
        await loop.create_server(lambda: _Connection(loop, sender), host, port, backlog=4096)
        for port in ports
    ]
    print("ready", flush=True)
    await stopped.wait()
    for server in servers:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, action="append", required=True)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.host, options.port))


if __name__ == "__main__":
    main()
