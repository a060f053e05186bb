"""The programs that people point at a gateway: official SDKs, LangChain, curl."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from langchain_openai import ChatOpenAI
from tests.gateway.stand import MODEL, SECRET, Stand, group_of, served_model
from tests.mock_rank import Fault, MockRank

from expertmesh.core.domain.tenant import Account, Limits

TEXT = "w0 w1 w2 w3 "
MESSAGES: Any = [{"role": "user", "content": "one two three"}]
PROMPT_TOKENS = len(json.dumps(MESSAGES).split())
SLEEPING = "org/sleeping-moe"
ALIAS = "gpt-4o"
RICH: dict[str, Any] = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is é 漢 \u2028 here?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
            ],
        }
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ],
    "tool_choice": "auto",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    },
    "logprobs": True,
    "top_logprobs": 5,
    "n": 2,
    "temperature": 0.30000000000000004,
    "seed": 9007199254740993,
    "extra_body": {"min_p": 1e-05, "chat_template_kwargs": {"thinking": False}},
}


class Sdk:
    """The same calls through a client that blocks and through one that does not."""

    def __init__(self, client: Any, sent: list[bytes]) -> None:
        self.client = client
        self.sent = sent
        """Bodies of the requests, as the client wrote them."""
        self.blocks = isinstance(client, (openai.OpenAI, anthropic.Anthropic))

    async def call(self, ask: Callable[[Any], Any]) -> Any:
        if self.blocks:
            return await asyncio.to_thread(ask, self.client)
        return await ask(self.client)

    async def each(self, ask: Callable[[Any], Any]) -> list[Any]:
        """Of a stream, or of a list over all its pages."""
        if self.blocks:
            return await asyncio.to_thread(lambda: list(ask(self.client)))
        return [item async for item in await ask(self.client)]

    async def close(self) -> None:
        if self.blocks:
            self.client.close()
        else:
            await self.client.close()


def sdk_of(package: Any, blocks: bool, **options: Any) -> Sdk:
    sent: list[bytes] = []

    def keep(request: Any) -> None:
        sent.append(request.content)

    async def keep_async(request: Any) -> None:
        keep(request)

    name = "OpenAI" if package is openai else "Anthropic"
    if blocks:
        http = package.DefaultHttpxClient(event_hooks={"request": [keep]})
        client = getattr(package, name)(http_client=http, **options)
    else:
        http = package.DefaultAsyncHttpxClient(event_hooks={"request": [keep_async]})
        client = getattr(package, f"Async{name}")(http_client=http, **options)
    return Sdk(client, sent)


@pytest.fixture
async def rank(stand: Stand) -> MockRank:
    rank = await stand.rank(tokens=4)
    models = (served_model(aliases=(ALIAS,)), served_model(SLEEPING))
    await stand.show(group_of(rank), models=models)
    return rank


@pytest.fixture(params=[True, False], ids=["sync", "async"])
def blocks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def of_openai(stand: Stand, blocks: bool) -> AsyncIterator[Sdk]:
    sdk = sdk_of(openai, blocks, base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0)
    yield sdk
    await sdk.close()


@pytest.fixture
async def of_anthropic(stand: Stand, blocks: bool) -> AsyncIterator[Sdk]:
    sdk = sdk_of(anthropic, blocks, base_url=stand.url, api_key=SECRET, max_retries=0)
    yield sdk
    await sdk.close()


# OpenAI's SDK.


async def test_a_rich_chat_passes_byte_for_byte(rank: MockRank, of_openai: Sdk) -> None:
    answer = await of_openai.call(lambda c: c.chat.completions.create(model=MODEL, **RICH))
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.completion_tokens == 4
    assert rank.seen[-1].body == of_openai.sent[-1]
    assert rank.seen[-1].json()["tools"] == RICH["tools"]


async def test_a_rich_stream_passes_but_for_the_wish_for_usage(
    rank: MockRank, of_openai: Sdk
) -> None:
    chunks = await of_openai.each(
        lambda c: c.chat.completions.create(model=MODEL, stream=True, **RICH)
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    sent = of_openai.sent[-1]
    assert rank.seen[-1].body == sent[:-1] + b',"stream_options":{"include_usage":true}}'
    asked = {**RICH, "stream_options": {"include_usage": True}}
    chunks = await of_openai.each(
        lambda c: c.chat.completions.create(model=MODEL, stream=True, **asked)
    )
    assert rank.seen[-1].body == of_openai.sent[-1]
    assert chunks[-1].usage.completion_tokens == 4 and chunks[-1].choices == []


async def test_the_streaming_helper_of_chat_completions(stand: Stand, rank: MockRank) -> None:
    async with (
        openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == TEXT


async def test_completions(stand: Stand, rank: MockRank, of_openai: Sdk) -> None:
    answer = await of_openai.call(
        lambda c: c.completions.create(model=MODEL, prompt=["one two", "three"], echo=True)
    )
    assert answer.choices[0].text == TEXT
    assert rank.seen[-1].body == of_openai.sent[-1]
    chunks = await of_openai.each(
        lambda c: c.completions.create(model=MODEL, prompt="one two", stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    rows = await stand.rows(2)
    assert {row.endpoint for row in rows} == {"completions"}


async def test_responses(rank: MockRank, of_openai: Sdk) -> None:
    asked: Any = {"model": MODEL, "input": "one two", "store": False, "reasoning": {}}
    answer = await of_openai.call(lambda c: c.responses.create(**asked))
    assert answer.output_text == TEXT
    assert rank.seen[-1].body == of_openai.sent[-1]
    events = await of_openai.each(lambda c: c.responses.create(**asked, stream=True))
    assert rank.seen[-1].body == of_openai.sent[-1]
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert events[-1].response.output_text == TEXT
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT


async def test_responses_that_were_not_stored_cannot_be_followed(
    rank: MockRank, of_openai: Sdk
) -> None:
    with pytest.raises(openai.BadRequestError, match="are not stored here") as raised:
        await of_openai.call(
            lambda c: c.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
        )
    assert raised.value.param == "previous_response_id"
    for ask in (
        lambda c: c.responses.retrieve("resp_1"),
        lambda c: c.responses.cancel("resp_1"),
        lambda c: c.responses.delete("resp_1"),
    ):
        with pytest.raises(openai.NotFoundError, match="are not stored here"):
            await of_openai.call(ask)
    assert rank.seen == []


async def test_embeddings(stand: Stand, rank: MockRank, of_openai: Sdk) -> None:
    # Without a format the SDK asks for base64 and decodes it.
    answer = await of_openai.call(
        lambda c: c.embeddings.create(model=MODEL, input=["one two", "three"])
    )
    assert [entry.embedding for entry in answer.data] == [[0.5, -0.5], [1.5, -0.5]]
    assert rank.seen[-1].json()["encoding_format"] == "base64"
    assert rank.seen[-1].body == of_openai.sent[-1]
    answer = await of_openai.call(
        lambda c: c.embeddings.create(
            model=MODEL, input="one", encoding_format="float", dimensions=1
        )
    )
    assert answer.data[0].embedding == [0.5]
    assert answer.usage.prompt_tokens == 1
    rows = await stand.rows(2)
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows] == [(3, 0), (1, 0)]


async def test_models(rank: MockRank, of_openai: Sdk) -> None:
    models = await of_openai.each(lambda c: c.models.list())
    assert [model.id for model in models] == [ALIAS, SLEEPING, MODEL]
    for name, root in ((MODEL, MODEL), (ALIAS, MODEL), (SLEEPING, SLEEPING)):
        model = await of_openai.call(lambda c, name=name: c.models.retrieve(name))
        assert (model.id, model.root, model.object) == (name, root, "model")
    with pytest.raises(openai.NotFoundError, match="The model 'org/none' does not exist"):
        await of_openai.call(lambda c: c.models.retrieve("org/none"))


async def test_an_alias_is_the_model(stand: Stand, rank: MockRank, of_openai: Sdk) -> None:
    await of_openai.call(lambda c: c.chat.completions.create(model=ALIAS, **RICH))
    sent = {**json.loads(of_openai.sent[-1]), "model": MODEL}
    assert rank.seen[-1].json() == sent
    (row,) = await stand.rows()
    assert row.model == MODEL


# Anthropic's SDK.


async def test_messages(stand: Stand, rank: MockRank, of_anthropic: Sdk) -> None:
    rank.cached_tokens = 1
    asked: Any = {
        "model": MODEL,
        "max_tokens": 4,
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        "messages": MESSAGES,
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "extra_body": {"temperature": 0.1},
    }
    answer = await of_anthropic.call(lambda c: c.messages.create(**asked))
    assert answer.content[0].text == TEXT
    assert answer.usage.cache_read_input_tokens == 1
    assert answer._request_id
    assert rank.seen[-1].body == of_anthropic.sent[-1]
    events = await of_anthropic.each(lambda c: c.messages.create(**asked, stream=True))
    assert rank.seen[-1].body == of_anthropic.sent[-1]
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
    texts = [event.delta.text for event in events if event.type == "content_block_delta"]
    assert "".join(texts) == TEXT
    rows = await stand.rows(2)
    for row in rows:
        counts = (row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        assert counts == (PROMPT_TOKENS, 1, 4)


async def test_the_streaming_helper_of_messages(
    rank: MockRank, of_anthropic: Sdk, blocks: bool
) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 4, "messages": MESSAGES}
    if blocks:

        def ask() -> Any:
            with of_anthropic.client.messages.stream(**asked) as stream:
                return stream.get_final_message()

        message = await asyncio.to_thread(ask)
    else:
        async with of_anthropic.client.messages.stream(**asked) as stream:
            message = await stream.get_final_message()
    assert message.content[0].text == TEXT
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 4)


async def test_beta_messages_and_count_tokens(rank: MockRank, of_anthropic: Sdk) -> None:
    # The beta client adds ?beta=true to the path and a header that names the feature.
    answer = await of_anthropic.call(
        lambda c: c.beta.messages.create(
            model=MODEL, max_tokens=4, messages=MESSAGES, betas=["context-1m"]
        )
    )
    assert answer.content[0].text == TEXT
    assert rank.seen[-1].headers["anthropic-beta"] == "context-1m"
    counted = await of_anthropic.call(
        lambda c: c.messages.count_tokens(model=MODEL, messages=MESSAGES)
    )
    assert counted.input_tokens == PROMPT_TOKENS


async def test_models_for_anthropic(rank: MockRank, of_anthropic: Sdk) -> None:
    models = await of_anthropic.each(lambda c: c.models.list())
    assert [model.id for model in models] == [ALIAS, SLEEPING, MODEL]
    assert models[0].type == "model" and models[0].created_at.year >= 2024
    model = await of_anthropic.call(lambda c: c.models.retrieve(SLEEPING))
    assert model.display_name == SLEEPING


# Errors as the SDKs raise them.


def refuse(status: int) -> Fault:
    return Fault("refuse", status=status)


@pytest.mark.parametrize(
    ("model", "fault", "error", "codes"),
    [
        ("gpt-9", None, openai.NotFoundError, ["model_not_found"] * 2),
        (MODEL, refuse(400), openai.BadRequestError, [None, None]),
        (MODEL, refuse(422), openai.UnprocessableEntityError, [None, None]),
        # After the first failure the rank is left alone.
        (
            MODEL,
            refuse(500),
            openai.InternalServerError,
            ["upstream_unavailable", "model_not_ready"],
        ),
        (SLEEPING, None, openai.InternalServerError, ["model_not_ready"] * 2),
    ],
    ids=["unknown model", "bad request", "invalid field", "rank fails", "asleep"],
)
async def test_errors_of_openai(
    rank: MockRank,
    of_openai: Sdk,
    model: str,
    fault: Fault | None,
    error: type[openai.APIStatusError],
    codes: list[str | None],
) -> None:
    rank.always = fault
    for stream, code in zip((False, True), codes, strict=True):
        with pytest.raises(error) as raised:
            await of_openai.call(
                lambda c, stream=stream: c.chat.completions.create(
                    model=model, messages=MESSAGES, stream=stream
                )
            )
        assert type(raised.value) is error
        assert raised.value.code == code
        assert raised.value.request_id


@pytest.mark.parametrize(
    ("model", "fault", "error", "kind"),
    [
        ("claude-9", None, anthropic.NotFoundError, "not_found_error"),
        (MODEL, refuse(400), anthropic.BadRequestError, "invalid_request_error"),
        (MODEL, refuse(500), anthropic.InternalServerError, "api_error"),
        (SLEEPING, None, anthropic.APIStatusError, "overloaded_error"),
    ],
    ids=["unknown model", "bad request", "rank fails", "asleep"],
)
async def test_errors_of_anthropic(
    rank: MockRank,
    of_anthropic: Sdk,
    model: str,
    fault: Fault | None,
    error: type[anthropic.APIStatusError],
    kind: str,
) -> None:
    rank.always = fault
    with pytest.raises(error) as raised:
        await of_anthropic.call(
            lambda c: c.messages.create(model=model, messages=MESSAGES, max_tokens=4)
        )
    assert raised.value.type == kind
    assert raised.value.request_id == raised.value.body["request_id"]


async def test_errors_about_the_key(stand: Stand, rank: MockRank, blocks: bool) -> None:
    admin = await stand.key("ops", admin=True)
    limits = (Account("tenant:few", Limits(requests_per_min=1)),)
    few = await stand.key("few", accounts=limits)
    cases: list[tuple[str, Any, Any]] = [
        ("sk-em-wrong", openai.AuthenticationError, anthropic.AuthenticationError),
        (admin, openai.PermissionDeniedError, anthropic.PermissionDeniedError),
        (few, openai.RateLimitError, anthropic.RateLimitError),
    ]
    async with stand.post(
        "/v1/completions", {"model": MODEL, "prompt": "x"}, secret=few
    ) as response:
        assert response.status == 200
    for secret, of_openai, of_anthropic in cases:
        sdk = sdk_of(openai, blocks, base_url=f"{stand.url}/v1", api_key=secret, max_retries=0)
        with pytest.raises(of_openai):
            await sdk.call(lambda c: c.chat.completions.create(model=MODEL, messages=MESSAGES))
        await sdk.close()
        for how in ({"api_key": secret}, {"auth_token": secret}):
            sdk = sdk_of(anthropic, blocks, base_url=stand.url, max_retries=0, **how)
            with pytest.raises(of_anthropic):
                await sdk.call(
                    lambda c: c.messages.create(model=MODEL, messages=MESSAGES, max_tokens=1)
                )
            await sdk.close()
    assert len(rank.seen) == 1


# LangChain.


async def test_langchain(stand: Stand, rank: MockRank) -> None:
    chat = ChatOpenAI(
        model=MODEL,
        base_url=f"{stand.url}/v1",
        api_key=SECRET,  # type: ignore[arg-type]
        max_retries=0,
        stream_usage=True,
    )
    answer = await asyncio.to_thread(chat.invoke, "one two")
    assert answer.content == TEXT
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 4
    parts = await asyncio.to_thread(lambda: list(chat.stream("one two")))
    assert "".join(str(part.content) for part in parts) == TEXT
    usage = [part.usage_metadata for part in parts if part.usage_metadata]
    assert [count["output_tokens"] for count in usage] == [4]
    assert (await chat.ainvoke("one two")).content == TEXT
    assert "".join([str(part.content) async for part in chat.astream("one two")]) == TEXT
    answers = await chat.abatch(["one", "two", "three"])
    assert [each.content for each in answers] == [TEXT] * 3
    assert len(await stand.rows(7)) == 7


async def test_langchain_tools_and_structured_output(stand: Stand, rank: MockRank) -> None:
    chat = ChatOpenAI(
        model=MODEL,
        base_url=f"{stand.url}/v1",
        api_key=SECRET,  # type: ignore[arg-type]
        max_retries=0,
    )
    schema = {"title": "Answer", "type": "object", "properties": {"x": {"type": "string"}}}
    await chat.bind_tools([schema]).ainvoke("one two")
    assert rank.seen[-1].json()["tools"][0]["function"]["name"] == "Answer"
    with pytest.raises(openai.NotFoundError):
        await ChatOpenAI(
            model="gpt-9",
            base_url=f"{stand.url}/v1",
            api_key=SECRET,  # type: ignore[arg-type]
            max_retries=0,
        ).ainvoke("one")


# curl.


async def curl(*arguments: str) -> tuple[str, str]:
    process = await asyncio.create_subprocess_exec(
        "curl",
        "-sS",
        "--max-time",
        "10",
        "--noproxy",
        "*",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


KEY = f"Authorization: Bearer {SECRET}"
ASKED = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True})


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
async def test_curl_streams(stand: Stand, rank: MockRank, version: str) -> None:
    url = f"{stand.url}/v1/chat/completions"
    text, _ = await curl("-N", "-i", version, url, "-H", KEY, "-d", ASKED)
    head, _, body = text.partition("\r\n\r\n")
    lines = head.lower().split("\r\n")
    assert lines[0] == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in lines
    assert ("transfer-encoding: chunked" in lines) is (version == "--http1.1")
    assert ("connection: close" in lines) is (version == "--http1.0")
    assert body.endswith("data: [DONE]\n\n")
    assert [f'"content":"{word} "' in body for word in ("w0", "w3", "w4")] == [True, True, False]


async def test_curl_gets_events_as_they_come(stand: Stand, rank: MockRank) -> None:
    rank.token_interval_s = 0.05
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sSN", "--noproxy", "*", f"{stand.url}/v1/chat/completions"),
        *("-H", KEY, "-d", ASKED),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    loop, times = asyncio.get_running_loop(), []
    async for line in process.stdout:
        if line.startswith(b"data: {"):
            times.append(loop.time())
    assert await process.wait() == 0
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == 5 and min(gaps) > 0.02


@pytest.mark.parametrize(
    "extra", [[], ["-H", "Transfer-Encoding: chunked"]], ids=["length", "chunked"]
)
async def test_curl_sends_a_long_body_when_told_to_continue(
    stand: Stand, rank: MockRank, tmp_path: Path, extra: list[str]
) -> None:
    file = tmp_path / "body.json"
    content = "x" * 2_000_000
    file.write_text(
        json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]})
    )
    arguments = ["-v", "-H", "Expect: 100-continue", "--expect100-timeout", "9", *extra]
    arguments += ["--data-binary", f"@{file}", f"{stand.url}/v1/chat/completions"]
    text, said = await curl(*arguments, "-H", KEY)
    assert "< HTTP/1.1 100 Continue" in said and "< HTTP/1.1 200 OK" in said
    assert json.loads(text)["choices"][0]["message"]["content"] == TEXT
    assert rank.seen[-1].body == file.read_bytes()
    # Refused before the body is sent.
    text, said = await curl(*arguments, "-H", "Authorization: Bearer no")
    assert "100 Continue" not in said and "< HTTP/1.1 401 Unauthorized" in said
    assert json.loads(text)["error"]["code"] == "invalid_api_key"
    assert len(rank.seen) == 1


async def test_curl_asks_for_models(stand: Stand, rank: MockRank) -> None:
    for path in ("org%2Fsleeping-moe", "org/sleeping-moe"):
        text, _ = await curl(f"{stand.url}/v1/models/{path}", "-H", f"x-api-key: {SECRET}")
        assert json.loads(text)["id"] == SLEEPING
    text, _ = await curl("-I", f"{stand.url}/v1/models", "-H", KEY)
    assert text.startswith("HTTP/1.1 200 OK") and text.endswith("\r\n\r\n")
    text, _ = await curl(f"{stand.url}/healthz", f"{stand.url}/readyz")
    assert text == '{"status":"ok"}{"status":"ok","missing":[]}'


# Everything else.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/moderations"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/realtime"),
        ("POST", "/v1/score"),
        ("POST", "/sleep"),
        ("POST", "/wake_up"),
        ("POST", "/collective_rpc"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/scale_elastic_ep"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/invocations"),
        ("POST", "/inference/v1/generate"),
        ("GET", "/version"),
        ("GET", "/server_info"),
        ("GET", "/load"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/em-tiny-moe-pool-a-0/v1/models"),
        ("DELETE", "/v1/chat/completions/x"),
        ("GET", "/v1/messages/batches"),
    ],
)
@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
async def test_nothing_else_is_there(
    stand: Stand, rank: MockRank, method: str, path: str, protocol: str
) -> None:
    headers = {"x-api-key": SECRET}
    if protocol == "anthropic":
        headers["anthropic-version"] = "2023-06-01"
    async with stand.http.request(
        method, stand.url + path, headers=headers, json={"model": MODEL}
    ) as response:
        assert response.status == 404
        assert response.content_type == "application/json"
        body = await response.json()
        request_id = response.headers["x-request-id"]
    message = f"There is no {path} here."
    if protocol == "anthropic" or path.startswith("/v1/messages"):
        assert body == {
            "type": "error",
            "error": {"type": "not_found_error", "message": message},
            "request_id": request_id,
        }
    else:
        assert body == {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": "not_found",
            }
        }
    assert rank.seen == []


async def test_what_the_sdks_offer_beyond_this_is_not_found(rank: MockRank, of_openai: Sdk) -> None:
    asks: list[Callable[[Any], Any]] = [
        lambda c: c.files.list(),
        lambda c: c.batches.list(),
        lambda c: c.moderations.create(input="x"),
        lambda c: c.images.generate(prompt="x", model=MODEL),
        lambda c: c.audio.speech.create(input="x", model=MODEL, voice="alloy"),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match=r"There is no /v1/.* here\.") as raised:
            await of_openai.call(ask)
        assert raised.value.code == "not_found"
    assert rank.seen == []
