"""Which rank a request reaches, and what becomes of it when ranks fail."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, InternalServerError
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, served_model, standing, until
from tests.mock_rank import Fault, MockRank

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.health import HealthConfig
from expertmesh.core.routing.router import RoutingConfig
from expertmesh.gateway.limits import GatewayLimits

CHAT_PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "one two"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
STREAM = {**CHAT, "stream": True}
SICK = Fault("refuse", status=500)
SOON = RoutingConfig(health=HealthConfig(first_probe_s=0.1, longest_probe_s=0.2))
PATIENT = (served_model(max_wait_s=10.0),)


def probing(limits: GatewayLimits = QUICK) -> AbstractAsyncContextManager[Stand]:
    """A stand that probes its ejected ranks soon."""
    return standing(limits, routing=SOON)


async def groups(stand: Stand, count: int = 2, ranks: int = 1, **options: Any) -> list[MockRank]:
    """So many groups of so many ranks, in one list."""
    made = [
        [await stand.rank(f"em-tiny-moe-pool-a-{number}", **options) for _ in range(ranks)]
        for number in range(count)
    ]
    await stand.show(*(group_of(*group) for group in made), models=PATIENT)
    return [rank for group in made for rank in group]


async def ask(stand: Stand, asked: Any = CHAT, **headers: str) -> tuple[int, str]:
    async with stand.post(CHAT_PATH, asked, headers=headers) as response:
        return response.status, await response.text()


def used(ranks: list[MockRank]) -> list[MockRank]:
    return [rank for rank in ranks if rank.seen]


def forget(ranks: list[MockRank]) -> None:
    for rank in ranks:
        rank.seen.clear()


# Affinity.

SessionOf = Callable[[str], tuple[dict[str, Any], dict[str, str]]]


@pytest.mark.parametrize(
    "session_of",
    [
        lambda name: (CHAT, {"x-session-id": name}),
        lambda name: ({**CHAT, "prompt_cache_key": name}, {}),
        lambda name: ({**CHAT, "user": name}, {}),
        lambda name: ({**CHAT, "metadata": {"user_id": name}}, {}),
        lambda name: ({**CHAT, "user": "all the same"}, {"x-session-id": name}),
    ],
    ids=["header", "prompt_cache_key", "user", "user_id", "header before body"],
)
async def test_a_session_stays_at_its_rank(stand: Stand, session_of: SessionOf) -> None:
    ranks = await groups(stand, count=2, ranks=2)
    homes: dict[str, int] = {}
    for number in range(48):
        name = f"session-{number}"
        asked, headers = session_of(name)
        for turn in range(2):
            messages = [*MESSAGES, {"role": "user", "content": f"turn {turn}"}]
            assert (await ask(stand, {**asked, "messages": messages}, **headers))[0] == 200
        (home,) = used(ranks)
        homes[name] = ranks.index(home)
        forget(ranks)
    assert set(homes.values()) == {0, 1, 2, 3}
    # All but the sessions of the group that leaves stay where they are.
    await stand.show(group_of(*ranks[:2]))
    for name, home in homes.items():
        if home < 2:
            asked, headers = session_of(name)
            await ask(stand, asked, **headers)
            assert used(ranks) == [ranks[home]]
            forget(ranks)


async def test_a_session_leaves_a_rank_that_is_busy(stand: Stand) -> None:
    ranks = await groups(stand, count=2)
    gate = asyncio.Event()
    for rank in ranks:
        rank.gate = gate
    asking = [
        asyncio.create_task(ask(stand, CHAT, **{"x-session-id": "the only one"})) for _ in range(12)
    ]
    await until(lambda: sum(len(rank.seen) for rank in ranks) == 12)
    # At most 1.25 times the mean and one more.
    assert max(len(rank.seen) for rank in ranks) <= 1.25 * 6 + 1
    gate.set()
    assert {status for status, _ in await asyncio.gather(*asking)} == {200}


def long_prompt(document: int, question: int) -> dict[str, Any]:
    text = f"Document {document}. " + "All that it says. " * 300
    return {
        **CHAT,
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": f"Question {question}?"},
        ],
    }


async def test_prompts_that_begin_alike_meet_at_one_rank(stand: Stand) -> None:
    ranks = await groups(stand, count=2, ranks=2, max_model_len=10_000)
    homes = []
    for document in range(8):
        for question in range(5):
            assert (await ask(stand, long_prompt(document, question)))[0] == 200
        (home,) = used(ranks)
        homes.append(ranks.index(home))
        forget(ranks)
    assert set(homes) == {0, 1, 2, 3}
    # And still, after all the others.
    for document, home in enumerate(homes):
        await ask(stand, long_prompt(document, 99))
        assert used(ranks) == [ranks[home]]
        forget(ranks)


# Health.


async def stop(rank: MockRank) -> None:
    await rank.stop()


def always(fault: Fault) -> Callable[[MockRank], Awaitable[None]]:
    async def make(rank: MockRank) -> None:
        rank.always, rank.probe = fault, SICK

    return make


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (stop, "refused"),
        (always(Fault("reset")), "reset"),
        (always(SICK), "server_error"),
        (always(Fault("refuse", status=503)), "busy"),
        (always(Fault("refuse", status=429)), "busy"),
        (always(Fault("end")), "bad_answer"),
        (always(Fault("error")), "server_error"),
        (always(Fault("hang")), "stall"),
        (always(Fault("stall")), "stall"),
    ],
    ids=["gone", "reset", "500", "503", "429", "no answer", "error", "hang", "stall"],
)
async def test_a_rank_is_left_alone_on_first_evidence_until_a_probe_is_good(
    fail: Callable[[MockRank], Awaitable[None]], reason: str
) -> None:
    async with probing(replace(QUICK, first_byte_timeout_s=0.3)) as stand:
        sick, sound = await groups(stand)
        port = sick.port
        await fail(sick)
        for _ in range(8):
            status, text = await ask(stand, STREAM)
            assert status == 200 and text.endswith("data: [DONE]\n\n")
        # One request has met it, and nobody has noticed.
        assert len(sick.seen) == (0 if reason == "refused" else 1)
        assert len(sound.seen) == 8
        rows = await stand.rows(8)
        assert {(row.outcome, row.group) for row in rows} == {(Outcome.OK, sound.group)}
        assert stand.count("em_gateway_retries_total", model=MODEL) == 1
        assert stand.count("em_gateway_retries_total", model=MODEL, reason=reason) == 1
        if reason == "refused":
            await sick.start(port)
        else:
            probes = len(sick.probes)
            await until(lambda: len(sick.probes) > probes + 1)
            assert len(sick.seen) == 1
            sick.always = sick.probe = None
        sick.seen.clear()
        await until(lambda: sick.probes)
        # A good probe lets one request in, and its answer all others.
        deadline_s = time.monotonic() + 10
        while len(sick.seen) < 3 and time.monotonic() < deadline_s:
            assert (await ask(stand, STREAM))[0] == 200
        assert len(sick.seen) >= 3
        assert stand.count("em_gateway_retries_total", model=MODEL) == 1


async def test_probes_carry_the_mesh_token() -> None:
    async with probing() as stand:
        sick, _ = await groups(stand)
        await always(SICK)(sick)
        await ask(stand)
        await ask(stand)
        await until(lambda: sick.probes)
        assert sick.probes[0].path == f"{sick.prefix}/em/info"
        assert sick.probes[0].headers["x-em-mesh-token"] == "mesh-secret"
        assert SECRET not in str(sick.probes[0].headers)


async def test_a_draining_group_keeps_what_it_has_and_gets_nothing_new(stand: Stand) -> None:
    ranks = await groups(stand, tokens=20, token_interval_s=0.02)
    running = asyncio.create_task(ask(stand, STREAM))
    await until(lambda: used(ranks) and used(ranks)[0].running == 1)
    (leaving,) = used(ranks)
    (staying,) = (rank for rank in ranks if rank is not leaving)
    staying.token_interval_s = 0.0
    await stand.show(group_of(leaving, state=GroupState.DRAINING), group_of(staying))
    for _ in range(6):
        assert (await ask(stand))[0] == 200
    assert (len(leaving.seen), len(staying.seen)) == (1, 6)
    assert leaving.running == 1
    status, text = await running
    assert status == 200 and "w19 " in text and text.endswith("data: [DONE]\n\n")


# Retries.


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_group_that_dies_in_prefill_is_replaced_unseen(
    stand: Stand, path: str, stream: bool
) -> None:
    ranks = await groups(stand, first_token_s=0.15)
    asked = {**CHAT, "prompt": "x", "input": "x", "max_tokens": 8, "stream": stream}
    headers = {"x-request-id": "same"}
    async with stand.post(path, asked, headers=headers) as response:
        expected = await response.read()
    forget(ranks)
    asking = asyncio.create_task(stand.post(path, asked, headers=headers).__aenter__())
    await until(lambda: used(ranks) and used(ranks)[0].running == 1)
    (dying,) = used(ranks)
    await dying.stop()
    response = await asking
    assert response.status == 200
    assert await response.read() == expected
    rows = await stand.rows(2)
    assert {row.outcome for row in rows} == {Outcome.OK}
    assert rows[1].group != dying.group
    assert stand.count("em_gateway_retries_total", model=MODEL) == 1
    await until(lambda: len(stand.log_lines()) == 2)
    line = stand.log_lines()[-1]
    assert (line["failed_attempts"], line["group"]) == (1, rows[1].group)


@pytest.mark.parametrize(
    ("path", "event"),
    [
        (CHAT_PATH, "data"),
        ("/v1/completions", "data"),
        ("/v1/responses", "event: error\ndata"),
        ("/v1/messages", "event: error\ndata"),
    ],
)
async def test_after_the_first_event_the_end_is_an_error_event(
    stand: Stand, path: str, event: str
) -> None:
    ranks = await groups(stand)
    for rank in ranks:
        rank.always = Fault("reset", after_events=5)
    asked = {**STREAM, "prompt": "x", "input": "x", "max_tokens": 8}
    async with stand.post(path, asked) as response:
        assert response.status == 200
        text = await response.text()
    events = text.split("\n\n")
    assert len(events) == 7 and events[-1] == ""
    kind, _, data = events[-2].partition(": {")
    assert kind == event
    error = json.loads("{" + data)
    if path == "/v1/messages":
        assert error["type"] == "error"
        assert error["error"]["type"] == "api_error"
    message = error["error"]["message"]
    assert message.startswith("The stream broke off: em-tiny-moe-pool-a-")
    assert sum(len(rank.seen) for rank in ranks) == 1
    (row,) = await stand.rows()
    assert row.outcome is Outcome.ERROR and row.tariff_usd > 0
    assert stand.count("em_gateway_retries_total", model=MODEL) == 0


async def test_at_most_two_attempts_and_one_row(stand: Stand) -> None:
    ranks = await groups(stand, count=4, always=Fault("end"))
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        with pytest.raises(InternalServerError) as raised:
            await client.chat.completions.create(**STREAM)
    assert raised.value.status_code == 502
    assert raised.value.code == "upstream_unavailable"
    assert sum(len(rank.seen) for rank in ranks) == 2
    (row,) = await stand.rows()
    assert (row.outcome, row.tariff_usd, row.ttft_s) == (Outcome.ERROR, 0, None)


async def test_retries_stop_when_much_fails() -> None:
    """Both groups fail all, while their probes are good: 60 requests may make 30 and a fifth of
    60 retries."""
    async with probing() as stand:
        ranks = await groups(stand)
        for rank in ranks:
            rank.always, rank.probe = SICK, Fault("none")
        answers = await asyncio.gather(*(ask(stand) for _ in range(60)))
        assert {status for status, _ in answers} == {502}
        assert sum(len(rank.seen) for rank in ranks) == 60 + 42
        assert stand.count("em_gateway_retries_total", model=MODEL) == 42
        rows = await stand.rows(60)
        assert {row.outcome for row in rows} == {Outcome.ERROR}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_when_the_only_group_is_dead_requests_are_held_until_its_probe_is_good(
    stream: bool,
) -> None:
    async with probing() as stand:
        (rank,) = await groups(stand, count=1)
        await always(SICK)(rank)
        asking = [asyncio.create_task(ask(stand, {**CHAT, "stream": stream}))]
        await until(lambda: stand.service.admission.queued(MODEL) == 1)
        assert len(rank.seen) == 1
        # Those that come now do not even try.
        asking += [
            asyncio.create_task(ask(stand, {**CHAT, "stream": stream, "seed": n})) for n in range(3)
        ]
        await until(lambda: stand.service.admission.queued(MODEL) == 4)
        probes = len(rank.probes)
        await until(lambda: len(rank.probes) > probes + 1)
        assert len(rank.seen) == 1
        rank.always = rank.probe = None
        for status, text in await asyncio.gather(*asking):
            assert status == 200 and "w7 " in text
        assert len(rank.seen) == 5
        rows = await stand.rows(4)
        assert all(row.outcome is Outcome.OK and row.queue_s > 0 for row in rows)


async def test_when_the_only_group_stays_dead_the_wait_has_an_end() -> None:
    async with probing() as stand:
        (rank,) = await groups(stand, count=1)
        await always(SICK)(rank)
        await stand.show(group_of(rank), models=(served_model(max_wait_s=0.6),))
        for expected in (2, 2):
            started_s = time.monotonic()
            async with stand.post(CHAT_PATH, CHAT) as response:
                assert response.status == 503
                body = await response.json()
                assert response.headers["x-em-dropped-reason"] == "no_capacity"
                assert "retry-after" in response.headers
            assert body["error"]["code"] == "model_not_ready"
            assert "do not answer" in body["error"]["message"]
            assert 0.6 <= time.monotonic() - started_s < expected
        # The first has been tried, the second has only waited.
        assert len(rank.seen) == 1
        (row,) = await stand.rows()
        assert (row.outcome, row.tariff_usd) == (Outcome.ERROR, 0)


# Clients that leave.


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", ["prefill", "early head", "decode"])
async def test_a_rank_hears_within_100_ms_that_the_client_has_left(
    stand: Stand, stream: bool, phase: str
) -> None:
    rank = await stand.rank(tokens=200)
    await stand.show(group_of(rank))
    if phase == "prefill":
        rank.gate = asyncio.Event()
    elif phase == "early head":
        rank.always = Fault("stall")
    else:
        rank.token_interval_s = 0.05
    asking = asyncio.create_task(
        stand.http.post(
            stand.url + CHAT_PATH,
            json={**CHAT, "stream": stream},
            headers={"x-api-key": SECRET},
        )
    )
    await until(lambda: rank.seen)
    if stream and phase == "decode":
        response = await asking
        await response.content.readany()
    else:
        await asyncio.sleep(0.05)
    left_at_s = time.monotonic()
    if asking.done():
        asking.result().close()
    else:
        asking.cancel()
    await until(lambda: rank.aborted_at_s)
    assert rank.aborted_at_s[0] - left_at_s < 0.1
    (row,) = await stand.rows()
    assert row.outcome is Outcome.ABORTED
    assert stand.count("em_gateway_client_aborts_total", model=MODEL) == 1
    # It is no evidence against the rank.
    assert stand.service.view.answers(MODEL)
    assert stand.controller.last.groups[rank.group].errors_total == 0


async def test_the_sdk_closes_a_stream_early(stand: Stand) -> None:
    rank = await stand.rank(tokens=200, token_interval_s=0.02)
    await stand.show(group_of(rank))
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        async with await client.chat.completions.create(**STREAM) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content == "w2 ":
                    break
        left_at_s = time.monotonic()
        await until(lambda: rank.aborted_at_s)
        assert rank.aborted_at_s[0] - left_at_s < 0.1
        rank.faults.append(Fault("reset", after_events=2))
        with pytest.raises(APIError, match="The stream broke off"):
            async for _ in await client.chat.completions.create(**STREAM):
                pass
