"""Ranks, clients and the controller failing in the middle of things."""

import asyncio
import json
import socket
import time
from dataclasses import replace

import pytest
from aiohttp import web
from anthropic import APIStatusError, AsyncAnthropic
from openai import APIError, AsyncOpenAI
from tests.gateway.stand import (
    MODEL,
    QUICK,
    SECRET,
    Stand,
    group_of,
    served_model,
    standing,
    until,
)
from tests.mock_rank import Fault, MockRank

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.metering.usage import Outcome

MESSAGES = [{"role": "user", "content": "one two"}]
CHAT = {"model": MODEL, "messages": MESSAGES}
STREAM = {**CHAT, "stream": True}
BEFORE_THE_FIRST_BYTE = [
    Fault("reset"),
    Fault("end"),
    Fault("error"),
    Fault("refuse", status=500),
    Fault("refuse", status=503),
    Fault("refuse", status=429),
    Fault("refuse", status=401),
    Fault("refuse", status=404, body=b"Path '/x' not found.", content_type="text/plain"),
]


def named(fault: Fault) -> str:
    return f"{fault.kind} {fault.status}"


async def two_groups(stand: Stand) -> tuple[MockRank, MockRank]:
    first = await stand.rank("em-tiny-moe-pool-a-0")
    second = await stand.rank("em-tiny-moe-pool-a-1")
    await stand.show(group_of(first), group_of(second))
    return first, second


def one_that_fails(fault: Fault, *ranks: MockRank) -> None:
    """Whichever rank gets the request first fails; the other one does not."""
    queue = type(ranks[0].faults)([fault])
    for rank in ranks:
        rank.faults = queue


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE, ids=named)
async def test_retry_on_another_group(stand: Stand, fault: Fault, stream: bool) -> None:
    if fault.kind == "error" and not stream:
        fault = Fault("refuse", status=502)
    ranks = await two_groups(stand)
    one_that_fails(fault, *ranks)
    async with stand.post("/v1/chat/completions", {**CHAT, "stream": stream}) as response:
        assert response.status == 200
        text = await response.text()
    assert "w7 " in text and "error" not in text
    assert sorted(len(rank.seen) for rank in ranks) == [1, 1]
    (row,) = await stand.rows()
    assert (row.outcome, row.completion_tokens) == (Outcome.OK, 8)
    assert stand.count("em_gateway_retries_total", model=MODEL) == 1
    groups = stand.controller.last.groups
    assert sorted(count.errors_total for count in groups.values()) == [0, 1]
    assert groups[row.group].errors_total == 0
    assert all(count.in_flight == 0 for count in groups.values())


async def test_retry_after_refused_connection_on_another_group_and_rank(stand: Stand) -> None:
    first, second = await two_groups(stand)
    await first.stop()
    for _ in range(6):
        async with stand.post("/v1/chat/completions", STREAM) as response:
            assert response.status == 200 and "[DONE]" in await response.text()
    assert len(second.seen) == 6
    # A group that fails is avoided for a while, not tried first by every second request.
    assert stand.count("em_gateway_retries_total", model=MODEL) == 1
    alone = [await stand.rank("em-tiny-moe-pool-a-2") for _ in range(2)]
    await stand.show(group_of(*alone))
    await alone[0].stop()
    for _ in range(4):
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 200
    assert len(alone[1].seen) == 4


async def test_no_second_rank_of_a_group_that_answers_badly(stand: Stand) -> None:
    ranks = [await stand.rank() for _ in range(2)]
    await stand.show(group_of(*ranks))
    for rank in ranks:
        rank.always = Fault("refuse", status=500)
    async with stand.post("/v1/chat/completions", CHAT) as response:
        assert response.status == 502
        body = await response.json()
        assert response.headers["retry-after"] == "1"
    assert body["error"]["type"] == "server_error"
    assert body["error"]["code"] == "upstream_unavailable"
    assert "answered with status 500: Something broke." in body["error"]["message"]
    assert sum(len(rank.seen) for rank in ranks) == 1
    (row,) = await stand.rows()
    assert (row.outcome, row.prompt_tokens, row.completion_tokens) == (Outcome.ERROR, 0, 0)
    assert row.ttft_s is None


