"""What a worker's reports say about tokens that came, wait, ran and went elsewhere."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, served_model, standing, until
from tests.mock_rank import Fault, MockRank

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.fleet import ExternalRoute
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.core.domain.traffic import ModelTraffic

CHAT_PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "one two three"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
PROMPT_TOKENS = len(json.dumps(MESSAGES).split())
"""As the mock rank counts them."""


async def ask(stand: Stand, path: str = CHAT_PATH, secret: str = SECRET, **fields: Any) -> int:
    async with stand.post(path, {**CHAT, **fields}, secret=secret) as response:
        await response.read()
        return int(response.status)


async def reported(stand: Stand) -> ModelTraffic:
    """By a report that was made after this call."""
    reports = len(stand.controller.reports)
    await until(lambda: len(stand.controller.reports) > reports + 1)
    return stand.controller.last.models[MODEL]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_tokens_are_those_of_the_engine_without_what_its_cache_held(
    stand: Stand, stream: bool
) -> None:
    rank = await stand.rank(cached_tokens=2, tokens=9)
    await stand.show(group_of(rank))
    assert [await ask(stand, stream=stream) for _ in range(3)] == [200] * 3
    traffic = await reported(stand)
    assert (traffic.arrivals_total, traffic.finished_total) == (3, 3)
    assert traffic.uncached_prompt_tokens_total == 3 * (PROMPT_TOKENS - 2)
    assert traffic.output_tokens_total == 27
    assert traffic.arrived_prompt_tokens_total > 3
    assert (traffic.queued_requests, traffic.queued_prompt_tokens) == (0, 0)
    assert (traffic.external_requests_total, traffic.external_output_tokens_total) == (0, 0)


@pytest.mark.parametrize(
    ("path", "completes"),
    [("/v1/messages", True), ("/v1/responses", True), ("/v1/embeddings", False)],
)
async def test_every_protocol_counts(stand: Stand, path: str, completes: bool) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    assert await ask(stand, path, input="one two three", max_tokens=5, max_output_tokens=5) == 200
    traffic = await reported(stand)
    assert (traffic.arrivals_total, traffic.finished_total) == (1, 1)
    assert traffic.uncached_prompt_tokens_total > 0
    assert traffic.output_tokens_total == (5 if completes else 0)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
async def test_what_needs_no_engine_is_no_traffic(stand: Stand, path: str) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    await ask(stand, path, prompt="one two")
    assert len(rank.seen) == 1
    assert await reported(stand) == ModelTraffic()


async def test_a_stream_that_its_client_leaves_counts_what_was_seen_of_it(stand: Stand) -> None:
    rank = await stand.rank(token_interval_s=0.02, tokens=500)
    await stand.show(group_of(rank))
    async with stand.post(CHAT_PATH, {**CHAT, "stream": True}) as response:
        for _ in range(3):
            await response.content.readany()
        response.close()
    await until(lambda: rank.aborted_at_s)
    (row,) = await stand.rows()
    traffic = await reported(stand)
    assert traffic.finished_total == 1
    assert traffic.output_tokens_total == row.completion_tokens > 0
    assert traffic.uncached_prompt_tokens_total == traffic.arrived_prompt_tokens_total > 0


async def test_what_nothing_is_known_of_has_not_finished(stand: Stand) -> None:
    rank = await stand.rank(token_interval_s=0.1, tokens=100)
    await stand.show(group_of(rank))
    asking = asyncio.create_task(ask(stand))
    await until(lambda: rank.running == 1)
    asking.cancel()
    await until(lambda: rank.aborted_at_s)
    rank.always = Fault("refuse", status=400)
    assert await ask(stand) == 400
    rank.always = Fault("refuse", status=500)
    assert await ask(stand) >= 500
    traffic = await reported(stand)
    assert (traffic.arrivals_total, traffic.finished_total) == (3, 0)
    assert (traffic.uncached_prompt_tokens_total, traffic.output_tokens_total) == (0, 0)


async def test_a_request_that_two_ranks_are_asked_for_counts_once(stand: Stand) -> None:
    broken = await stand.rank("em-tiny-moe-pool-a-0", always=Fault("refuse", status=500))
    sound = await stand.rank("em-tiny-moe-pool-a-1")
    await stand.show(group_of(broken), group_of(sound))
    for _ in range(4):
        assert await ask(stand) == 200
    assert broken.seen
    traffic = await reported(stand)
    assert (traffic.arrivals_total, traffic.finished_total) == (4, 4)
    assert traffic.uncached_prompt_tokens_total == 4 * PROMPT_TOKENS


async def test_each_prompt_may_be_as_long_as_the_model_allows(stand: Stand) -> None:
    await stand.show(group_of(await stand.rank()))
    text = "x" * 8_000

    async def arrived(path: str, **fields: Any) -> int:
        before = stand.service.view.count_of(MODEL).arrived_prompt_tokens
        async with stand.post(path, {"model": MODEL, **fields}) as response:
            assert response.status == 200
        return stand.service.view.count_of(MODEL).arrived_prompt_tokens - before

    # By four bytes to a token; the mock rank's own count would change that guess.
    stand.service.app._sizes.learn = lambda *_: None  # type: ignore[method-assign]
    most = served_model().max_model_len
    assert await arrived("/v1/embeddings", input=[text] * 20) == pytest.approx(40_000, rel=0.01)
    assert await arrived("/v1/completions", prompt=[text] * 5) == pytest.approx(10_000, rel=0.01)
    assert await arrived("/v1/embeddings", input=text * 20) == most
    assert await arrived("/v1/embeddings", input=[text * 10] * 2) == 2 * most


async def test_what_a_tenants_limits_refuse_has_not_arrived() -> None:
    async with standing(book=LimitBook()) as stand:
        rank = await stand.rank()
        await stand.show(group_of(rank))
        accounts = (Account("tenant:team-l", Limits(requests_per_min=1)),)
        secret = await stand.key("team-l", accounts=accounts)
        assert [await ask(stand, secret=secret) for _ in range(5)] == [200] + 4 * [429]
        assert (await reported(stand)).arrivals_total == 1


async def test_prompts_that_wait_are_counted_until_they_leave_the_queue() -> None:
    async with standing(slots=SlotRules(max_in_flight_per_rank=1)) as stand:
        rank = await stand.rank(gate=asyncio.Event())
        await stand.show(group_of(rank), models=(served_model(max_wait_s=10.0),))
        tasks = [asyncio.create_task(ask(stand)) for _ in range(4)]
        await until(lambda: stand.service.admission.queued(MODEL) == 3)
        traffic = await reported(stand)
        assert traffic.arrivals_total == 4
        assert traffic.queued_prompt_tokens * 4 == traffic.arrived_prompt_tokens_total * 3 > 0
        # One gives up, and the others have their turn.
        tasks[3].cancel()
        await until(lambda: stand.service.admission.queued(MODEL) == 2)
        traffic = await reported(stand)
        assert traffic.queued_prompt_tokens * 4 == traffic.arrived_prompt_tokens_total * 2
        assert rank.gate is not None
        rank.gate.set()
        await asyncio.gather(*tasks[:3])
        assert (await reported(stand)).queued_prompt_tokens == 0
        assert stand.service.view.count_of(MODEL).queued_prompt_tokens == 0


async def test_prompts_that_waited_in_vain_are_queued_no_more() -> None:
    async with standing(replace(QUICK, waiting_requests=2)) as stand:
        await stand.show(models=(served_model(max_wait_s=0.4),))
        statuses = await asyncio.gather(*(ask(stand) for _ in range(3)))
        assert sorted(statuses) == [429, 503, 503]
        traffic = await reported(stand)
        assert (traffic.arrivals_total, traffic.finished_total) == (3, 0)
        assert stand.service.view.count_of(MODEL).queued_prompt_tokens == 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_providers_serve_is_counted_apart(stream: bool) -> None:
    async with standing(environment={"PROVIDER_KEY": "k"}) as stand:
        provider = MockRank(model="vendor/large", prefix="/api", api_key="k", cached_tokens=1)
        await provider.start()
        try:
            route = ExternalRoute(
                pool="ext-a",
                base_url=provider.base_url,
                model=provider.model,
                key_variable="PROVIDER_KEY",
                usd_per_mtok_in=1.0,
                usd_per_mtok_cached=0.5,
                usd_per_mtok_out=2.0,
            )
            await stand.show(models=(replace(served_model(max_wait_s=5.0), external=(route,)),))
            assert [await ask(stand, stream=stream) for _ in range(2)] == [200, 200]
            traffic = await reported(stand)
        finally:
            await provider.stop()
        assert traffic.arrivals_total == 2
        assert (traffic.finished_total, traffic.output_tokens_total) == (0, 0)
        assert traffic.uncached_prompt_tokens_total == 0
        assert traffic.external_requests_total == 2
        assert traffic.external_prompt_tokens_total == 2 * PROMPT_TOKENS
        assert traffic.external_output_tokens_total == 16


async def test_the_time_to_the_first_token_is_the_ranks_own() -> None:
    """Neither the wait in the queue nor a failed attempt elsewhere is the group's."""
    async with standing() as stand:
        rank = await stand.rank(first_token_s=0.2)
        await stand.show(models=(served_model(max_wait_s=10.0),))
        asking = asyncio.create_task(ask(stand, stream=True))
        await until(lambda: stand.service.admission.queued(MODEL) == 1)
        await asyncio.sleep(1.0)
        await stand.show(group_of(rank))
        assert await asking == 200
        await reported(stand)
        counts = stand.controller.last.groups[rank.group]
        assert counts.ttft_count == 1
        assert 0.2 <= counts.ttft_s_sum < 0.9


async def test_reports_are_numbered(stand: Stand) -> None:
    await until(lambda: len(stand.controller.reports) > 3)
    numbers = [report.number for report in stand.controller.reports]
    assert numbers == list(range(1, len(numbers) + 1))
