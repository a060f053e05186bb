"""Requests that wait: for a model to wake, for room at its groups, and for their turn."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from anthropic import APIStatusError, AsyncAnthropic
from openai import APIError, AsyncOpenAI, InternalServerError, RateLimitError
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, served_model, standing, until
from tests.mock_rank import Fault, MockRank

from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.fleet import Fleet, GroupLoad, GroupState
from expertmesh.core.domain.tenant import Priority
from expertmesh.core.metering.usage import Outcome
from expertmesh.gateway.limits import GatewayLimits

CHAT_PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "one two"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
STREAM = {**CHAT, "stream": True}
COMMENT = b": waiting for a group\n\n"
PATIENT = (served_model(max_wait_s=10.0),)
TALKATIVE = replace(QUICK, hold_silent_s=0.1, hold_comment_s=0.1)
ONE_SLOT = SlotRules(max_in_flight_per_rank=1)


async def ask(stand: Stand, secret: str = SECRET, **fields: Any) -> tuple[int, Any, Any]:
    async with stand.post(CHAT_PATH, {**CHAT, **fields}, secret=secret) as response:
        return response.status, await response.json(), response.headers


async def waiting(stand: Stand, count: int) -> None:
    await until(lambda: stand.service.admission.queued(MODEL) == count)


async def queue(
    stand: Stand, count: int, secret: str = SECRET, **fields: Any
) -> list["asyncio.Task[tuple[int, Any, Any]]"]:
    """So many more that wait, one after the other."""
    tasks = []
    for number in range(count):
        before = stand.service.admission.queued(MODEL)
        asked = {"seed": number, **fields}
        tasks.append(asyncio.create_task(ask(stand, secret, **asked)))
        await waiting(stand, before + 1)
    return tasks


@asynccontextmanager
async def asleep(limits: GatewayLimits = QUICK, max_wait_s: float = 10.0) -> AsyncIterator[Stand]:
    """The model is known and has no group."""
    async with standing(limits) as stand:
        await stand.show(models=(served_model(max_wait_s=max_wait_s),))
        yield stand


@asynccontextmanager
async def busy(
    limits: GatewayLimits = QUICK,
    max_wait_s: float = 10.0,
    slots: SlotRules = ONE_SLOT,
    **options: Any,
) -> AsyncIterator[tuple[Stand, MockRank]]:
    """One rank with one place, which is taken until its gate opens."""
    async with standing(limits, slots=slots) as stand:
        rank = await stand.rank(gate=asyncio.Event(), **options)
        await stand.show(group_of(rank), models=(served_model(max_wait_s=max_wait_s),))
        first = asyncio.create_task(ask(stand, max_tokens=1))
        await until(lambda: len(rank.seen) == 1)
        yield stand, rank
        assert rank.gate is not None
        rank.gate.set()
        assert (await first)[0] == 200


# Waking.


async def test_one_wake_is_told_at_once() -> None:
    """Long before the next report is due."""
    limits = replace(QUICK, exchange_period_s=30.0)
    async with standing(limits, fleet=Fleet(2, PATIENT)) as stand:
        await until(lambda: stand.service.view.fleet)
        reports = len(stand.controller.reports)
        asked_at_s = time.monotonic()
        first = await queue(stand, 1)
        await until(lambda: len(stand.controller.reports) > reports)
        assert time.monotonic() - asked_at_s < 1.0
        traffic = stand.controller.last.models[MODEL]
        assert (traffic.wake_requests, traffic.queued_requests) == (1, 1)
        # The others would say nothing new.
        others = await queue(stand, 5)
        await asyncio.sleep(0.2)
        assert len(stand.controller.reports) == reports + 1
        # Later, when nobody waits any more, a request is news again.
        for task in (*first, *others):
            task.cancel()
        await waiting(stand, 0)
        (again,) = await queue(stand, 1)
        await until(lambda: len(stand.controller.reports) == reports + 2)
        again.cancel()


async def test_each_sleeping_model_is_woken() -> None:
    models = (*PATIENT, served_model("other", 10.0))
    async with standing(replace(QUICK, exchange_period_s=30.0), fleet=Fleet(2, models)) as stand:
        await until(lambda: stand.service.view.fleet)
        tasks = []
        for name in ("other", MODEL):
            reports = len(stand.controller.reports)
            tasks.append(asyncio.create_task(ask(stand, model=name)))
            await until(lambda n=reports: len(stand.controller.reports) > n)
            assert stand.controller.last.models[name].wake_requests == 1
        for task in tasks:
            task.cancel()


# Comments, and errors after them.


async def test_comments_keep_a_stream_alive_until_it_begins() -> None:
    async with asleep(TALKATIVE) as stand:
        rank = await stand.rank()
        async with stand.post(CHAT_PATH, STREAM) as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert await response.content.readexactly(2 * len(COMMENT)) == 2 * COMMENT
            await stand.show(group_of(rank))
            text = await response.read()
        while text.startswith(COMMENT):
            text = text.removeprefix(COMMENT)
        assert text.startswith(b'data: {"id":"chatcmpl-') and text.endswith(b"data: [DONE]\n\n")
        assert COMMENT not in text
        (row,) = await stand.rows()
        assert row.outcome is Outcome.OK and row.queue_s > 0.2


async def test_a_short_wait_shows_nothing() -> None:
    async with asleep(replace(QUICK, hold_silent_s=5.0)) as stand:
        rank = await stand.rank()
        asking = asyncio.create_task(stand.post(CHAT_PATH, STREAM).__aenter__())
        await waiting(stand, 1)
        await asyncio.sleep(0.4)
        assert not asking.done()
        await stand.show(group_of(rank))
        response = await asking
        assert COMMENT not in await response.read()


async def test_the_sdks_take_a_stream_with_comments() -> None:
    async with (
        asleep(TALKATIVE) as stand,
        AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as openai,
        AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as anthropic,
    ):
        rank = await stand.rank(tokens=4)
        chat = await openai.chat.completions.create(**STREAM)
        response = await openai.responses.create(model=MODEL, input="x", stream=True)
        message = await anthropic.messages.create(max_tokens=4, **STREAM)
        # They have their heads, and the model sleeps.
        await waiting(stand, 3)
        await stand.show(group_of(rank))
        assert "".join([chunk.choices[0].delta.content async for chunk in chat]) == "w0 w1 w2 w3 "
        assert [event.type async for event in response][-1] == "response.completed"
        assert [event.type async for event in message][-1] == "message_stop"


@pytest.mark.parametrize(
    ("path", "begin"),
    [
        (CHAT_PATH, "data: "),
        ("/v1/completions", "data: "),
        ("/v1/responses", "event: error\ndata: "),
        ("/v1/messages", "event: error\ndata: "),
    ],
)
async def test_an_error_after_comments_is_an_event(path: str, begin: str) -> None:
    async with asleep(TALKATIVE, max_wait_s=0.5) as stand:
        asked = {**STREAM, "prompt": "x", "input": "x", "max_tokens": 4}
        async with stand.post(path, asked) as response:
            assert response.status == 200
            text = await response.text()
        events = text.replace(COMMENT.decode(), "")
        assert text.startswith(COMMENT.decode()) and events.startswith(begin)
        assert events.count("\n\n") == 1 and events.endswith("\n\n")
        error = json.loads(events.removeprefix(begin))
        if path == "/v1/messages":
            assert error["error"]["type"] == "overloaded_error"
        else:
            assert error["error"]["code"] == "model_not_ready"
            assert error["error"]["type"] == "server_error"
        assert "has no group yet" in error["error"]["message"]
        await until(lambda: len(stand.log_lines()) == 1)
        assert stand.log_lines()[0]["status"] == 503
        assert stand.ledger.rows == {}


async def test_the_sdks_raise_an_error_after_comments() -> None:
    async with (
        asleep(TALKATIVE, max_wait_s=0.5) as stand,
        AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as openai,
        AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as anthropic,
    ):
        with pytest.raises(APIError, match="has no group yet"):
            async for _ in await openai.chat.completions.create(**STREAM):
                pass
        with pytest.raises(APIError, match="has no group yet"):
            async for _ in await openai.responses.create(model=MODEL, input="x", stream=True):
                pass
        with pytest.raises(APIStatusError, match="has no group yet"):
            async for _ in await anthropic.messages.create(max_tokens=4, **STREAM):
                pass


@pytest.mark.parametrize(
    "fault", [Fault("refuse", status=400), Fault("refuse", status=500)], ids=["fault", "failure"]
)
async def test_a_rank_that_refuses_after_comments(fault: Fault) -> None:
    async with asleep(replace(TALKATIVE, most_wait_s=1.5)) as stand:
        rank = await stand.rank(always=fault)
        async with stand.post(CHAT_PATH, STREAM) as response:
            assert await response.content.readexactly(len(COMMENT)) == COMMENT
            await stand.show(group_of(rank))
            text = (await response.text()).replace(COMMENT.decode(), "")
        (event,) = text.removesuffix("\n\n").split("\n\n")
        assert "error" in json.loads(event.removeprefix("data: "))


async def test_whole_answers_wait_without_a_word() -> None:
    async with asleep(TALKATIVE, max_wait_s=0.5) as stand:
        status, body, headers = await ask(stand)
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert headers["content-type"] == "application/json"


# Where waiting ends.


async def test_beyond_the_wait_clients_hear_when_the_model_will_be_ready() -> None:
    async with asleep(max_wait_s=0.3) as stand:
        rank = await stand.rank()
        await stand.show(
            group_of(rank, state=GroupState.STARTING, expected_ready_at_s=time.time() + 42)
        )
        async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
            with pytest.raises(InternalServerError) as raised:
                await client.chat.completions.create(**STREAM)
        error = raised.value
        assert (error.status_code, error.code) == (503, "model_not_ready")
        assert 38 <= int(error.response.headers["retry-after"]) <= 42
        assert error.response.headers["x-em-dropped-reason"] == "no_capacity"
        assert stand.count("em_gateway_rejections_total", model=MODEL, reason="no_capacity") == 1
        # Further ahead than the clients would follow.
        await stand.show(
            group_of(rank, state=GroupState.STARTING, expected_ready_at_s=time.time() + 900)
        )
        assert (await ask(stand))[2]["retry-after"] == "120"
        # Late already.
        await stand.show(
            group_of(rank, state=GroupState.STARTING, expected_ready_at_s=time.time() - 5)
        )
        assert (await ask(stand))[2]["retry-after"] == "1"


async def test_the_clients_own_time_out_bounds_the_wait() -> None:
    """The SDKs tell theirs in a header: they get an answer before they give up."""
    async with asleep(max_wait_s=60.0) as stand:
        for sdk, path in ((AsyncOpenAI, "/v1"), (AsyncAnthropic, "")):
            client = sdk(base_url=stand.url + path, api_key=SECRET, timeout=5.4, max_retries=0)
            started_s = time.monotonic()
            with pytest.raises(Exception, match="has no group yet") as raised:
                if isinstance(client, AsyncOpenAI):
                    await client.chat.completions.create(**CHAT)
                else:
                    await client.messages.create(max_tokens=4, **CHAT)
            assert getattr(raised.value, "status_code", None) == 503
            assert 0.4 <= time.monotonic() - started_s < 3
            await client.close()
        # As the SDKs for JavaScript say it.
        started_s = time.monotonic()
        headers = {"x-stainless-timeout": "5"}
        async with stand.post(CHAT_PATH, CHAT, headers=headers) as response:
            assert response.status == 503
        assert time.monotonic() - started_s < 2


async def test_too_old_before_a_ready_group_is_429() -> None:
    async with busy(max_wait_s=0.4) as (stand, rank):
        started_s = time.monotonic()
        status, body, headers = await ask(stand)
        assert 0.4 <= time.monotonic() - started_s < 3
        assert status == 429
        assert (body["error"]["type"], body["error"]["code"]) == (
            "rate_limit_error",
            "queue_timeout",
        )
        assert headers["x-em-dropped-reason"] == "queue_timeout"
        assert int(headers["retry-after"]) >= 1
        async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
            with pytest.raises(RateLimitError):
                await client.chat.completions.create(**CHAT)
        assert len(rank.seen) == 1
        assert stand.count("em_gateway_rejections_total", reason="queue_timeout") == 2


async def test_who_may_not_wait_before_a_ready_group_is_429_at_once() -> None:
    async with busy(max_wait_s=0.0) as (stand, rank):
        status, body, headers = await ask(stand)
        assert (status, body["error"]["code"]) == (429, "queue_timeout")
        assert headers["x-em-dropped-reason"] == "queue_timeout"
        # Asleep it is 503.
        await stand.show(group_of(rank, state=GroupState.STARTING))
        status, _, headers = await ask(stand)
        assert (status, headers["x-em-dropped-reason"]) == (503, "no_capacity")


@pytest.mark.parametrize("ready", [True, False], ids=["ready", "asleep"])
async def test_a_full_queue_is_429(ready: bool) -> None:
    limits = replace(QUICK, waiting_requests=2)
    async with busy(limits) as (stand, rank):
        if not ready:
            starting = group_of(
                rank, state=GroupState.STARTING, expected_ready_at_s=time.time() + 30
            )
            await stand.show(starting)
        tasks = await queue(stand, 2)
        status, body, headers = await ask(stand)
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert headers["x-em-dropped-reason"] == "queue_full"
        if ready:
            assert 1 <= int(headers["retry-after"]) <= 120
        else:
            assert 25 <= int(headers["retry-after"]) <= 30
        assert "2 wait already" in body["error"]["message"]
        async with stand.post("/v1/messages", {**CHAT, "max_tokens": 1}) as response:
            assert response.status == 429
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        await stand.show(group_of(rank))
        assert rank.gate is not None
        rank.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200, 200]


async def test_retry_after_follows_backlog_and_drain_rate() -> None:
    """Some 200 tokens a second are served, and some 2,000 wait."""
    async with busy(replace(QUICK, waiting_requests=8)) as (stand, rank):
        assert rank.gate is not None
        rank.gate.set()
        rank.tokens, rank.token_interval_s = 50, 0.005
        for _ in range(4):
            assert (await ask(stand, max_tokens=50))[0] == 200
        rank.gate.clear()
        blocking = asyncio.create_task(ask(stand))
        await until(lambda: rank.running == 1)
        tasks = await queue(stand, 8, max_tokens=250)
        status, _, headers = await ask(stand, max_tokens=250)
        assert status == 429
        assert 4 <= int(headers["retry-after"]) <= 40
        for task in (blocking, *tasks):
            task.cancel()


# Turns.


async def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    async with busy(replace(QUICK, waiting_requests=4)) as (stand, rank):
        other = await stand.key("team-b")
        flood = await queue(stand, 4)
        modest = asyncio.create_task(ask(stand, other, seed=100))
        status, body, headers = await flood[-1]
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert headers["x-em-dropped-reason"] == "queue_full"
        assert stand.service.admission.queued(MODEL) == 4
        # Who has more in it makes no room for itself.
        assert (await ask(stand))[0] == 429
        assert rank.gate is not None
        rank.gate.set()
        answers = await asyncio.gather(*flood[:3], modest)
        assert [status for status, _, _ in answers] == [200] * 4
        seeds = [seen.json().get("seed") for seen in rank.seen[1:]]
        assert seeds == [0, 100, 1, 2]


async def test_tenants_take_turns() -> None:
    async with busy() as (stand, rank):
        other = await stand.key("team-b")
        heavy = await stand.key("team-c", weight=2.0)
        tasks = await queue(stand, 10, max_tokens=8, user="a")
        tasks += await queue(stand, 10, other, max_tokens=8, user="b")
        tasks += await queue(stand, 10, heavy, max_tokens=8, user="c")
        assert rank.gate is not None
        rank.gate.set()
        await asyncio.gather(*tasks)
        order = "".join(seen.json()["user"] for seen in rank.seen[1:])
        # Twice the weight is twice the share.
        shares = [order[:16].count(tenant) for tenant in "abc"]
        assert shares in ([4, 4, 8], [5, 4, 7], [4, 5, 7], [5, 5, 6])
        assert "aaa" not in order and "bbb" not in order


async def test_priorities_come_first() -> None:
    async with busy() as (stand, rank):
        batch = await stand.key("team-b", priority=Priority.BATCH)
        urgent = await stand.key("team-u", priority=Priority.INTERACTIVE)
        tasks = await queue(stand, 2, batch, user="batch")
        tasks += await queue(stand, 2, user="standard")
        tasks += await queue(stand, 2, urgent, user="interactive")
        assert rank.gate is not None
        rank.gate.set()
        await asyncio.gather(*tasks)
        order = [seen.json()["user"] for seen in rank.seen[1:]]
        assert order == ["interactive"] * 2 + ["standard"] * 2 + ["batch"] * 2
        await stand.rows(7)
        waited = "em_gateway_queue_wait_seconds_count"
        assert [stand.count(waited, priority=p) for p in Priority] == [2, 2, 2]


async def test_a_flood_leaves_another_tenant_its_pace() -> None:
    """One tenant keeps 50 times as many requests under way as the other, on four places."""
    async with standing(slots=SlotRules(max_in_flight_per_rank=2)) as stand:
        ranks = [await stand.rank(tokens=100, token_interval_s=0.001) for _ in range(2)]
        await stand.show(group_of(*ranks), models=PATIENT)
        flooding, modest = await stand.key("flood"), await stand.key("modest")
        loop = asyncio.get_running_loop()

        async def trickle(count: int) -> list[float]:
            times = []
            for number in range(count):
                started_s = loop.time()
                status, _, _ = await ask(stand, modest, max_tokens=30, seed=number)
                assert status == 200
                times.append(loop.time() - started_s)
            return sorted(times)

        served = 0

        async def flood(number: int) -> None:
            nonlocal served
            while True:
                status, _, _ = await ask(stand, flooding, max_tokens=8 + number % 15)
                assert status == 200
                served += 1

        alone = await trickle(100)
        floods = [asyncio.create_task(flood(number)) for number in range(50)]
        await until(lambda: stand.service.admission.queued(MODEL) > 40)
        beside = await trickle(100)
        depth = stand.service.admission.queued(MODEL)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        p99_alone, p99_beside = alone[98], beside[98]
        print(
            f"p99 of the modest tenant: {1000 * p99_alone:.1f} ms alone, "
            f"{1000 * p99_beside:.1f} ms beside {served} requests of the other"
        )
        assert depth > 40 and served > 100
        assert p99_beside <= 2 * p99_alone


# Room as the engines report it.


async def test_no_more_than_the_kv_cache_holds() -> None:
    async with busy(slots=SlotRules()) as (stand, rank):
        full = GroupLoad(kv_usage=0.96, kv_tokens=10_000)
        await stand.show(group_of(rank), loads={rank.group: full})
        tasks = await queue(stand, 3)
        await asyncio.sleep(0.15)
        assert len(rank.seen) == 1
        traffic = stand.controller.last.models[MODEL]
        assert (traffic.queued_requests, traffic.wake_requests) == (3, 0)
        await stand.show(group_of(rank), loads={rank.group: replace(full, kv_usage=0.5)})
        await until(lambda: len(rank.seen) == 4)
        await waiting(stand, 0)
        assert rank.gate is not None
        rank.gate.set()
        assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}


async def test_no_more_than_the_engines_batch() -> None:
    async with busy(slots=SlotRules(waiting_per_rank=1)) as (stand, rank):
        load = GroupLoad(max_running=2)
        await stand.show(group_of(rank), loads={rank.group: load})
        running = [asyncio.create_task(ask(stand, seed=n)) for n in range(2)]
        await until(lambda: len(rank.seen) == 3)
        tasks = await queue(stand, 2)
        await asyncio.sleep(0.1)
        assert len(rank.seen) == 3
        # What other gateways have there counts as well.
        await stand.show(group_of(rank), loads={rank.group: GroupLoad(max_running=6, in_flight=9)})
        await asyncio.sleep(0.2)
        assert len(rank.seen) == 3
        await stand.show(group_of(rank), loads={rank.group: GroupLoad(max_running=6, in_flight=4)})
        await until(lambda: len(rank.seen) == 5)
        assert rank.gate is not None
        rank.gate.set()
        assert {status for status, _, _ in await asyncio.gather(*running, *tasks)} == {200}
