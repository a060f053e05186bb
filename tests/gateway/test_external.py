"""External providers as a pool, and other names for a model."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI
from tests.gateway.stand import MESH_TOKEN, MODEL, QUICK, SECRET, Stand, group_of, standing, until
from tests.gateway.stand import served_model as plain_model
from tests.mock_rank import Fault, MockRank

from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse, GroupState, ServedModel
from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.health import HealthConfig
from expertmesh.core.routing.router import RoutingConfig
from expertmesh.gateway.limits import GatewayLimits

CHAT_PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "one two"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
PROVIDER_KEY = "sk-provider-secret"
ABROAD = "ext-a"
SOON = RoutingConfig(health=HealthConfig(first_probe_s=0.1, longest_probe_s=0.2))


def route_to(provider: MockRank, **changes: Any) -> ExternalRoute:
    route = ExternalRoute(
        pool=ABROAD,
        base_url=provider.base_url,
        model=provider.model,
        key_variable="PROVIDER_KEY",
        usd_per_mtok_in=1.0,
        usd_per_mtok_cached=0.5,
        usd_per_mtok_out=2.0,
    )
    return replace(route, **changes)


def served_model(*routes: ExternalRoute, max_wait_s: float = 10.0, **changes: Any) -> ServedModel:
    return replace(plain_model(max_wait_s=max_wait_s), external=routes, **changes)


@asynccontextmanager
async def abroad(
    limits: GatewayLimits = QUICK,
    environment: dict[str, str] | None = None,
    slots: SlotRules | None = None,
    **route: Any,
) -> AsyncIterator[tuple[Stand, MockRank]]:
    """A model without a group, that a provider offers as well."""
    keys = {"PROVIDER_KEY": PROVIDER_KEY} if environment is None else environment
    async with standing(limits, environment=keys, routing=SOON, slots=slots) as stand:
        provider = MockRank(model="vendor/large", prefix="/api", api_key=PROVIDER_KEY)
        await provider.start()
        try:
            await stand.show(models=(served_model(route_to(provider, **route)),))
            yield stand, provider
        finally:
            await provider.stop()


async def ask(stand: Stand, path: str = CHAT_PATH, **fields: Any) -> tuple[int, Any, Any]:
    async with stand.post(path, {**CHAT, **fields}) as response:
        return response.status, await response.json(), response.headers


async def waiting(stand: Stand, count: int) -> None:
    await until(lambda: stand.service.admission.queued(MODEL) == count)


async def test_a_provider_stands_in_while_no_group_is_ready() -> None:
    async with abroad() as (stand, provider):
        status, body, headers = await ask(stand, temperature=0.1)
        assert status == 200
        assert body["model"] == "vendor/large"
        assert headers["x-em-cost-usd"]
        (seen,) = provider.seen
        assert seen.path == "/api/v1/chat/completions"
        assert seen.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        assert seen.json() == {**CHAT, "model": "vendor/large", "temperature": 0.1}
        # What is ours stays here.
        told = str(seen.headers)
        assert SECRET not in told and MESH_TOKEN not in told
        assert not [name for name in seen.headers if name.startswith("x-em-")]
        (row,) = await stand.rows()
        assert (row.pool, row.group, row.model) == (ABROAD, ABROAD, MODEL)
        assert (row.outcome, row.completion_tokens) == (Outcome.OK, 8)
        # At the model's tariff, whatever the provider takes.
        assert float(row.tariff_usd) == pytest.approx(
            (row.prompt_tokens * 0.2 + 8 * 0.6) / 1e6, rel=1e-9
        )
        assert stand.count("em_gateway_external_requests_total", model=MODEL, pool=ABROAD) == 1
        await until(lambda: ABROAD in stand.controller.last.groups)


async def test_streams_of_a_provider() -> None:
    async with (
        abroad() as (stand, provider),
        AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**CHAT, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content for chunk in chunks).startswith("w0 w1 ")
        assert all(chunk.usage is None for chunk in chunks)
        assert provider.seen[0].json()["stream_options"] == {"include_usage": True}
        answer = await client.embeddings.create(
            model=MODEL, input="one two", encoding_format="float"
        )
        assert answer.data[0].embedding
        answer = await client.completions.create(model=MODEL, prompt="x")
        assert answer.choices[0].text
        rows = await stand.rows(3)
        assert {row.pool for row in rows} == {ABROAD}
        assert rows[0].completion_tokens == 8


@pytest.mark.parametrize("line_end", ["\r\n", "\n"], ids=["crlf", "lf"])
async def test_streams_of_a_provider_that_writes_differently(line_end: str) -> None:
    """JSON with spaces, and lines that end in another way."""
    async with (
        abroad() as (stand, provider),
        AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client,
    ):
        provider.spaced, provider.line_end = True, line_end.encode()
        for split_bytes in (None, 1, 7):
            provider.split_bytes = split_bytes
            stream = await client.chat.completions.create(**CHAT, stream=True)
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content for chunk in chunks)
            assert text.startswith("w0 w1 ")
            assert all(chunk.usage is None for chunk in chunks)
        rows = await stand.rows(3)
        assert {(row.outcome, row.completion_tokens) for row in rows} == {(Outcome.OK, 8)}
        assert {row.prompt_tokens for row in rows} == {len(json.dumps(MESSAGES).split())}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/tokenize"])
async def test_what_only_our_engines_offer_never_goes_to_a_provider(path: str) -> None:
    async with abroad(use=ExternalUse.OVERFLOW, overflow_wait_s=0.0) as (stand, provider):
        await stand.show(models=(served_model(route_to(provider), max_wait_s=0.2),))
        status, _, headers = await ask(stand, path, max_tokens=4, input="x", prompt="x")
        assert (status, headers["x-em-dropped-reason"]) == (503, "no_capacity")
        assert provider.seen == []


async def test_the_models_own_group_goes_first() -> None:
    async with abroad() as (stand, provider):
        rank = await stand.rank()
        await stand.show(group_of(rank))
        for _ in range(4):
            assert (await ask(stand))[0] == 200
        assert (len(rank.seen), len(provider.seen)) == (4, 0)
        await stand.show(group_of(rank, state=GroupState.DRAINING))
        assert (await ask(stand))[0] == 200
        assert (len(rank.seen), len(provider.seen)) == (4, 1)


async def test_a_model_whose_manifest_names_no_provider_has_none() -> None:
    async with abroad() as (stand, provider):
        other = replace(plain_model("other"), max_wait_s=0.1)
        await stand.show(models=(served_model(route_to(provider)), other))
        assert (await ask(stand, model="other"))[0] == 503
        assert provider.seen == []


@pytest.mark.parametrize("use", list(ExternalUse))
async def test_overflow_when_the_queue_is_long(use: ExternalUse) -> None:
    slots = SlotRules(max_in_flight_per_rank=1)
    async with abroad(slots=slots, use=use, overflow_wait_s=2.0) as (stand, provider):
        rank = await stand.rank(gate=asyncio.Event())
        await stand.show(group_of(rank))
        first = asyncio.create_task(ask(stand))
        await until(lambda: rank.seen)
        second = asyncio.create_task(ask(stand))
        await waiting(stand, 1)
        third = asyncio.create_task(ask(stand))
        if use is ExternalUse.OVERFLOW:
            assert (await third)[1]["model"] == "vendor/large"
            assert len(provider.seen) == 1
            await waiting(stand, 1)
        else:
            await waiting(stand, 2)
            assert provider.seen == []
        assert rank.gate is not None
        rank.gate.set()
        answers = await asyncio.gather(first, second, third)
        assert [status for status, _, _ in answers] == [200] * 3
        pools = [row.pool for row in await stand.rows(3)]
        assert pools.count(ABROAD) == (1 if use is ExternalUse.OVERFLOW else 0)


async def test_a_request_that_the_groups_fail_goes_to_the_provider() -> None:
    async with abroad() as (stand, provider):
        rank = await stand.rank(always=Fault("refuse", status=500))
        await stand.show(group_of(rank))
        status, body, _ = await ask(stand)
        assert (status, body["model"]) == (200, "vendor/large")
        assert (len(rank.seen), len(provider.seen)) == (1, 1)
        (row,) = await stand.rows()
        assert (row.pool, row.outcome) == (ABROAD, Outcome.OK)
        # The dead group is no capacity: the next one does not wait for it.
        assert (await ask(stand))[1]["model"] == "vendor/large"
        assert len(provider.seen) == 2


@pytest.mark.parametrize("status", [500, 429, 401])
async def test_a_provider_that_fails_is_left_alone_until_its_probe_is_good(status: int) -> None:
    fault = Fault("refuse", status=status, body=b'{"error":{"message":"no"}}')
    async with abroad() as (stand, provider):
        provider.always = provider.probe = fault
        asking = [asyncio.create_task(ask(stand)) for _ in range(1)]
        await until(lambda: provider.seen)
        await waiting(stand, 1)
        asking += [asyncio.create_task(ask(stand)) for _ in range(2)]
        await waiting(stand, 3)
        await until(lambda: len(provider.probes) > 1)
        assert len(provider.seen) == 1
        probe = provider.probes[0]
        assert probe.path == "/api/v1/models"
        assert probe.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        assert MESH_TOKEN not in str(probe.headers)
        # Those that wait go there when it is back.
        provider.always = provider.probe = None
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 3
        rows = await stand.rows(3)
        assert {row.pool for row in rows} == {ABROAD}


async def test_who_waits_for_a_group_that_is_lost_goes_to_the_provider() -> None:
    async with abroad(slots=SlotRules(max_in_flight_per_rank=1)) as (stand, provider):
        rank = await stand.rank(gate=asyncio.Event())
        await stand.show(group_of(rank))
        first = asyncio.create_task(ask(stand))
        await until(lambda: rank.seen)
        second = asyncio.create_task(ask(stand))
        await waiting(stand, 1)
        await stand.show(group_of(rank, state=GroupState.LOST))
        assert (await second)[1]["model"] == "vendor/large"
        # The one that hung there as well, after a moment of grace.
        assert (await first)[1]["model"] == "vendor/large"
        assert len(provider.seen) == 2


async def test_a_wrong_key_of_ours_is_not_the_clients_fault() -> None:
    async with abroad(environment={"PROVIDER_KEY": "wrong"}) as (stand, provider):
        await stand.show(models=(served_model(route_to(provider), max_wait_s=0.3),))
        status, body, _ = await ask(stand)
        assert status in (502, 503)
        assert "wrong" not in json.dumps(body) and PROVIDER_KEY not in json.dumps(body)
        assert len(provider.seen) == 1


async def test_what_a_provider_finds_wrong_is_told() -> None:
    async with abroad() as (stand, provider):
        message = b'{"error":{"message":"temperature is too high","param":"temperature"}}'
        provider.always = Fault("refuse", status=400, body=message)
        status, body, _ = await ask(stand)
        assert (status, body["error"]["param"]) == (400, "temperature")
        assert len(provider.seen) == 1
        await asyncio.sleep(0.15)
        assert stand.ledger.rows == {}


# Aliases.


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/messages", "/v1/embeddings", "/tokenize"])
async def test_the_rank_knows_an_alias_by_its_name(stand: Stand, path: str) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank), models=(served_model(aliases=("gpt-4o", "a/b")),))
    asked = {**CHAT, "input": "x", "prompt": "x", "max_tokens": 3, "x": [1.5, {"model": "gpt-4o"}]}
    for alias in ("gpt-4o", "a/b"):
        async with stand.post(path, {**asked, "model": alias}) as response:
            assert response.status == 200
        assert rank.seen[-1].json() == {**asked, "model": MODEL}
    assert stand.count("em_gateway_requests_total", model=MODEL) == 2
    assert stand.count("em_gateway_requests_total", model="gpt-4o") == 0
    reports = len(stand.controller.reports)
    await until(lambda: len(stand.controller.reports) > reports + 1)
    # Counting tokens is no work for an engine.
    arrivals = stand.controller.last.models[MODEL].arrivals_total
    assert arrivals == (0 if path == "/tokenize" else 2)


async def test_aliases_and_streams(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank), models=(served_model(aliases=("gpt-4o",)),))
    async with stand.post(CHAT_PATH, {**CHAT, "model": "gpt-4o", "stream": True}) as response:
        assert (await response.text()).endswith("data: [DONE]\n\n")
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    assert rank.seen[-1].json() == asked
    (row,) = await stand.rows()
    assert (row.model, row.completion_tokens) == (MODEL, 8)
    # An alias that is gone is no model any more.
    await stand.show(group_of(rank), models=(served_model(),))
    assert (await ask(stand, model="gpt-4o"))[0] == 404
