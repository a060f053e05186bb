"""Two thousand streams at once, with clients that read slowly and clients that vanish."""

import asyncio
import json
import random
import resource
import socket
import statistics
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import uvloop
from tests.gateway.abuse.fast_rank import FastRank, fast_rank
from tests.gateway.abuse.gateway_process import GatewayProcess, gateway_process
from tests.gateway.abuse.wire import read_answers

from expertmesh.core.domain.tenant import Limits
from expertmesh.core.metering.usage import Outcome
from expertmesh.store.ledger import Ledger

STREAMS = 2000
SLOW = 200
"""Half of them read nothing, the others one byte a second."""
VANISHING = 200
EVENTS = 64
PACE_MS = 170
SLOW_EVENT_BYTES = 32_768
STALL_S = 3.0
START_S = 3.0
"""The streams begin within it."""
KERNEL_BYTES = 16_384
"""Send and receive buffers: what the kernel holds for a client, the gateway need not."""
HELD_BYTES = 300_000
STREAM_BYTES = 20_000
"""What a good stream may cost the gateway."""
FILES = 2 * STREAMS + 500


@pytest.mark.integration
def test_two_thousand_streams(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES:
        pytest.skip(f"this process may open {hard} files, and {FILES} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    try:
        uvloop.run(_many(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _many(folder: Path) -> None:
    async with (
        fast_rank() as rank,
        gateway_process(
            folder,
            [rank.url],
            bounds={"client_stall_timeout_s": STALL_S},
            send_buffer_bytes=KERNEL_BYTES,
            key_limits=Limits(concurrent_requests=STREAMS),
        ) as gateway,
    ):
        before = await gateway.at_rest()
        crowd = Crowd(gateway, rank)
        rss = asyncio.create_task(_most_rss(gateway))
        await crowd.run()
        after = await gateway.at_rest()
        rss.cancel()
        most = await rss
        await gateway.left(before)

        assert crowd.faults == []
        assert rank.faults == []
        assert gateway.complaints() == []
        delays_s = crowd.cancel_delays_s()
        assert len(delays_s) == VANISHING
        assert statistics.median(delays_s) < 0.1
        assert crowd.slow_left_open == 0
        assert most - before.rss_bytes < SLOW * HELD_BYTES + STREAMS * STREAM_BYTES
        rows = await Ledger(gateway.database).usage()
        assert len({row.request_id for row in rows}) == len(rows) == STREAMS
        outcomes = [row.outcome for row in rows]
        assert outcomes.count(Outcome.OK) == STREAMS - SLOW - VANISHING
        assert outcomes.count(Outcome.ABORTED) == SLOW + VANISHING
        assert all(r.completion_tokens == EVENTS for r in rows if r.outcome is Outcome.OK)
        print(
            f"\ncancelled upstream after {statistics.median(delays_s) * 1000:.1f} ms (median), "
            f"{max(delays_s) * 1000:.0f} ms (most); RSS {before.rss_bytes / 1e6:.0f} MB before, "
            f"{most / 1e6:.0f} MB at most, {after.rss_bytes / 1e6:.0f} MB after"
        )


async def _most_rss(gateway: GatewayProcess) -> int:
    most = 0
    with suppress(asyncio.CancelledError):
        while True:
            most = max(most, gateway.process.memory_info().rss)
            await asyncio.sleep(0.1)
    return most


class Crowd:
    def __init__(self, gateway: GatewayProcess, rank: FastRank) -> None:
        self._gateway = gateway
        self._rank = rank
        self._random = random.Random(7)
        self._loop = asyncio.get_running_loop()
        self._vanished_at_s: dict[str, float] = {}
        self._waiting: dict[str, _Client] = {}
        """Clients that vanish as soon as the rank has their request."""
        self.faults: list[str] = []
        self.slow_left_open = 0
        rank.on_begin = self._begun

    async def run(self) -> None:
        kinds = ["slow"] * SLOW + ["vanishing"] * VANISHING
        kinds += ["good"] * (STREAMS - len(kinds))
        self._random.shuffle(kinds)
        async with asyncio.TaskGroup() as group:
            for number, kind in enumerate(kinds):
                run = {"slow": self._slow, "vanishing": self._vanishing, "good": self._good}[kind]
                group.create_task(run(f"{kind}-{number}", START_S * number / STREAMS))

    def cancel_delays_s(self) -> list[float]:
        """From the moment a client vanished until the rank saw its stream broken off."""
        gone = self._rank.gone_at_s
        return [gone[name] - at_s for name, at_s in self._vanished_at_s.items() if name in gone]

    def request(self, name: str, pad_bytes: int = 0) -> bytes:
        prompt = f"plan={name}:{EVENTS}:{PACE_MS}:{pad_bytes}"
        asked = {
            "model": "tiny-moe",
            "stream": True,
            "messages": [{"role": "user", "content": prompt}],
        }
        body = json.dumps(asked).encode()
        return self._gateway.head("/v1/chat/completions", len(body)) + body

    async def _connect(self, after_s: float) -> "_Client":
        await asyncio.sleep(after_s)
        _, client = await self._loop.create_connection(_Client, "127.0.0.1", self._gateway.port)
        return client

    async def _good(self, name: str, after_s: float) -> None:
        client = await self._connect(after_s)
        client.write(self.request(name))
        try:
            await asyncio.wait_for(client.whole.wait(), START_S + EVENTS * PACE_MS / 1000 + 15)
        except TimeoutError:
            self.faults.append(f"{name}: not whole, {client.events} events")
            client.transport.abort()
            return
        (answer,) = read_answers(client.data)
        events = answer.body.decode().split("\n\n")
        texts = [
            choice["delta"]["content"]
            for event in events
            if event.startswith("data: {")
            for choice in json.loads(event[6:])["choices"]
        ]
        if answer.status != 200 or texts != [*(f"w{n} " for n in range(EVENTS)), ""]:
            self.faults.append(f"{name}: {answer.status} {texts}")
        if events[-2:] != ["data: [DONE]", ""]:
            self.faults.append(f"{name}: ends with {events[-3:]}")
        client.transport.close()

    async def _vanishing(self, name: str, after_s: float) -> None:
        client = await self._connect(after_s)
        client.resets = self._random.random() < 0.5
        events = self._random.randrange(EVENTS - 4)
        if events:
            client.vanish_after = events
        else:
            self._waiting[name] = client
        client.write(self.request(name))
        await asyncio.wait_for(client.lost.wait(), START_S + EVENTS * PACE_MS / 1000 + 15)
        self._vanished_at_s[name] = client.vanished_at_s

    def _begun(self, name: str) -> None:
        client = self._waiting.pop(name, None)
        if client is not None:
            client.vanish()

    async def _slow(self, name: str, after_s: float) -> None:
        """Until the gateway has cut it off."""
        await asyncio.sleep(after_s)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES // 4)
        connection.setblocking(False)
        await self._loop.sock_connect(connection, ("127.0.0.1", self._gateway.port))
        await self._loop.sock_sendall(connection, self.request(name, SLOW_EVENT_BYTES))
        reads = self._random.random() < 0.5
        # Its backlog is there after some events; a sweep comes every second.
        deadline_s = time.monotonic() + START_S + STALL_S + 12
        try:
            while name not in self._rank.gone_at_s:
                if time.monotonic() > deadline_s:
                    self.slow_left_open += 1
                    return
                await asyncio.sleep(1)
                if reads:
                    with suppress(BlockingIOError):
                        connection.recv(1)
        except ConnectionError:
            pass  # cut off
        finally:
            connection.close()


class _Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.events = 0
        self.vanish_after = 0
        self.resets = False
        self.vanished_at_s = 0.0
        self.whole = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.events += data.count(b"\n\n")
        if self.vanish_after and self.events >= self.vanish_after:
            self.vanish()
        elif data.endswith(b"\r\n0\r\n\r\n"):
            self.whole.set()

    def vanish(self) -> None:
        if self.vanished_at_s:
            return
        self.vanished_at_s = time.monotonic()
        if self.resets:
            connection = self.transport.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        else:
            self.transport.close()
