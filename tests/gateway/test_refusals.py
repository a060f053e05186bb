"""What a client is told when it asks wrongly, in the shape of its protocol."""

import asyncio
import io
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from anthropic import AuthenticationError as AnthropicAuthenticationError
from anthropic import BadRequestError as AnthropicBadRequestError
from anthropic import NotFoundError as AnthropicNotFoundError
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError
from prometheus_client.parser import text_string_to_metric_families
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

from expertmesh.gateway.limits import GatewayLimits

MESSAGES = [{"role": "user", "content": "one two"}]
CHAT = {"model": MODEL, "messages": MESSAGES}


@pytest.fixture
async def rank(stand: Stand) -> MockRank:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    return rank


def assert_openai(
    body: Any, message: str, code: str | None = None, param: str | None = None
) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert message in body["error"]["message"]
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["type"] in ("invalid_request_error", "rate_limit_error", "server_error")


def assert_anthropic(body: Any, message: str, kind: str, request_id: str) -> None:
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert message in body["error"]["message"]
    assert body["request_id"] == request_id


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "no API key"),
        ({"Authorization": "Basic abc"}, "no API key"),
        ({"Authorization": "Bearer sk-em-wrong"}, "unknown, revoked or expired"),
        ({"x-api-key": "sk-em-wrong"}, "unknown, revoked or expired"),
        ({"Authorization": "Bearer mesh-secret"}, "unknown, revoked or expired"),
    ],
    ids=["none", "other scheme", "wrong bearer", "wrong x-api-key", "mesh token"],
)
async def test_bad_key(stand: Stand, rank: MockRank, headers: dict[str, str], message: str) -> None:
    async with stand.http.post(
        f"{stand.url}/v1/chat/completions", json=CHAT, headers=headers
    ) as response:
        assert response.status == 401
        assert_openai(await response.json(), message, "invalid_api_key")
    async with stand.http.post(f"{stand.url}/v1/messages", json=CHAT, headers=headers) as response:
        assert response.status == 401
        request_id = response.headers["request-id"]
        assert_anthropic(await response.json(), message, "authentication_error", request_id)
    assert rank.seen == []


async def test_the_sdks_raise_their_own_errors(stand: Stand, rank: MockRank) -> None:
    rank.max_model_len = 10
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="sk-x", max_retries=0) as client:
        with pytest.raises(AuthenticationError):
            await client.chat.completions.create(**CHAT)
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        with pytest.raises(NotFoundError, match="tiny-moe") as missing:
            await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(BadRequestError, match="maximum context length is 10") as too_long:
            await client.chat.completions.create(**CHAT, stream=True)
        assert too_long.value.code == "context_length_exceeded"
        assert too_long.value.type == "invalid_request_error"
        assert too_long.value.param == "input_tokens"
    asked = {**CHAT, "max_tokens": 8}
    async with AsyncAnthropic(base_url=stand.url, api_key="sk-x", max_retries=0) as client:
        with pytest.raises(AnthropicAuthenticationError):
            await client.messages.create(**asked)
    async with AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as client:
        with pytest.raises(AnthropicNotFoundError):
            await client.messages.create(**{**asked, "model": "claude-x"})
        with pytest.raises(AnthropicBadRequestError, match="maximum context") as too_long_message:
            await client.messages.create(**asked)
        assert too_long_message.value.type == "invalid_request_error"
        assert too_long_message.value.request_id is not None
    await asyncio.sleep(0.2)
    assert stand.ledger.rows == {}
    # A fault of the client is none of the group.
    assert stand.controller.last.groups[rank.group].errors_total == 0


