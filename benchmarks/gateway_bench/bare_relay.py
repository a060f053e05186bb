"""A relay with nothing to it: what a gateway in this language costs at the very least.

It looks up the hash of the key, reads the model's name, and passes bytes on over kept connections.
No limits, no retries, no watch over slow peers, hardly any HTTP: not a gateway.

    python -m benchmarks.gateway_bench.bare_relay --port 8000 --upstream 9000 --key secret
"""

import argparse
import asyncio
import hashlib
import re
from collections import deque
from typing import cast

import msgspec
import uvloop
from benchmarks.gateway_bench.upstream import MODEL, stopped_with_parent

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength:\s*(\d+)").search
_KEY = re.compile(rb"\r\n[Aa]uthorization: Bearer ([^\r]+)").search
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_REFUSED = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"


class _Ask(msgspec.Struct):
    model: str = ""
    stream: bool = False
    max_tokens: int | None = None


_decode = msgspec.json.Decoder(_Ask).decode


class _Relay:
    def __init__(self, ports: list[int], key: str) -> None:
        self._keys = {hashlib.sha256(key.encode()).digest(): MODEL}
        self._ports = ports
        self._turn = 0
        self.idle: deque[_Upstream] = deque()

    def may(self, head: bytes, body: bytes) -> bool:
        found = _KEY(head)
        if found is None:
            return False
        model = self._keys.get(hashlib.sha256(found[1]).digest())
        return model is not None and _decode(body).model == model

    async def connect(self) -> "_Upstream":
        self._turn += 1
        port = self._ports[self._turn % len(self._ports)]
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: _Upstream(self), "127.0.0.1", port)
        return upstream


class _Upstream(asyncio.Protocol):
    def __init__(self, relay: _Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._client: asyncio.Transport | None = None
        self._rest = -1
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def ask(self, client: asyncio.Transport, request: bytes) -> bool:
        if self._transport is None:
            return False
        self._client, self._rest, self._tail = client, -1, b""
        self._transport.write(request)
        return True

    def data_received(self, data: bytes) -> None:
        if self._client is None:
            return
        self._client.write(data)
        if self._rest < 0:
            end = data.find(b"\r\n\r\n") + 4
            found = _LENGTH(data, 0, end)
            self._rest = int(found[1]) + end if found else 0
        if self._rest:
            self._rest -= len(data)
            ended = not self._rest
        else:
            ended = data.endswith(_LAST_CHUNK) or (self._tail + data[-7:]).endswith(_LAST_CHUNK)
            self._tail = (self._tail + data)[-7:] if len(data) < 7 else data[-7:]
        if ended:
            self._client = None
            self._relay.idle.append(self)


class _Client(asyncio.Protocol):
    def __init__(self, relay: _Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        data = self._held + data if self._held else data
        end = data.find(b"\r\n\r\n") + 4
        found = _LENGTH(data, 0, end) if end > 3 else None
        if end == 3 or (found is not None and len(data) < end + int(found[1])):
            self._held = data
            return
        self._held = b""
        if data.startswith(b"GET "):
            self._transport.write(_HEALTHY)
            return
        if not self._relay.may(data[:end], data[end:]):
            self._transport.write(_REFUSED)
            return
        idle = self._relay.idle
        while idle:
            if idle.pop().ask(self._transport, data):
                return
        asyncio.get_running_loop().create_task(self._on_a_new_one(data))

    async def _on_a_new_one(self, data: bytes) -> None:
        assert self._transport is not None
        (await self._relay.connect()).ask(self._transport, data)


async def _serve(port: int, relay: _Relay) -> None:
    loop = asyncio.get_running_loop()
    stopped = stopped_with_parent()
    server = await loop.create_server(lambda: _Client(relay), "127.0.0.1", port, backlog=4096)
    await stopped.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, action="append", required=True)
    parser.add_argument("--key", required=True)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.port, _Relay(options.upstream, options.key)))


if __name__ == "__main__":
    main()
