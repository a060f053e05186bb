"""What clients get when all is well, with the official SDKs where they speak the endpoint."""

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI
from tests.gateway.stand import MODEL, SECRET, Stand, group_of
from tests.mock_rank import MockRank

from expertmesh.core.metering.usage import Outcome

TEXT = "w0 w1 w2 w3 "
MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture
async def rank(stand: Stand) -> MockRank:
    rank = await stand.rank(tokens=4)
    await stand.show(group_of(rank))
    return rank


@pytest.fixture
async def openai(stand: Stand) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic(stand: Stand) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as client:
        yield client


async def test_chat_completion(stand: Stand, rank: MockRank, openai: AsyncOpenAI) -> None:
    rank.cached_tokens = 2
    answer = await openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    (row,) = await stand.rows()
    prompt = answer.usage.prompt_tokens
    assert (row.tenant, row.key_id, row.model) == ("team-a", "key_0", MODEL)
    assert (row.group, row.pool, row.endpoint) == (rank.group, "pool-a", "chat_completions")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (prompt, 2, 4)
    assert row.outcome is Outcome.OK
    assert (
        row.tariff_usd
        == ((prompt - 2) * Decimal("0.2") + 2 * Decimal("0.05") + 4 * Decimal("0.6")) / 1_000_000
    )
    assert row.ttft_s is not None and 0 < row.ttft_s <= row.duration_s
    assert stand.count("em_gateway_tokens_total", model=MODEL, pool="pool-a", direction="out") == 4


async def test_chat_stream_hides_the_usage_that_only_the_gateway_wanted(
    stand: Stand, rank: MockRank, openai: AsyncOpenAI
) -> None:
    stream = await openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert all(chunk.usage is None for chunk in chunks)
    assert rank.seen[-1].json()["stream_options"] == {"include_usage": True}
    (row,) = await stand.rows()
    assert (row.completion_tokens, row.outcome) == (4, Outcome.OK)
    assert row.prompt_tokens == len(json.dumps(MESSAGES).split())
    assert stand.count("em_gateway_ttft_seconds_count", model=MODEL, pool="pool-a") == 1
    assert stand.count("em_gateway_tpot_seconds_count", model=MODEL, pool="pool-a") == 1


async def test_chat_stream_shows_the_usage_that_the_client_wanted(
    stand: Stand, rank: MockRank, openai: AsyncOpenAI
) -> None:
    stream = await openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4
    (row,) = await stand.rows()
    assert row.completion_tokens == 4


async def test_completion_whole_and_streamed(
    stand: Stand, rank: MockRank, openai: AsyncOpenAI
) -> None:
    answer = await openai.completions.create(model=MODEL, prompt="one two")
    assert answer.choices[0].text == TEXT
    stream = await openai.completions.create(model=MODEL, prompt="one two", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    rows = await stand.rows(2)
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows] == [(2, 4), (2, 4)]


async def test_response_whole_and_streamed(
    stand: Stand, rank: MockRank, openai: AsyncOpenAI
) -> None:
    answer = await openai.responses.create(model=MODEL, input="one two")
    assert answer.output_text == TEXT
    stream = await openai.responses.create(model=MODEL, input="one two", stream=True)
    events = [event async for event in stream]
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    rows = await stand.rows(2)
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows] == [(2, 4), (2, 4)]


async def test_message_whole_and_streamed(
    stand: Stand, rank: MockRank, anthropic: AsyncAnthropic
) -> None:
    rank.cached_tokens = 1
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    answer = await anthropic.messages.create(**asked)
    assert answer.content[0].text == TEXT
    async with anthropic.messages.stream(**asked) as stream:
        assert await stream.get_final_text() == TEXT
    rows = await stand.rows(2)
    prompt = len(json.dumps(MESSAGES).split())
    for row in rows:
        assert row.endpoint == "messages"
        assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (prompt, 1, 4)


async def test_count_tokens_and_tokenize_cost_nothing(
    stand: Stand, rank: MockRank, anthropic: AsyncAnthropic
) -> None:
    counted = await anthropic.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert counted.input_tokens == len(json.dumps(MESSAGES).split())
    for path in ("/tokenize", "/v1/tokenize"):
        async with stand.post(path, {"model": MODEL, "prompt": "x"}) as response:
            assert (await response.json())["tokens"] == [1, 2]
    for path in ("/detokenize", "/v1/detokenize"):
        async with stand.post(path, {"model": MODEL, "tokens": [1, 2]}) as response:
            assert (await response.json())["prompt"] == "two words"
    assert [seen.path for seen in rank.seen[-4:]] == [
        f"{rank.prefix}/tokenize",
        f"{rank.prefix}/tokenize",
        f"{rank.prefix}/detokenize",
        f"{rank.prefix}/detokenize",
    ]
    await asyncio.sleep(0.2)
    assert stand.ledger.rows == {}


async def test_embedding(stand: Stand, rank: MockRank, openai: AsyncOpenAI) -> None:
    answer = await openai.embeddings.create(
        model=MODEL, input="one two three", encoding_format="float"
    )
    assert answer.data[0].embedding == [0.5, -0.5]
    (row,) = await stand.rows()
    assert (row.endpoint, row.prompt_tokens, row.completion_tokens) == ("embeddings", 3, 0)


