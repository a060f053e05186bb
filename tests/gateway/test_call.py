import json

import pytest

from expertmesh.gateway.api import ENDPOINTS, ApiError
from expertmesh.gateway.call import Question, read_question, with_model
from expertmesh.gateway.headers import read_headers

CHAT = ENDPOINTS["/v1/chat/completions"]


def read(body: str, path: str = "/v1/chat/completions") -> Question:
    question = read_question(ENDPOINTS[path], body.encode())
    assert isinstance(question, Question)
    return question


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ("", {"include_usage": True}),
        (',"stream_options":null', {"include_usage": True}),
        (',"stream_options":{}', {"include_usage": True}),
        (',"stream_options":{"include_usage":false}', {"include_usage": True}),
        (
            ',"stream_options":{"include_usage":null,"continuous_usage_stats":true}',
            {"include_usage": True, "continuous_usage_stats": True},
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_wish_for_usage_is_added(options: str, sent: object, path: str) -> None:
    body = f'{{"model":"m","stream":true{options},"x":{{"y":[1.50,"\\u00e9}}"]}}}}'
    question = read(body, path)
    assert question.asks_usage and question.stream
    assert question.body.count(b'"stream_options"') == 1
    got = json.loads(question.body)
    assert got == {**json.loads(body), "stream_options": sent}
    assert b'[1.50,"\\u00e9}"]' in question.body


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m"}',
        '{"model":"m","stream":false}',
        '{"model":"m","stream":null}',
        '{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        '{"model":"m","stream":true,"stream_options":{"include_usage":"true"}}',
        '{"model":"m","stream":true,"stream_options":"odd"}',
        '{"model":"m","stream":true,"stream_options":[1]}',
    ],
)
def test_other_bodies_stay_as_they_are(body: str) -> None:
    question = read(body)
    assert question.body == body.encode()
    assert not question.asks_usage


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_only_chat_completions_and_completions_know_stream_options(path: str) -> None:
    assert read('{"model":"m","stream":true}', path).asks_usage is False


@pytest.mark.parametrize("stream", ["true", '"true"', "1"])
def test_a_stream_is_recognised_as_leniently_as_vllm_does(stream: str) -> None:
    assert read(f'{{"model":"m","stream":{stream}}}').stream is True


@pytest.mark.parametrize(
    ("field", "tokens"),
    [
        ('"max_tokens":7', 7),
        ('"max_completion_tokens":9,"max_tokens":7', 9),
        ('"max_completion_tokens":"9","max_tokens":7', None),
        ('"max_output_tokens":5', None),
        ('"max_tokens":null', None),
        ('"max_tokens":"x"', None),
        ('"max_tokens":-1', None),
        ('"max_tokens":true', None),
        ('"max_tokens":7.5', None),
    ],
)
def test_the_limit_of_tokens_is_what_vllm_would_take(field: str, tokens: int | None) -> None:
    assert read(f'{{"model":"m",{field}}}').max_tokens == tokens


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ("/v1/chat/completions", 9),
        ("/v1/completions", 7),
        ("/v1/messages", 7),
        ("/v1/responses", 5),
    ],
)
def test_each_endpoint_has_its_own_limit(path: str, tokens: int) -> None:
    body = '{"model":"m","max_completion_tokens":9,"max_tokens":7,"max_output_tokens":5}'
    assert read(body, path).max_tokens == tokens


@pytest.mark.parametrize(
    ("field", "prompts"),
    [('"input":"a"', 1), ('"input":["a","b"]', 2), ('"input":[1,2]', 1), ('"input":[[1],[2]]', 2)],
)
def test_embeddings_have_prompts_and_no_completions(field: str, prompts: int) -> None:
    question = read(f'{{"model":"m","stream":true,"n":3,{field}}}', "/v1/embeddings")
    assert (question.prompts, question.sequences, question.stream) == (prompts, 0, False)