async def test_at_most_two_attempts(stand: Stand) -> None:
    ranks = [await stand.rank(f"em-tiny-moe-pool-a-{n}", always=Fault("reset")) for n in range(3)]
    await stand.show(*map(group_of, ranks))
    async with stand.post("/v1/messages", STREAM) as response:
        assert response.status == 502
        body = await response.json()
    assert body["error"]["type"] == "api_error"
    assert sum(len(rank.seen) for rank in ranks) == 2


async def test_backpressure_of_all_groups_reaches_the_client(stand: Stand) -> None:
    rank = await stand.rank(always=Fault("refuse", status=503, headers=(("Retry-After", "7"),)))
    await stand.show(group_of(rank))
    async with stand.post("/v1/messages", CHAT) as response:
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert (await response.json())["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("state", [s for s in GroupState if s is not GroupState.READY])
async def test_only_ready_groups_get_requests(stand: Stand, state: GroupState) -> None:
    ready = await stand.rank("em-tiny-moe-pool-a-0")
    other = await stand.rank("em-tiny-moe-pool-a-1")
    await stand.show(group_of(ready), group_of(other, state=state))
    for _ in range(4):
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 200
    assert (len(ready.seen), len(other.seen)) == (4, 0)


@pytest.mark.parametrize("kind", ["reset", "end", "error", "stall"])
async def test_death_while_streaming_ends_with_an_error_event(kind: str) -> None:
    async with standing(replace(QUICK, stall_timeout_s=0.3)) as stand:
        ranks = await two_groups(stand)
        one_that_fails(Fault(kind, after_events=4), *ranks)
        async with stand.post("/v1/chat/completions", STREAM) as response:
            assert response.status == 200
            text = await response.text()
        events = [event for event in text.split("\n\n") if event]
        assert len(events) == 5 and "w2 " in events[3]
        error = json.loads(events[4].removeprefix("data: "))["error"]
        assert error["message"].startswith("The stream broke off: em-tiny-moe-pool-a-")
        assert (error["type"], error["code"]) == ("server_error", "upstream_failed")
        assert "[DONE]" not in text
        (row,) = await stand.rows()
        # Three words after the event with the role, and a guess at the prompt.
        assert (row.outcome, row.completion_tokens) == (Outcome.ERROR, 3)
        assert row.prompt_tokens > 0 and row.tariff_usd > 0
        assert sum(len(rank.seen) for rank in ranks) == 1
        assert stand.controller.last.groups[row.group].errors_total == 1


async def test_the_openai_sdk_raises_when_a_stream_breaks(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank), models=(served_model(max_wait_s=5.0),))
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        rank.faults.append(Fault("reset", after_events=3))
        seen: list[str] = []
        stream = await client.chat.completions.create(**STREAM)
        with pytest.raises(APIError, match="The stream broke off"):
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)
        assert seen == ["", "w0 ", "w1 "]
        rank.faults.append(Fault("reset", after_events=4))
        responses = await client.responses.create(model=MODEL, input="x", stream=True)
        with pytest.raises(APIError, match="The stream broke off"):
            async for _ in responses:
                pass
    rows = await stand.rows(2)
    assert [row.completion_tokens for row in rows] == [2, 2]


