"""Clients that send their heads a byte at a time must not keep others from being served."""

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop
from tests.gateway.abuse.fast_rank import fast_rank
from tests.gateway.abuse.gateway_process import GatewayProcess, gateway_process
from tests.gateway.abuse.wire import Answer, read_answers
from tests.gateway.stand import MODEL

SLOW = 500
HEAD_S = 2.0
GOOD_S = 4.0
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "one"}]}).encode()


@pytest.mark.integration
def test_slow_heads_keep_nobody_waiting(tmp_path: Path) -> None:
    uvloop.run(_slow_heads(tmp_path))


async def _slow_heads(folder: Path) -> None:
    async with (
        fast_rank() as rank,
        gateway_process(folder, [rank.url], bounds={"head_timeout_s": HEAD_S}) as gateway,
    ):
        before = await gateway.at_rest()
        slow = [asyncio.create_task(_drip(gateway.port)) for _ in range(SLOW)]
        await asyncio.sleep(0.5)
        assert (await gateway.counts()).clients > SLOW // 2
        times_s = []
        until_s = time.monotonic() + GOOD_S
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            assert await _ask(gateway) == [200]
            times_s.append(time.monotonic() - began_s)
        answers = await asyncio.gather(*slow)
        # Each has read why.
        assert [[answer.status for answer in got] for got in answers] == [[408]] * SLOW
        assert len(times_s) > 50
        assert sorted(times_s)[int(len(times_s) * 0.99)] < 0.5
        await gateway.left(before)
        assert gateway.complaints() == []


async def _drip(port: int) -> list[Answer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    read = asyncio.create_task(reader.read())
    head = b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: " + b"x" * 10_000
    with suppress(ConnectionError):
        for place in range(len(head)):
            if read.done():
                break
            writer.write(head[place : place + 1])
            await asyncio.sleep(0.1)
    data = await asyncio.wait_for(read, HEAD_S + 5)
    writer.close()
    return read_answers(data, ended=True)


async def _ask(gateway: GatewayProcess) -> list[int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = gateway.head("/v1/chat/completions", len(BODY), more="Connection: close\r\n")
    writer.write(head + BODY)
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return [answer.status for answer in read_answers(data, ended=True)]