@pytest.mark.parametrize(
    ("field", "sequences"),
    [
        ('"x":1', 1),
        ('"n":3', 3),
        ('"n":2,"best_of":5', 5),
        ('"n":0', 1),
        ('"n":"3"', 3),
        ('"n":3.0', 3),
        ('"n":"x"', 1),
        ('"n":[2]', 1),
        ('"n":"1e400"', 1),
        ('"n":1000000', 16_384),
        ('"prompt":"a"', 1),
        ('"prompt":["a","b","c"]', 3),
        ('"prompt":["a","b"],"n":2', 4),
        ('"prompt":[1,2,3,4]', 1),
        ('"prompt":[[1,2],[3]]', 2),
        ('"prompt":[]', 1),
    ],
)
def test_every_sequence_of_a_request_is_counted(field: str, sequences: int) -> None:
    assert read(f'{{"model":"m",{field}}}', "/v1/completions").sequences == sequences


@pytest.mark.parametrize(
    ("field", "session"),
    [
        ('"prompt_cache_key":"k"', b"k"),
        ('"user":"u"', b"u"),
        ('"prompt_cache_key":"k","user":"u"', b"k"),
        ('"metadata":{"user_id":"a"}', b"a"),
        ('"metadata":[1]', None),
        ('"user":7', None),
        ('"x":1', None),
    ],
)
def test_a_session_is_known_by_what_clients_send(field: str, session: bytes | None) -> None:
    assert read(f'{{"model":"m",{field}}}').session == session


def test_a_session_in_the_header_goes_first() -> None:
    question = read_question(CHAT, b'{"model":"m","user":"u"}', b"header")
    assert isinstance(question, Question) and question.session == b"header"


def test_responses_that_are_not_stored_are_not_followed() -> None:
    refused = read_question(
        ENDPOINTS["/v1/responses"], b'{"model":"m","previous_response_id":"resp_1"}'
    )
    assert isinstance(refused, ApiError)
    assert (refused.status, refused.param) == (400, "previous_response_id")


def test_another_name_of_the_model_changes_nothing_else() -> None:
    body = b'{"model":"alias","x":[1.50,{"model":"inner"}]}'
    assert json.loads(with_model(body, "real")) == {
        "model": "real",
        "x": [1.5, {"model": "inner"}],
    }


def test_the_last_of_two_models_counts_as_it_does_in_vllm() -> None:
    assert read('{"model":"a","model":"b"}').model == "b"
    assert isinstance(read_question(CHAT, b'{"model":"a","model":null}'), ApiError)


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ([(b"authorization", b"Bearer  k1 ")], b"k1"),
        ([(b"authorization", b"bearer k1")], b"k1"),
        ([(b"x-api-key", b"k2")], b"k2"),
        ([(b"x-api-key", b"k2"), (b"authorization", b"Bearer k1")], b"k1"),
        ([(b"authorization", b"Basic k1"), (b"x-api-key", b"k2")], b"k2"),
        ([(b"authorization", b"k1")], None),
        ([], None),
    ],
)
def test_where_a_key_may_stand(headers: list[tuple[bytes, bytes]], secret: bytes | None) -> None:
    assert read_headers(headers).secret == secret


def test_other_headers() -> None:
    found = read_headers(
        [
            (b"x-request-id", b"job-1"),
            (b"content-length", b"12"),
            (b"x-stainless-read-timeout", b"600.5"),
            (b"anthropic-version", b"2023-06-01"),
            (b"x-vllm-priority", b"1"),
        ]
    )
    assert (found.request_id, found.content_length, found.read_timeout_s) == ("job-1", 12, 600.5)
    assert found.anthropic
    assert found.forwarded == b"anthropic-version: 2023-06-01\r\n"
    for value in (b"nan", b"-1", b"", b"soon"):
        assert read_headers([(b"x-stainless-read-timeout", value)]).read_timeout_s is None
