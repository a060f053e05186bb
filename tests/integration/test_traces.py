"""One trace of a request through gateway, group and engine, and the decisions, as a collector
receives them from a whole system."""

from pathlib import Path

import httpx
import pytest
from tests.integration.running_system import MODEL, running_system
from tests.telemetry.otlp_receiver import otlp_receiver

pytestmark = [pytest.mark.integration]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = "00f067aa0ba902b7"


def test_one_trace_from_the_client_to_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "500")
        with running_system(folder, groups=(1, 1)) as system:
            system.until_groups(1)
            key = system.new_key("traced")
            answer = httpx.post(
                f"{system.gateway_url}/v1/chat/completions",
                headers={
                    "Authorization": f"Bearer {key}",
                    "traceparent": f"00-{TRACE}-{CLIENT}-01",
                },
                json={
                    "model": MODEL,
                    "max_tokens": 8,
                    "messages": [{"role": "user", "content": "Tell me a secretword."}],
                },
                timeout=60,
            )
            assert answer.status_code == 200
            engine = receiver.wait_for(
                lambda span: span.name == "llm_request" and span.trace_id == TRACE, 30
            )
            server = receiver.wait_for(
                lambda span: span.trace_id == TRACE and span.parent_id == CLIENT
            )
            attempt = receiver.wait_for(
                lambda span: span.trace_id == TRACE and span.parent_id == server.span_id
            )
            decision = receiver.wait_for(
                lambda span: span.name == f"decide {MODEL}" and bool(span.events)
            )
    assert server.service == "expertmesh-gateway"
    assert server.name == "POST /v1/chat/completions"
    assert str(attempt.attributes["expertmesh.group"]).startswith("em-tiny-moe-")
    assert engine.parent_id == attempt.span_id
    assert engine.attributes["gen_ai.usage.completion_tokens"] == 8
    assert server.started_at_s <= engine.started_at_s
    assert engine.ended_at_s <= server.ended_at_s + 0.1
    assert decision.service == "expertmesh-controller"
    assert dict(decision.events[0][1])["expertmesh.action"] == "start"
    assert not [span for span in receiver.spans if "secretword" in str(span.attributes)]