async def test_expired_and_revoked_keys(stand: Stand, rank: MockRank) -> None:
    other = "sk-em-" + "b" * 43
    stand.keys.add(other, "team-b", expires_at_s=time.time() + 0.4)
    await asyncio.sleep(0.1)

    async def status(secret: str) -> int:
        async with stand.post(
            "/v1/chat/completions", CHAT, headers={"Authorization": f"Bearer {secret}"}
        ) as response:
            return int(response.status)

    assert await status(other) == 200
    # The store is away: keys are kept, but expire all the same.
    stand.keys.error = OSError("no store")
    await asyncio.sleep(0.4)
    assert (await status(other), await status(SECRET)) == (401, 200)
    stand.keys.error = None
    stand.keys.keys.clear()
    await asyncio.sleep(0.15)
    assert await status(SECRET) == 401


async def test_a_revoked_key_is_refused_within_two_seconds_by_default() -> None:
    async with standing(GatewayLimits()) as stand:
        await stand.show(group_of(await stand.rank()))
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 200
        stand.keys.keys.clear()
        await asyncio.sleep(1.9)
        async with stand.post("/v1/chat/completions", CHAT) as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "is no JSON", None),
        (b"model=tiny", "is no JSON", None),
        (b'{"model": "tiny-moe"', "is no JSON", None),
        (b'{"model": "tiny-moe"} x', "is no JSON", None),
        (b"[" * 100_000, "body", None),
        (b'{"model":"tiny-moe","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply", None),
        (b"[1]", "Expected `object`", None),
        (b'"text"', "Expected `object`", None),
        (b"null", "Expected `object`", None),
        (b'{"messages": []}', "'model' is missing", "model"),
        (b'{"model": 5}', "'model' must be a non-empty string", "model"),
        (b'{"model": "\\ud800"}', "", None),
        (b'{"model": "\xff\xfe"}', "", None),
        (b'{"model": ""}', "'model' must be a non-empty string", "model"),
        (b'{"model": "tiny-moe", "stream": "perhaps"}', "stream", None),
    ],
    ids=lambda value: (
        None if not isinstance(value, bytes) else value[:20].decode(errors="replace") or "empty"
    ),
)
async def test_bad_body(
    stand: Stand, rank: MockRank, body: bytes, message: str, param: str | None
) -> None:
    headers = {"x-api-key": SECRET}
    async with stand.http.post(
        f"{stand.url}/v1/chat/completions", data=body, headers=headers
    ) as response:
        assert response.status == 400
        assert_openai(await response.json(), message, None, param)
    async with stand.http.post(f"{stand.url}/v1/messages", data=body, headers=headers) as response:
        assert response.status == 400
        request_id = response.headers["request-id"]
        assert_anthropic(await response.json(), message, "invalid_request_error", request_id)
    assert rank.seen == []


async def test_unknown_model_names_those_that_exist(stand: Stand, rank: MockRank) -> None:
    await stand.show(group_of(rank), models=(served_model("b-moe"), served_model()))
    async with stand.post("/v1/completions", {"model": "nope", "prompt": ""}) as response:
        assert response.status == 404
        message = (
            "The model 'nope' does not exist, or this key may not use it; there are: "
            "b-moe, tiny-moe."
        )
        assert_openai(await response.json(), message, "model_not_found", "model")


async def test_body_over_the_limit(stand: Stand, rank: MockRank) -> None:
    async def endless() -> Any:
        for _ in range(400):
            yield b"x" * 65536

    big = b" " * (8 * 1024 * 1024) + b'{"model":"tiny-moe"}'
    for data in (io.BytesIO(big), endless()):
        async with stand.http.post(
            f"{stand.url}/v1/messages", data=data, headers={"x-api-key": SECRET}
        ) as response:
            assert response.status == 413
            request_id = response.headers["request-id"]
            body = await response.json()
            assert_anthropic(body, "8388608 bytes", "request_too_large", request_id)
    exact = big[-8 * 1024 * 1024 :]
    async with stand.http.post(
        f"{stand.url}/v1/chat/completions", data=io.BytesIO(exact), headers={"x-api-key": SECRET}
    ) as response:
        assert response.status == 200
    assert len(rank.seen) == 1 and len(rank.seen[0].body) == len(exact)


