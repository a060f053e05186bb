"""A key works from the moment it is made, whatever the gateway has heard of it; others are refused
as before, and cost the store nothing."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, standing
from tests.mock_rank import MockRank

CHAT_PATH = "/v1/chat/completions"
NEW = "sk-em-" + "n" * 43
MADE_UP = "sk-em-" + "u" * 43


def chat(size: int = 1, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "x" * size}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, **fields}


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """By itself it does not look at the store again."""
    async with standing(replace(QUICK, keys_period_s=60.0)) as started:
        yield started


@pytest.fixture
async def rank(stand: Stand) -> MockRank:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    return rank


async def raw(stand: Stand, data: bytes, answers: int) -> list[bytes]:
    """The statuses of so many answers."""
    parts = urlsplit(stand.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(data)
    seen = b""
    async with asyncio.timeout(10):
        while seen.count(b"HTTP/1.1 ") < answers:
            part = await reader.read(65536)
            assert part, seen
            seen += part
    writer.close()
    return [answer[:3] for answer in seen.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("size", [1, 15_000, 60_000, 900_000])
async def test_the_first_request_with_a_new_key_is_answered(
    stand: Stand, rank: MockRank, size: int
) -> None:
    stand.keys.add(NEW, "team-b")
    began_s = time.monotonic()
    async with stand.post(CHAT_PATH, chat(size), secret=NEW) as response:
        assert response.status == 200
        await response.read()
    assert time.monotonic() - began_s < 1.0
    assert json.loads(rank.seen[-1].body)["messages"][0]["content"] == "x" * size
    (row,) = await stand.rows()
    assert row.tenant == "team-b"


async def test_streams_models_and_the_admin_api_take_it_too(stand: Stand, rank: MockRank) -> None:
    stand.keys.add(NEW, "team-b")
    async with stand.post(CHAT_PATH, chat(stream=True), secret=NEW) as response:
        assert response.status == 200 and b"[DONE]" in await response.read()
    other, admin = "sk-em-" + "o" * 43, "sk-em-" + "r" * 43
    stand.keys.add(other, "team-b")
    async with stand.http.get(f"{stand.url}/v1/models", headers={"x-api-key": other}) as response:
        assert response.status == 200
    stand.keys.add(admin, "ops", admin=True)
    headers = {"x-api-key": admin}
    async with stand.http.get(f"{stand.url}/admin/v1/tenants", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize("framing", ["chunked", "expect"])
async def test_a_long_body_waits_on_the_wire_until_the_key_is_known(
    stand: Stand, rank: MockRank, framing: str
) -> None:
    stand.keys.add(NEW, "team-b")
    body = json.dumps(chat(400_000)).encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    headers = {"Authorization": f"Bearer {NEW}"}
    async with stand.http.post(
        stand.url + CHAT_PATH,
        data=parts() if framing == "chunked" else body,
        headers=headers,
        expect100=framing == "expect",
    ) as response:
        assert response.status == 200
    assert rank.seen[-1].body == body


async def test_no_word_to_go_on_before_the_key_is_known(
    stand: Stand, rank: MockRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asyncio.Event()
    version = stand.keys.version

    async def late() -> int:
        await answers.wait()
        return await version()

    monkeypatch.setattr(stand.keys, "version", late)
    stand.keys.add(NEW, "team-b")
    parts = urlsplit(stand.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps(chat(100_000)).encode()
    writer.write(
        b"POST %b HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\nexpect: 100-continue\r\n"
        b"content-length: %d\r\n\r\n" % (CHAT_PATH.encode(), NEW.encode(), len(body))
    )
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readline(), 0.3)
    answers.set()
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 100 Continue\r\n"
    assert await reader.readline() == b"\r\n"
    writer.write(body)
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 200 OK\r\n"
    writer.close()


async def test_pipelined_requests_are_answered_in_their_order(stand: Stand, rank: MockRank) -> None:
    stand.keys.add(NEW, "team-b")

    def request(secret: str, size: int) -> bytes:
        body = json.dumps(chat(size)).encode()
        return b"POST %b HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\ncontent-length: %d\r\n\r\n%b" % (
            CHAT_PATH.encode(),
            secret.encode(),
            len(body),
            body,
        )

    data = (
        request(NEW, 1)
        + request(SECRET, 1)
        + request(MADE_UP, 1)
        + request(NEW, 40_000)
        + request(SECRET, 40_000)
    )
    assert await raw(stand, data, 5) == [b"200", b"200", b"401", b"200", b"200"]
    # What is too long to be taken unseen and has no key ends the connection.
    assert await raw(stand, request(SECRET, 1) + request(MADE_UP, 300_000), 2) == [b"200", b"401"]


@pytest.mark.parametrize("size", [1, 900_000])
async def test_a_made_up_key_is_refused_soon(stand: Stand, rank: MockRank, size: int) -> None:
    for _ in range(3):
        began_s = time.monotonic()
        async with stand.post(CHAT_PATH, chat(size), secret=MADE_UP) as response:
            assert response.status == 401
            assert (await response.json())["error"]["code"] == "invalid_api_key"
        assert time.monotonic() - began_s < 1.0
    assert rank.seen == []
    async with stand.http.get(f"{stand.url}/v1/models", headers={"x-api-key": MADE_UP}) as response:
        assert response.status == 401
    assert [line["status"] for line in stand.log_lines()][-1:] in ([], [401])


async def test_a_flood_of_made_up_keys_asks_the_store_a_few_times_a_second(
    stand: Stand, rank: MockRank
) -> None:
    before = stand.keys.reads
    began_s = time.monotonic()
    statuses: list[int] = []

    async def flood(first: int) -> None:
        for number in range(first, first + 8):
            secret = f"sk-em-{number:043d}"
            async with stand.post(CHAT_PATH, chat(), secret=secret) as response:
                statuses.append(response.status)

    async with asyncio.TaskGroup() as group:
        for client in range(90):
            group.create_task(flood(1000 * client))
        for _ in range(50):
            asked_s = time.monotonic()
            async with stand.post(CHAT_PATH, chat()) as response:
                assert response.status == 200
            assert time.monotonic() - asked_s < 1.0
    took_s = time.monotonic() - began_s
    assert statuses == [401] * 720
    assert stand.keys.reads - before <= took_s * 4 + 2
    assert len(rank.seen) == 50


@pytest.mark.parametrize("how", ["hangs", "fails"])
async def test_a_store_that_is_away_delays_nobody_for_long(
    stand: Stand, rank: MockRank, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def hangs() -> int:
        if how == "fails":
            raise OSError("no store")
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(stand.keys, "version", hangs)

    async def ask(number: int) -> float:
        began_s = time.monotonic()
        async with stand.post(CHAT_PATH, chat(), secret=f"sk-em-{number:043d}") as response:
            assert response.status == 401
        return time.monotonic() - began_s

    assert max(await asyncio.gather(*(ask(number) for number in range(40)))) < 1.5
    async with stand.post(CHAT_PATH, chat()) as response:
        assert response.status == 200


async def test_who_leaves_while_it_waits_harms_nobody(
    stand: Stand, rank: MockRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = stand.keys.version

    async def late() -> int:
        await asyncio.sleep(0.3)
        return await version()

    monkeypatch.setattr(stand.keys, "version", late)
    stand.keys.add(NEW, "team-b")
    timeout = aiohttp.ClientTimeout(total=0.1)
    for size in (1, 60_000):
        with pytest.raises(TimeoutError):
            await stand.post(CHAT_PATH, chat(size), secret=NEW, timeout=timeout)
    await asyncio.sleep(0.6)
    assert len(rank.seen) <= 1
    async with stand.post(CHAT_PATH, chat(), secret=NEW) as response:
        assert response.status == 200
