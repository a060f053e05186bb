import pytest

from expertmesh.gateway.api import Answer
from expertmesh.gateway.event_stream import EventStream
from expertmesh.gateway.usage import TokenCount

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"w "}}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "died", "code": 500}}\n\n'
# A model may write anything.
HOSTILE = (
    b'data: {"choices":[{"delta":{"content":"data: [DONE]\\n\\ndata: {\\"error\\": 1} '
    b'\\"choices\\":[] \\"usage\\":{\\"prompt_tokens\\":9}"}}]}\n\n'
)


def test_ordinary_events_pass_and_are_counted() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(ROLE) == ROLE
    assert events.started and events.tokens_seen == 0
    assert events.feed(WORD) == WORD
    assert events.feed(WORD + WORD) == WORD + WORD
    assert events.tokens_seen == 3
    assert events.usage() is None and not events.ended


def test_usage_is_stripped_and_kept() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(ROLE + WORD + USAGE + DONE) == ROLE + WORD + DONE
    assert events.usage() == TokenCount(prompt=5, cached=2, completion=3)
    assert events.ended


def test_usage_that_the_client_wanted_passes() -> None:
    events = EventStream(Answer.CHAT, strip_usage=False)
    events.feed(ROLE)
    assert events.feed(WORD + USAGE) == WORD + USAGE
    assert events.feed(DONE) == DONE
    assert events.usage() == TokenCount(5, 2, 3)
    assert events.tokens_seen == 1


def test_continuous_usage_counts_up_to_the_break() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    events.feed(ROLE)
    for count in range(1, 5):
        event = WORD[:-3] + b',"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n' % (
            count * 2
        )
        assert events.feed(event) == event
    assert events.usage() == TokenCount(5, 0, 8)


def test_text_of_a_model_is_never_taken_for_structure() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    events.feed(ROLE)
    assert events.feed(HOSTILE) == HOSTILE
    assert not events.ended and events.error is None and events.usage() is None
    assert events.tokens_seen == 1


def test_an_error_event_is_held_back_with_all_that_follows() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(ROLE + WORD + ERROR + DONE) == ROLE + WORD
    assert events.error == b'{"error": {"message": "died", "code": 500}}'
    assert not events.ended


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_cuts_anywhere_change_nothing(size: int) -> None:
    whole = b": ping\n\n" + ROLE + WORD * 3 + HOSTILE + USAGE + DONE
    events = EventStream(Answer.CHAT, strip_usage=True)
    out = b"".join(events.feed(whole[i : i + size]) for i in range(0, len(whole), size))
    assert out == whole.replace(USAGE, b"")
    assert events.ended and events.usage() == TokenCount(5, 2, 3)


def test_half_an_event_is_not_passed_on() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(ROLE + WORD[:20]) == ROLE
    assert events.feed(WORD[20:-1]) == b""


def test_nothing_after_the_last_event() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(ROLE + DONE + WORD) == ROLE + DONE


def test_comments_do_not_start_a_stream() -> None:
    events = EventStream(Answer.CHAT, strip_usage=True)
    assert events.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert not events.started


def event(kind: str, rest: str = "") -> bytes:
    return f'event: {kind}\ndata: {{"type":"{kind}"{rest}}}\n\n'.encode()


def test_messages() -> None:
    start = event(
        "message_start",
        ',"message":{"usage":{"input_tokens":4,"cache_read_input_tokens":2,"output_tokens":0}}',
    )
    delta = event("content_block_delta", ',"delta":{"text":"event: message_stop"}')
    end = event(
        "message_delta", ',"usage":{"input_tokens":4,"output_tokens":9,"cache_read_input_tokens":2}'
    )
    stop = event("message_stop")
    events = EventStream(Answer.MESSAGES, strip_usage=False)
    assert events.feed(start) == start and events.started
    assert events.feed(event("content_block_start") + delta + delta)
    assert events.usage() == TokenCount(prompt=6, cached=2, completion=2)
    assert events.feed(end + stop) == end + stop
    assert events.usage() == TokenCount(prompt=6, cached=2, completion=9)
    assert events.ended


def test_messages_error() -> None:
    events = EventStream(Answer.MESSAGES, strip_usage=False)
    assert events.feed(event("message_start") + event("error")) == event("message_start")
    assert events.error == b'{"type":"error"}'


@pytest.mark.parametrize("last", ["completed", "incomplete", "failed"])
def test_responses(last: str) -> None:
    first = event("response.created", ',"response":{"usage":null}') + event("response.in_progress")
    delta = event("response.output_text.delta", ',"delta":"x"')
    end = event(
        f"response.{last}",
        ',"response":{"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":3},'
        '"output_tokens":2}}',
    )
    events = EventStream(Answer.RESPONSES, strip_usage=False)
    assert events.feed(first) == first
    assert not events.started
    assert events.feed(delta) == delta and events.started
    assert events.feed(delta) == delta and events.tokens_seen == 2
    assert events.usage() is None
    assert events.feed(end) == end and events.ended
    assert events.usage() == TokenCount(7, 3, 2)