async def test_a_declared_length_over_the_limit_is_refused_unread(stand: Stand) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stand.url.rsplit(":", 1)[1]))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: "
        + SECRET.encode()
        + b"\r\nexpect: 100-continue\r\ncontent-length: 99999999999\r\n\r\n"
    )
    line = await asyncio.wait_for(reader.readline(), 1)
    assert b" 413 " in line
    writer.close()


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with standing(replace(QUICK, body_timeout_s=0.1)) as stand:
        port = int(stand.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: "
            + SECRET.encode()
            + b'\r\ncontent-length: 100\r\n\r\n{"model":'
        )
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_too_many_headers(stand: Stand, rank: MockRank) -> None:
    many = {f"x-h{number}": "v" for number in range(101)}
    async with stand.post("/v1/chat/completions", CHAT, headers=many) as response:
        assert response.status == 431
        assert_openai(await response.json(), "at most 100")
    huge = {f"x-h{number}": "v" * 7000 for number in range(12)}
    async with stand.post("/v1/chat/completions", CHAT, headers=huge) as response:
        assert response.status == 431
        assert_openai(await response.json(), "head is over the limit of 65536 bytes")
    assert rank.seen == []


async def test_compressed_body(stand: Stand, rank: MockRank) -> None:
    async with stand.post(
        "/v1/chat/completions", CHAT, headers={"content-encoding": "gzip"}
    ) as response:
        assert response.status == 415
        assert_openai(await response.json(), "Content-Encoding")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("GET", "/v1/messages", 405, "POST"),
        ("POST", "/v1/models", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/tiny-moe", 405, "GET, HEAD"),
        ("POST", "/metrics", 405, "GET, HEAD"),
        ("GET", "/", 404, None),
        ("GET", "/v1/responses/resp_1", 404, None),
        ("POST", "/v1/messages/batches", 404, None),
        ("POST", "/v1/audio/transcriptions", 404, None),
        ("POST", "/scale_elastic_ep", 404, None),
        ("POST", "/collective_rpc", 404, None),
        ("GET", "/em/info", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("POST", "/v1/../collective_rpc", 404, None),
    ],
)
async def test_other_paths_and_methods(
    stand: Stand, rank: MockRank, method: str, path: str, status: int, allow: str | None
) -> None:
    async with stand.http.request(
        method,
        stand.url + path,
        headers={"x-api-key": SECRET},
        json={} if method == "POST" else None,
    ) as response:
        assert response.status == status
        assert response.headers.get("allow") == allow
        body = await response.json()
        assert ("request_id" in body) is path.startswith("/v1/messages")
        assert body["error"]["message"]
    assert rank.seen == []


@pytest.mark.parametrize(
    ("status", "body", "content_type", "sent", "message"),
    [
        (404, b'{"detail":"No response x"}', "application/json", 404, "No response x"),
        (422, b'{"detail":[{"loc":["x"]}]}', "application/json", 422, '"loc"'),
        (400, b"plain words", "text/plain", 400, "plain words"),
        (400, b"", "text/plain", 400, "status 400"),
        (501, b'{"error":{"message":"cannot","code":501}}', "application/json", 501, "cannot"),
    ],
    ids=["no such endpoint", "validation", "plain text", "empty", "not implemented"],
)
async def test_a_ranks_refusal_gets_the_right_shape(
    stand: Stand,
    rank: MockRank,
    status: int,
    body: bytes,
    content_type: str,
    sent: int,
    message: str,
) -> None:
    rank.always = Fault("refuse", status=status, body=body, content_type=content_type)
    async with stand.post("/v1/embeddings", {"model": MODEL, "input": "x"}) as response:
        assert response.status == sent
        assert_openai(await response.json(), message)
    async with stand.post("/v1/messages", CHAT) as response:
        assert response.status == sent
        assert message in (await response.json())["error"]["message"]
    assert len(rank.seen) == 2
    await asyncio.sleep(0.15)
    assert stand.ledger.rows == {}
    assert stand.controller.last.groups[rank.group].errors_total == 0


