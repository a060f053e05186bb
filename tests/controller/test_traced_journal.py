from typing import Any

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.controller.memory_store import MemoryJournal

from expertmesh.controller.journal import DECISION, STARTED
from expertmesh.controller.traced_journal import TracedJournal
from expertmesh.telemetry.traces import DecisionTracing

DECIDED: dict[str, Any] = {
    "decision": {
        "reason": "3 queued requests need 1 group",
        "binding": "load",
        "need": 1,
        "actions": [{"kind": "start", "group": "em-tiny-a-1", "why": "cheapest", "spec": None}],
    }
}


async def test_a_recorded_decision_is_a_span_and_other_entries_are_not() -> None:
    exporter = InMemorySpanExporter()
    journal = TracedJournal(MemoryJournal(), DecisionTracing(exporter, at_once=True), lambda: 12.5)
    await journal.append(10.0, STARTED, None, {"groups": []})
    seq = await journal.append(12.0, DECISION, "tiny", DECIDED)
    (span,) = exporter.get_finished_spans()
    assert span.name == "decide tiny"
    assert dict(span.attributes or {}) == {
        "expertmesh.decision": seq,
        "expertmesh.model": "tiny",
        "expertmesh.reason": "3 queued requests need 1 group",
        "expertmesh.binding": "load",
        "expertmesh.needed_groups": 1,
    }
    (event,) = span.events
    assert dict(event.attributes or {})["expertmesh.why"] == "cheapest"
    assert (span.start_time, span.end_time) == (12_000_000_000, 12_500_000_000)
    assert len(await journal.read()) == 2
