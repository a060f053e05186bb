"""Spans of requests through the whole gateway, and what of them ranks are told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.gateway.stand import MODEL, SECRET, Stand, group_of, served_model, standing, until
from tests.mock_rank import Fault, MockRank

from expertmesh.telemetry.traces import Tracing

CHAT_PATH = "/v1/chat/completions"
SECRET_WORD = "a-word-of-the-prompt"
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": f"one {SECRET_WORD}"}],
    "max_tokens": 8,
}
STREAM = {**CHAT, "stream": True}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(exporter: InMemorySpanExporter) -> AsyncIterator[Stand]:
    async with standing(tracing=Tracing(exporter, at_once=True)) as stand:
        yield stand


async def two_groups(stand: Stand) -> list[MockRank]:
    ranks = [await stand.rank(f"em-tiny-moe-pool-a-{number}") for number in range(2)]
    await stand.show(*map(group_of, ranks))
    return ranks


def spans_of(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span of the request, and those below it in the order of their beginning."""
    spans = exporter.get_finished_spans()
    (server,) = (span for span in spans if span.kind is SpanKind.SERVER)
    below = sorted((s for s in spans if s is not server), key=lambda s: s.start_time or 0)
    return server, below


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


async def test_the_spans_of_a_stream_that_was_tried_twice(
    traced: Stand, exporter: InMemorySpanExporter
) -> None:
    ranks = await two_groups(traced)
    ranks[0].faults = ranks[1].faults
    ranks[0].faults.append(Fault("reset"))
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=1", "x-request-id": "job-1"}
    async with traced.post(CHAT_PATH, STREAM, headers=headers) as response:
        assert (await response.text()).endswith("data: [DONE]\n\n")
    await until(lambda: len(exporter.get_finished_spans()) == 3)
    server, (first, second) = spans_of(exporter)
    assert ids(server)[0] == TRACE and parent_of(server) == PARENT
    assert server.name == "POST /v1/chat/completions"
    attributes = dict(server.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["expertmesh.request_id"] == "job-1"
    assert attributes["expertmesh.tenant"] == "team-a"
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert server.status.status_code is StatusCode.UNSET
    assert [event.name for event in server.events] == ["first token"]
    for attempt in (first, second):
        assert attempt.kind is SpanKind.CLIENT
        assert ids(attempt)[0] == TRACE and parent_of(attempt) == ids(server)[1]
        assert attempt.name == f"chat {MODEL}"
    assert first.status.status_code is StatusCode.ERROR
    assert first.status.description == "reset"
    assert second.status.status_code is StatusCode.UNSET
    assert [event.name for event in second.events] == ["first token"]
    groups = [dict(attempt.attributes or {})["expertmesh.group"] for attempt in (first, second)]
    assert sorted(groups) == sorted(rank.group for rank in ranks)
    # Each rank hears of its own attempt.
    told = {rank.group: rank.seen[0].headers for rank in ranks}
    for attempt, group in zip((first, second), groups, strict=True):
        assert told[str(group)]["traceparent"] == f"00-{TRACE}-{ids(attempt)[1]}-01"
        assert told[str(group)]["tracestate"] == "vendor=1"
    text = "".join(span.to_json() for span in (server, first, second))
    assert SECRET_WORD not in text and SECRET not in text and "w0 " not in text
    await until(lambda: traced.log_lines())
    assert traced.log_lines()[0]["trace_id"] == TRACE


async def test_a_request_that_waited_shows_its_queue(
    traced: Stand, exporter: InMemorySpanExporter
) -> None:
    rank = await traced.rank()
    await traced.show(models=(served_model(max_wait_s=5.0),))
    task = asyncio.create_task(traced.post(CHAT_PATH, CHAT).__aenter__())
    await until(lambda: traced.service.admission.queued(MODEL) == 1)
    await traced.show(group_of(rank))
    response = await task
    assert response.status == 200
    await response.read()
    await until(lambda: len(exporter.get_finished_spans()) == 3)
    server, below = spans_of(exporter)
    assert [span.name for span in below] == ["queue", f"chat {MODEL}"]
    queue, attempt = below
    assert parent_of(server) is None and parent_of(queue) == ids(server)[1]
    assert (server.start_time or 0) <= (queue.start_time or 0)
    assert (queue.end_time or 0) <= (attempt.end_time or 0) <= (server.end_time or 0)


async def test_refused_and_broken_requests_are_errors(
    traced: Stand, exporter: InMemorySpanExporter
) -> None:
    (rank, other) = await two_groups(traced)
    await traced.show(group_of(rank))
    rank.faults.append(Fault("reset", after_events=3))
    async with traced.post(CHAT_PATH, STREAM) as response:
        assert "The stream broke off" in await response.text()
    await until(lambda: len(exporter.get_finished_spans()) == 2)
    server, (attempt,) = spans_of(exporter)
    assert server.status.status_code is attempt.status.status_code is StatusCode.ERROR
    assert attempt.status.description == "reset"
    exporter.clear()
    await traced.show(group_of(other))
    async with traced.post(CHAT_PATH, {**CHAT, "max_tokens": 10_000}) as response:
        assert response.status == 400
    await until(lambda: len(exporter.get_finished_spans()) == 2)
    server, (attempt,) = spans_of(exporter)
    # The client's own fault is none of the server.
    assert server.status.status_code is StatusCode.UNSET
    assert dict(server.attributes or {})["http.response.status_code"] == 400


@pytest.mark.parametrize("given", [UNSAMPLED, None, "nonsense"])
async def test_what_is_not_traced_passes_untouched(
    exporter: InMemorySpanExporter, given: str | None
) -> None:
    # Without a decision of the client the ratio decides: none.
    async with standing(tracing=Tracing(exporter, ratio=0.0, at_once=True)) as stand:
        rank = await stand.rank()
        await stand.show(group_of(rank))
        headers = {"tracestate": "vendor=1"} | ({"traceparent": given} if given else {})
        async with stand.post(CHAT_PATH, CHAT, headers=headers) as response:
            assert response.status == 200
        assert rank.seen[0].headers.get("traceparent") == given
        assert rank.seen[0].headers["tracestate"] == "vendor=1"
        await until(lambda: stand.log_lines())
        assert stand.log_lines()[0]["trace_id"] == ""
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("given", [SAMPLED, UNSAMPLED])
async def test_off_means_untouched(stand: Stand, given: str) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    async with stand.post(CHAT_PATH, STREAM, headers={"traceparent": given}) as response:
        await response.read()
    assert rank.seen[0].headers["traceparent"] == given
    async with stand.post(CHAT_PATH, STREAM) as response:
        await response.read()
    assert "traceparent" not in rank.seen[1].headers