async def test_the_blocking_sdks(stand: Stand, rank: MockRank) -> None:
    def ask() -> list[str]:
        with OpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            parts = [chunk.choices[0].delta.content for chunk in stream]
        # A bearer token in place of x-api-key, as Claude Code sends it.
        with Anthropic(base_url=stand.url, auth_token=SECRET, max_retries=0) as client:
            message = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4)
            with client.messages.stream(model=MODEL, messages=MESSAGES, max_tokens=4) as streamed:
                text = streamed.get_final_text()
        return [whole.choices[0].message.content, "".join(parts), message.content[0].text, text]

    assert await asyncio.to_thread(ask) == [TEXT] * 4
    assert len(await stand.rows(4)) == 4


async def test_body_bytes_pass_untouched_but_for_the_wish_for_usage(
    stand: Stand, rank: MockRank
) -> None:
    odd = b'{ "model" : "tiny-moe", "messages":[] ,"x":1.50,"text":"\\u00e9\xc3\xa9" }\n'
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        async with stand.http.post(
            stand.url + path, data=odd, headers={"x-api-key": SECRET}
        ) as response:
            assert response.status == 200
        assert rank.seen[-1].body == odd
    stream = odd.replace(b'"x"', b'"stream":true,"x"')
    async with stand.http.post(
        stand.url + "/v1/chat/completions", data=stream, headers={"x-api-key": SECRET}
    ) as response:
        assert response.status == 200
        await response.read()
    assert rank.seen[-1].body == stream.replace(
        b" }\n", b' ,"stream_options":{"include_usage":true}}\n'
    )


async def test_answer_bytes_pass_untouched(stand: Stand, rank: MockRank) -> None:
    asked = {"model": MODEL, "messages": MESSAGES}
    async with stand.post("/v1/chat/completions", asked) as response:
        through = await response.read()
        request_id = response.headers["x-request-id"]
        assert response.headers["content-length"] == str(len(through))
        assert "server" not in response.headers
    async with stand.http.post(
        f"{rank.base_url}/v1/chat/completions",
        json=asked,
        headers={"x-em-mesh-token": "mesh-secret", "x-request-id": request_id},
    ) as response:
        assert await response.read() == through


@pytest.mark.parametrize("split_bytes", [1, 7, 100])
async def test_a_stream_in_odd_pieces_arrives_whole(
    stand: Stand, rank: MockRank, split_bytes: int
) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "stream": True}
    headers = {"x-request-id": "same"}
    async with stand.post("/v1/chat/completions", asked, headers=headers) as response:
        expected = await response.read()
    rank.split_bytes = split_bytes
    async with stand.post("/v1/chat/completions", asked, headers=headers) as response:
        assert await response.read() == expected
    assert expected.endswith(b"data: [DONE]\n\n")


async def test_request_id_goes_in_and_out(stand: Stand, rank: MockRank) -> None:
    asked = {"model": MODEL, "messages": MESSAGES}
    for sent, kept in (
        ("job-7:1.x", True),
        ("bad id\x7f".replace("\x7f", ""), False),
        ("x" * 129, False),
    ):
        async with stand.post(
            "/v1/messages", {**asked, "max_tokens": 1}, headers={"x-request-id": sent}
        ) as response:
            got = response.headers["x-request-id"]
            assert (got == sent) is kept
            assert response.headers["request-id"] == got
        assert rank.seen[-1].headers["x-request-id"] == got
    rows = await stand.rows(3)
    assert len({row.request_id for row in rows}) == 3


async def test_a_repeated_request_id_is_charged_each_time(stand: Stand, rank: MockRank) -> None:
    for _ in range(3):
        async with stand.post(
            "/v1/chat/completions",
            {"model": MODEL, "messages": MESSAGES},
            headers={"x-request-id": "mine"},
        ) as response:
            assert response.status == 200
    assert len(await stand.rows(3)) == 3


async def test_ranks_never_see_the_clients_key_or_steering_headers(
    stand: Stand, rank: MockRank
) -> None:
    async with stand.post(
        "/v1/messages",
        {"model": MODEL, "messages": MESSAGES, "max_tokens": 1},
        headers={
            "x-api-key": SECRET,
            "x-vllm-priority": "-100",
            "x-data-parallel-rank": "1",
            "x-em-mesh-token": "guess",
            "cookie": "a=b",
            "te": "trailers",
            "connection": "keep-alive",
            "anthropic-beta": "tools-1",
            "traceparent": "00-1-2-01",
        },
    ) as response:
        assert response.status == 200
    got = rank.seen[-1].headers
    assert SECRET not in str(got)
    assert set(got) == {
        "host",
        "accept",
        "accept-encoding",
        "content-type",
        "content-length",
        "x-request-id",
        "x-em-mesh-token",
        "anthropic-beta",
        "traceparent",
    }
    assert got["x-em-mesh-token"] == "mesh-secret"