async def test_the_anthropic_sdk_raises_when_a_stream_breaks(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    rank.faults.append(Fault("reset", after_events=4))
    async with AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as client:
        stream = await client.messages.create(
            model=MODEL, messages=MESSAGES, max_tokens=8, stream=True
        )
        with pytest.raises(APIStatusError, match="The stream broke off") as raised:
            async for _ in stream:
                pass
    assert raised.value.type == "api_error"
    (row,) = await stand.rows()
    # The first event told the exact prompt.
    assert row.prompt_tokens == len(json.dumps(MESSAGES).split())
    assert (row.outcome, row.completion_tokens) == (Outcome.ERROR, 2)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_silence_before_the_first_byte_is_retried(stream: bool) -> None:
    limits = replace(QUICK, first_byte_timeout_s=0.3, whole_answer_timeout_s=0.3)
    async with standing(limits) as stand:
        ranks = await two_groups(stand)
        one_that_fails(Fault("hang"), *ranks)
        started_s = time.monotonic()
        async with stand.post("/v1/chat/completions", {**CHAT, "stream": stream}) as response:
            assert response.status == 200
            await response.read()
        assert 0.3 <= time.monotonic() - started_s < 5
        for rank in ranks:
            rank.always = Fault("hang")
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 504
            assert "sent nothing for too long" in (await response.json())["error"]["message"]


async def test_requests_leave_a_group_that_is_lost(stand: Stand) -> None:
    ranks = await two_groups(stand)
    one_that_fails(Fault("hang"), *ranks)
    asking = asyncio.create_task(
        stand.http.post(
            f"{stand.url}/v1/chat/completions", json=STREAM, headers={"x-api-key": SECRET}
        )
    )
    await until(lambda: any(rank.seen for rank in ranks))
    hung, sound = ranks if ranks[0].seen else reversed(ranks)
    await stand.show(group_of(hung, state=GroupState.LOST), group_of(sound))
    response = await asyncio.wait_for(asking, 2)
    assert response.status == 200 and "[DONE]" in await response.text()
    (row,) = await stand.rows()
    assert row.group == sound.group
    assert len(hung.aborted_at_s) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_aborts_its_request(stand: Stand, stream: bool) -> None:
    rank = await stand.rank(token_interval_s=0.05, tokens=200)
    await stand.show(group_of(rank))
    asking = asyncio.create_task(
        stand.http.post(
            f"{stand.url}/v1/chat/completions",
            json={**CHAT, "stream": stream},
            headers={"x-api-key": SECRET},
        )
    )
    await until(lambda: rank.running == 1)
    if stream:
        response = await asking
        for _ in range(3):
            await response.content.readany()
        left_at_s = time.monotonic()
        response.close()
    else:
        left_at_s = time.monotonic()
        asking.cancel()
    await until(lambda: rank.aborted_at_s)
    assert rank.aborted_at_s[0] - left_at_s < 0.2
    await until(lambda: rank.running == 0)
    (row,) = await stand.rows()
    assert row.outcome is Outcome.ABORTED
    assert (row.completion_tokens > 0) is stream
    assert (
        stand.count(
            "em_gateway_requests_total", model=MODEL, endpoint="chat_completions", status="499"
        )
        == 1
    )
    group = stand.controller.last.groups[rank.group]
    assert (group.in_flight, group.tokens_in_flight, group.errors_total) == (0, 0, 0)


async def test_a_client_that_does_not_read_is_given_up() -> None:
    async with standing(replace(QUICK, client_stall_timeout_s=0.5)) as stand:
        rank = await stand.rank(tokens=40_000, max_model_len=50_000)
        await stand.show(group_of(rank))
        with socket.create_connection(("127.0.0.1", int(stand.url.rsplit(":", 1)[1]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({**STREAM, "max_tokens": 40_000}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {SECRET}\r\n"
            head += f"content-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            (row,) = await stand.rows()
        assert row.outcome is Outcome.ABORTED


async def test_the_gateway_keeps_the_last_fleet_while_the_controller_is_away(
    stand: Stand,
) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    answers: list[web.Response] = [
        web.Response(status=500),
        web.Response(body=b"no fleet"),
        web.Response(body=b'{"version": "x"}'),
    ]
    for stand.controller.broken in answers:
        reports = len(stand.controller.reports)
        await until(lambda since=reports: len(stand.controller.reports) > since + 1)
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 200
    port = int(stand.controller.url.rsplit(":", 1)[1])
    await stand.controller.stop()
    await asyncio.sleep(0.15)
    async with stand.post("/v1/chat/completions", CHAT) as response:
        assert response.status == 200
    async with stand.http.get(f"{stand.url}/readyz") as response:
        assert response.status == 200
    # It comes back with a smaller version, having lost its state.
    stand.controller.broken = None
    stand.controller.fleet = replace(stand.controller.fleet, version=1, groups=())
    await stand.controller.start(port)
    await until(lambda: not stand.service.view.is_ready(MODEL))


async def test_before_the_first_fleet_and_keys_nothing_is_ready() -> None:
    async with standing() as stand:
        await stand.controller.stop()
        stand.service.view.fleet = None
        stand.service.ring.loaded = False
        stand.service.ring._keys = {}
        stand.keys.error = OSError("no store")
        async with stand.http.get(f"{stand.url}/readyz") as response:
            assert response.status == 503
            assert len((await response.json())["missing"]) == 2
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert "has not loaded its keys" in (await response.json())["error"]["message"]
        stand.keys.error = None
        await until(lambda: stand.service.ring.loaded)
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 503
            assert "does not know the fleet" in (await response.json())["error"]["message"]


async def test_numbers_beyond_all_bounds_do_not_reach_the_report(stand: Stand) -> None:
    rank = await stand.rank(first_token_s=0.3)
    await stand.show(group_of(rank))
    asked = {**CHAT, "max_completion_tokens": 1, "max_tokens": 10**40, "max_output_tokens": 10**18}
    bodies = [asked, {**asked, "max_completion_tokens": 10**18}]
    asking = [
        asyncio.create_task(
            stand.http.post(
                f"{stand.url}/v1/chat/completions", json=body, headers={"x-api-key": SECRET}
            )
        )
        for body in bodies
    ]
    await until(lambda: rank.seen)
    reports = len(stand.controller.reports)
    await until(lambda: len(stand.controller.reports) > reports + 2)
    assert stand.controller.last.groups[rank.group].tokens_in_flight < 2 * 4200
    for response in await asyncio.gather(*asking):
        response.release()


async def test_a_fault_of_the_gateway_itself_has_the_protocols_shape(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    view = stand.service.view

    def choose(call: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(view, "choose", choose)
    async with stand.post("/v1/messages", CHAT) as response:
        assert response.status == 500
        assert (await response.json())["error"] == {
            "type": "api_error",
            "message": "The gateway failed; its log says why.",
        }
    assert "a defect" in caplog.text
    monkeypatch.undo()
    async with stand.post("/v1/messages", CHAT) as response:
        assert response.status == 200


async def test_a_task_that_fails_starts_again(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await until(lambda: stand.controller.reports)
    with monkeypatch.context() as broken:
        broken.setattr(stand.service.admission, "traffic", lambda: 1 / 0)
        await until(lambda: "a task failed" in caplog.text)
    reports = len(stand.controller.reports)
    await until(lambda: len(stand.controller.reports) > reports)


async def test_load_spreads_over_ranks_and_is_reported(stand: Stand) -> None:
    first = [await stand.rank("em-tiny-moe-pool-a-0", first_token_s=0.4) for _ in range(2)]
    second = [await stand.rank("em-tiny-moe-pool-a-1", first_token_s=0.4) for _ in range(2)]
    await stand.show(group_of(*first), group_of(*second))
    asking = [
        asyncio.create_task(
            stand.http.post(
                f"{stand.url}/v1/chat/completions",
                json={**CHAT, "max_tokens": 10},
                headers={"x-api-key": SECRET},
            )
        )
        for _ in range(8)
    ]
    await until(lambda: sum(len(rank.seen) for rank in first + second) == 8)
    assert [len(rank.seen) for rank in first + second] == [2, 2, 2, 2]
    reports = len(stand.controller.reports)
    await until(lambda: len(stand.controller.reports) > reports + 1)
    report = stand.controller.last
    assert report.models[MODEL].arrivals_total == 8
    assert [count.in_flight for count in report.groups.values()] == [4, 4]
    assert all(count.tokens_in_flight > 40 for count in report.groups.values())
    for response in await asyncio.gather(*asking):
        assert response.status == 200
        response.release()
    await until(lambda: all(c.in_flight == 0 for c in stand.controller.last.groups.values()))
    assert [c.requests_total for c in stand.controller.last.groups.values()] == [4, 4]
