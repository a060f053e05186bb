"""Spans as a collector receives them, over HTTP."""

from collections.abc import Iterator

import pytest
from tests.telemetry.otlp_receiver import Receiver, otlp_receiver
from tests.telemetry.test_traces import AT_S, SAMPLED, TRACE, call

from expertmesh.errors import SetupError
from expertmesh.telemetry.traces import DecisionTracing, Tracing, traces_endpoint


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as running:
        yield running


def test_a_request_arrives_as_one_trace(receiver: Receiver) -> None:
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url})
    trace = tracing.begin(SAMPLED)
    assert trace is not None
    told = trace.attempt("em-a", "spot", 1, AT_S + 0.3).decode()
    tracing.end(trace, call())
    tracing.close()
    spans = {span.name: span for span in receiver.spans}
    assert set(spans) == {"POST /v1/chat/completions", "queue", "chat tiny-moe"}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert {span.service for span in spans.values()} == {"expertmesh-gateway"}
    # Whoever is told this, as vLLM is, puts its spans below the attempt.
    assert told == f"00-{TRACE}-{spans['chat tiny-moe'].span_id}-01"
    assert spans["queue"].parent_id == spans["POST /v1/chat/completions"].span_id


def test_a_decision_arrives_with_its_reason_and_actions(receiver: Receiver) -> None:
    tracing = DecisionTracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url})
    assert tracing.on
    for number in range(2):
        tracing.decided(
            "tiny",
            AT_S,
            AT_S + 0.01,
            {"expertmesh.decision": number, "expertmesh.reason": "3 queued"},
            [{"expertmesh.action": "start", "expertmesh.group": "em-tiny-a-1"}],
        )
    tracing.close()
    first, second = receiver.spans
    assert (first.name, first.service, first.parent_id) == (
        "decide tiny",
        "expertmesh-controller",
        "",
    )
    assert first.trace_id != second.trace_id
    assert first.attributes == {"expertmesh.decision": 0, "expertmesh.reason": "3 queued"}
    assert first.events == (
        ("action", {"expertmesh.action": "start", "expertmesh.group": "em-tiny-a-1"}),
    )
    assert first.ended_at_s - first.started_at_s == pytest.approx(0.01, abs=1e-4)


def test_without_an_endpoint_decisions_cost_nothing() -> None:
    tracing = DecisionTracing.from_environment({})
    assert not tracing.on
    tracing.decided("tiny", 0.0, 0.0, {}, ())
    tracing.close()


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://d:1/t",
            },
            "http://d:1/t",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_where_traces_go(environment: dict[str, str], endpoint: str | None) -> None:
    assert traces_endpoint(environment) == endpoint


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(SetupError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*http://host:port"):
        DecisionTracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4318"})