async def test_an_endpoint_that_the_model_does_not_have(stand: Stand, rank: MockRank) -> None:
    rank.always = Fault("refuse", status=404, body=b'{"detail":"Not Found"}')
    async with stand.post("/v1/embeddings", {"model": MODEL, "input": "x"}) as response:
        assert response.status == 404
        message = "The model 'tiny-moe' does not offer /v1/embeddings."
        assert_openai(await response.json(), message, "endpoint_not_offered")


async def test_an_error_as_first_event_becomes_a_plain_answer(stand: Stand, rank: MockRank) -> None:
    error = {"message": "Bad grammar", "type": "BadRequestError", "param": None, "code": 400}
    rank.always = Fault("error", body=json.dumps({"error": error}).encode())
    async with stand.post("/v1/chat/completions", {**CHAT, "stream": True}) as response:
        assert response.status == 400
        assert_openai(await response.json(), "Bad grammar")
    assert len(rank.seen) == 1


async def test_health_readiness_and_metrics_ask_for_what_they_should(
    stand: Stand, rank: MockRank
) -> None:
    async with stand.http.get(f"{stand.url}/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with stand.http.get(f"{stand.url}/readyz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok", "missing": []})
    for headers in ({}, {"Authorization": f"Bearer {SECRET}"}):
        async with stand.http.get(f"{stand.url}/metrics", headers=headers) as response:
            assert response.status == 401
            assert "em_gateway" not in await response.text()
    async with stand.post("/v1/chat/completions", CHAT) as response:
        await response.read()
    async with stand.http.get(
        f"{stand.url}/metrics", headers={"Authorization": "Bearer mesh-secret"}
    ) as response:
        text = await response.text()
    samples = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    asked = {"endpoint": "chat_completions", "model": MODEL, "status": "200"}
    assert ("em_gateway_requests_total", asked, 1.0) in samples
    assert ("em_gateway_queued_requests", {"model": MODEL}, 0.0) in samples
    in_flight = [labels for name, labels, _ in samples if name == "em_gateway_in_flight_requests"]
    assert [(one["group"], one["model"]) for one in in_flight] == [("em-tiny-moe-pool-a-0", MODEL)]


async def test_model_list_in_both_shapes(stand: Stand, rank: MockRank) -> None:
    await stand.show(group_of(rank), models=(served_model("org/asleep"), served_model()))
    async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=SECRET, max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["org/asleep", MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "expertmesh"
        assert (await client.models.retrieve("org/asleep")).id == "org/asleep"
        with pytest.raises(NotFoundError, match="there are: org/asleep, tiny-moe"):
            await client.models.retrieve("nope")
    async with AsyncAnthropic(base_url=stand.url, api_key=SECRET, max_retries=0) as client:
        listed = [model async for model in client.models.list()]
        assert [model.id for model in listed] == ["org/asleep", MODEL]
        assert listed[0].created_at.year >= 2024
        assert (await client.models.retrieve(MODEL)).display_name == MODEL
        with pytest.raises(AnthropicNotFoundError):
            await client.models.retrieve("nope")
    async with stand.http.get(f"{stand.url}/v1/models") as response:
        assert response.status == 401


async def test_access_log_tells_the_outcome_and_no_prompt(stand: Stand, rank: MockRank) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "a-secret-prompt"}]}
    async with stand.post("/v1/chat/completions", asked) as response:
        request_id = response.headers["x-request-id"]
        await response.read()
    async with stand.http.post(f"{stand.url}/v1/chat/completions", json=asked) as response:
        await response.read()
    await until(lambda: stand.access_log.read_text().count("\n") == 2)
    text = stand.access_log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 401]
    assert lines[0]["request_id"] == request_id
    assert (lines[0]["tenant"], lines[0]["group"], lines[0]["rank"]) == ("team-a", rank.group, 0)
    assert "a-secret-prompt" not in text
    assert SECRET not in text and "w0" not in text
