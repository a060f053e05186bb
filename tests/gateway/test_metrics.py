import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.telemetry import metrics as names
from expertmesh.telemetry.shared_tally import TallyFolder

TRACE = "ab" * 16


def made(folder: Path | None = None) -> GatewayMetrics:
    return GatewayMetrics(CollectorRegistry(), TallyFolder(folder) if folder else None)


def samples(metrics: GatewayMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """By name, then by the values of the labels in order of their names."""
    _, text = metrics.exposition(b"")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = tuple(sample.labels[name] for name in sorted(sample.labels))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_every_metric_of_the_gateway_is_exported() -> None:
    content_type, text = made().exposition(b"")
    exported = {family.name for family in text_string_to_metric_families(text.decode())}
    named = {metric for metric in names.ALL if metric.name.startswith("em_gateway_")}
    assert exported == {metric.name.removesuffix("_total") for metric in named}
    assert content_type.startswith(b"text/plain")


def test_requests_are_counted_where_they_end() -> None:
    metrics = made()
    metrics.answered("m", "chat_completions", 200)
    metrics.answered("m", "chat_completions", 200)
    metrics.refused("messages", 401)
    metrics.rejected("m", "queue_full")
    metrics.limited("m", "usd_per_day")
    metrics.retried("m", "refused")
    metrics.aborted("m")
    metrics.sent_out("m", "provider")
    metrics.waited("m", "batch", 0.3)
    found = samples(metrics)
    assert found["em_gateway_requests_total"] == {
        ("chat_completions", "m", "200"): 2.0,
        ("messages", "", "401"): 1.0,
    }
    assert found["em_gateway_rejections_total"] == {("m", "queue_full"): 1.0}
    assert found["em_gateway_limit_refusals_total"] == {("usd_per_day", "m"): 1.0}
    assert found["em_gateway_retries_total"] == {("m", "refused"): 1.0}
    assert found["em_gateway_client_aborts_total"] == {("m",): 1.0}
    assert found["em_gateway_external_requests_total"] == {("m", "provider"): 1.0}
    assert found["em_gateway_queue_wait_seconds_count"] == {("m", "batch"): 1.0}


def test_an_answer_adds_to_all_that_belongs_to_its_model_and_pool() -> None:
    metrics = made()
    served = metrics.served("m", "spot")
    assert metrics.served("m", "spot") is served
    served.prompt_tokens.inc(10)
    served.cached_tokens.inc(4)
    served.completion_tokens.inc(7)
    served.revenue_usd.inc(0.5)
    for histogram in (served.duration, served.ttft, served.tpot):
        histogram.observe(0.02)
    found = samples(metrics)
    assert found["em_gateway_tokens_total"] == {
        ("in", "m", "spot"): 10.0,
        ("cached", "m", "spot"): 4.0,
        ("out", "m", "spot"): 7.0,
    }
    assert found["em_gateway_tariff_usd_total"] == {("m", "spot"): 0.5}
    for name in ("request_duration", "ttft", "tpot"):
        assert found[f"em_gateway_{name}_seconds_sum"] == {("m", "spot"): 0.02}


def test_openmetrics_has_examples_for_whoever_accepts_it() -> None:
    metrics = made()
    metrics.served("m", "spot").ttft.observe(0.3, TRACE)
    accept = b"application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    content_type, text = metrics.exposition(accept)
    assert content_type.startswith(b"application/openmetrics-text")
    examples = [
        (sample.labels["le"], sample.exemplar)
        for family in openmetrics(text.decode())
        for sample in family.samples
        if sample.exemplar is not None
    ]
    ((bound, example),) = examples
    assert bound == "0.5"
    assert (example.labels, example.value) == ({"trace_id": TRACE}, 0.3)


def world() -> tuple[Any, Any, Any, Any, Any]:
    group = SimpleNamespace(model="m", pool="spot", in_flight=3)
    view = SimpleNamespace(
        names=("m",), groups={"em-m-spot-1": group}, ejected_ranks=lambda: {"m": 2}, age_s=1.5
    )
    admission = SimpleNamespace(queued=lambda model: 5, queued_tokens=lambda model: 600)
    relay = SimpleNamespace(
        open_calls=8,
        pool=SimpleNamespace(idle_connections=2),
        held_streams=lambda: {"m": 7},
    )
    writer = SimpleNamespace(pending=4, given_up=1)
    access_log = SimpleNamespace(dropped=6)
    return view, admission, relay, writer, access_log


def test_gauges_tell_how_it_stands_now() -> None:
    metrics = made()
    parts = view, *_ = world()
    metrics.watch(*parts)
    found = samples(metrics)
    assert found["em_gateway_in_flight_requests"] == {("em-m-spot-1", "m", "spot"): 3.0}
    assert found["em_gateway_queued_requests"] == {("m",): 5.0}
    assert found["em_gateway_queued_tokens"] == {("m",): 600.0}
    assert found["em_gateway_open_requests"] == {(): 8.0}
    assert found["em_gateway_fleet_age_seconds"] == {(): 1.5}
    assert found["em_gateway_held_streams"] == {("m",): 7.0}
    assert found["em_gateway_ejected_ranks"] == {("m",): 2.0}
    assert found["em_gateway_upstream_connections"] == {("idle",): 2.0, ("busy",): 3.0}
    assert found["em_gateway_usage_pending_records"] == {(): 4.0}
    assert found["em_gateway_usage_given_up_total"] == {(): 1.0}
    assert found["em_gateway_access_log_dropped_total"] == {(): 6.0}
    # A group that has gone leaves no gauge behind.
    view.groups.clear()
    assert "em_gateway_in_flight_requests" not in samples(metrics)


async def test_other_workers_hear_of_gauges_that_nobody_scraped_here(tmp_path: Path) -> None:
    asked, other = made(tmp_path), made(tmp_path)
    for metrics in (asked, other):
        metrics.watch(*world())
    other.answered("m", "messages", 200)
    running = asyncio.create_task(other.run())
    await asyncio.sleep(0.01)
    running.cancel()
    found = samples(asked)
    assert found["em_gateway_queued_requests"] == {("m",): 10.0}
    assert found["em_gateway_requests_total"] == {("messages", "m", "200"): 1.0}
    other.answered("m", "messages", 200)
    other.close()
    found = samples(asked)
    assert found["em_gateway_queued_requests"] == {("m",): 5.0}
    assert found["em_gateway_requests_total"] == {("messages", "m", "200"): 2.0}
