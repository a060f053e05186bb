import re
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from expertmesh.errors import SetupError
from expertmesh.telemetry.traces import (
    CallTrace,
    TracedCall,
    TraceParent,
    Tracing,
    read_traceparent,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01".encode()
UNSAMPLED = f"00-{TRACE}-{PARENT}-00".encode()
AT_S = 1_790_000_000.0


def call(**changes: object) -> TracedCall:
    fields: dict[str, object] = {
        "route": "/v1/chat/completions",
        "endpoint": "chat_completions",
        "request_id": "client-1",
        "tenant": "team-a",
        "model": "tiny-moe",
        "stream": True,
        "max_tokens": 64,
        "status": 200,
        "error": "",
        "accepted_at_s": AT_S,
        "queue_s": 0.25,
        "first_token_at_s": AT_S + 1.0,
        "ended_at_s": AT_S + 3.0,
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "completion_tokens": 30,
    }
    return TracedCall(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    made = Tracing(exporter, ratio=1.0, at_once=True)
    yield made
    made.close()


def begun(tracing: Tracing, traceparent: bytes | None = None) -> CallTrace:
    trace = tracing.begin(traceparent)
    assert trace is not None
    return trace


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return (
        round(span.start_time / 1e9 - AT_S, 3),
        round(span.end_time / 1e9 - AT_S, 3),
    )


def test_a_request_becomes_a_server_span_with_its_queue_and_attempts(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    trace = begun(tracing, SAMPLED)
    first = trace.attempt("em-a", "spot", 0, AT_S + 0.3)
    trace.attempt_ended(AT_S + 0.5, "em-a: broke off")
    second = trace.attempt("em-b", "od", 2, AT_S + 0.5)
    tracing.end(trace, call())
    queue, failed, answered, server = exporter.get_finished_spans()
    assert [span.name for span in (queue, failed, answered, server)] == [
        "queue",
        "chat tiny-moe",
        "chat tiny-moe",
        "POST /v1/chat/completions",
    ]
    assert [span.kind for span in (queue, failed, answered, server)] == [
        SpanKind.INTERNAL,
        SpanKind.CLIENT,
        SpanKind.CLIENT,
        SpanKind.SERVER,
    ]
    # One trace, as the client began it.
    assert {ids(span)[0] for span in exporter.get_finished_spans()} == {TRACE}
    assert server.parent is not None and f"{server.parent.span_id:016x}" == PARENT
    for child in (queue, failed, answered):
        assert child.parent is not None and child.parent.span_id == trace.span_id
    # What the ranks were told.
    assert first.decode() == f"00-{TRACE}-{ids(failed)[1]}-01"
    assert second.decode() == f"00-{TRACE}-{ids(answered)[1]}-01"
    assert seconds(server) == (0.0, 3.0)
    assert seconds(queue) == (0.0, 0.25)
    assert seconds(failed) == (0.3, 0.5)
    assert seconds(answered) == (0.5, 3.0)
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == "em-a: broke off"
    assert answered.status.status_code is StatusCode.UNSET
    assert server.status.status_code is StatusCode.UNSET
    for span in (server, answered):
        (event,) = span.events
        assert event.name == "first token" and event.timestamp == int((AT_S + 1.0) * 1e9)
    assert failed.events == ()


def test_attributes_follow_the_conventions(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    trace = begun(tracing)
    trace.attempt("em-a", "spot", 3, AT_S)
    tracing.end(trace, call(queue_s=0.0))
    attempt, server = exporter.get_finished_spans()
    model = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "tiny-moe",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 30,
        "gen_ai.response.time_to_first_chunk": 1.0,
    }
    assert dict(server.attributes or {}) == {
        **model,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "expertmesh.request_id": "client-1",
        "expertmesh.tenant": "team-a",
    }
    assert dict(attempt.attributes or {}) == {
        **model,
        "expertmesh.group": "em-a",
        "expertmesh.pool": "spot",
        "expertmesh.rank": 3,
    }
    assert server.resource.attributes["service.name"] == "expertmesh-gateway"
    assert server.parent is None


@pytest.mark.parametrize(
    ("status", "error", "failed"),
    [
        (200, "", False),
        (429, "too many", False),  # the client's to act on
        (499, "the client went away", False),
        (503, "no group", True),
        (200, "em-a: broke off", True),  # within the stream
    ],
)
def test_a_server_span_fails_when_the_server_does(
    tracing: Tracing, exporter: InMemorySpanExporter, status: int, error: str, failed: bool
) -> None:
    tracing.end(begun(tracing), call(status=status, error=error))
    server = exporter.get_finished_spans()[-1]
    assert (server.status.status_code is StatusCode.ERROR) is failed
    assert ("error.type" in (server.attributes or {})) is failed


def test_an_endpoint_without_an_operation_has_none(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    trace = begun(tracing)
    trace.attempt("em-a", "spot", 0, AT_S)
    tracing.end(trace, call(endpoint="tokenize", route="/tokenize", first_token_at_s=None))
    for span in exporter.get_finished_spans():
        assert "gen_ai.operation.name" not in (span.attributes or {})
        assert span.events == ()


def test_requests_do_not_share_spans(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    for _ in range(50):
        trace = begun(tracing)
        trace.attempt("em-a", "spot", 0, AT_S)
        tracing.end(trace, call())
    spans = [ids(span) for span in exporter.get_finished_spans()]
    assert len(set(spans)) == 150
    assert len({trace_id for trace_id, _ in spans}) == 50


def test_the_clients_decision_counts() -> None:
    never, always = Tracing(InMemorySpanExporter(), 0.0), Tracing(InMemorySpanExporter(), 1.0)
    assert begun(never, SAMPLED).id == TRACE
    assert always.begin(UNSAMPLED) is None
    assert never.begin(None) is None
    assert always.begin(None) is not None
    # What cannot be read is no decision, and no parent.
    assert never.begin(b"00-junk") is None
    assert begun(always, b"00-junk").parent is None
    for tracing in (never, always):
        tracing.close()


def test_the_ratio_is_kept() -> None:
    tracing = Tracing(InMemorySpanExporter(), 0.25)
    traced = sum(tracing.begin(None) is not None for _ in range(4000))
    assert 850 < traced < 1150  # more than five standard deviations
    tracing.close()


def test_off_it_does_nothing() -> None:
    tracing = Tracing.from_environment({})
    assert not tracing.on
    assert tracing.begin(SAMPLED) is None
    tracing.close()
    disabled = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}
    assert not Tracing.from_environment(disabled).on


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT: .*http://host"),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces",
                "OTEL_TRACES_SAMPLER_ARG": "10%",
            },
            "OTEL_TRACES_SAMPLER_ARG: '10%': write a number from 0 to 1",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_TRACES_SAMPLER_ARG": "nan",
            },
            "OTEL_TRACES_SAMPLER_ARG: 'nan'",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        Tracing.from_environment(environment)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SetupError, match=r"install expertmesh\[traces\]"):
        Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"})


def test_an_endpoint_turns_it_on() -> None:
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert tracing.on and tracing.begin(None) is not None
    tracing.close(0.5)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        SAMPLED[:-1],
        SAMPLED + b"-more",  # version 00 has no more
        b"ff" + SAMPLED[2:],
        SAMPLED.upper(),
        f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        b" " + SAMPLED,
        SAMPLED + b"\n",
    ],
)
def test_what_is_no_traceparent_is_ignored(value: bytes) -> None:
    assert read_traceparent(value) is None


def test_a_traceparent_of_a_later_version_is_read_as_far_as_known() -> None:
    parent = TraceParent(int(TRACE, 16), int(PARENT, 16), True)
    assert read_traceparent(SAMPLED) == parent
    assert read_traceparent(b"01" + SAMPLED[2:] + b"-later") == parent
    assert read_traceparent(b"01" + SAMPLED[2:]) == parent
    assert read_traceparent(UNSAMPLED) == TraceParent(parent.trace_id, parent.span_id, False)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_traceparent_or_not(value: bytes) -> None:
    read = read_traceparent(value)
    if read is not None:
        assert re.match(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", value)
