from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from expertmesh.telemetry.metrics import Metric
from expertmesh.telemetry.shared_tally import TallyCollector
from expertmesh.telemetry.tally import Tally
from expertmesh.telemetry.text import TextWriter

COUNTER = Metric("em_things_total", "counter", "Things", ("name", "kind"))
GAUGE = Metric("em_level", "gauge", "A level")
TRACE = "ab" * 16
HISTOGRAM = Metric("em_times_seconds", "histogram", "Times", ("name",), (0.1, 1.0))


def filled() -> Tally:
    tally = Tally()
    things, times = tally.counter(COUNTER), tally.histogram(HISTOGRAM)
    things.labels("a", "x").inc(3)
    things.labels('quote " back \\ line \n end', "y").inc(0.25)
    tally.gauge(GAUGE).labels().set(float("inf"))
    for value in (0.05, 0.5, 7.0):
        times.labels("a").observe(value)
    return tally


def test_the_text_is_what_prometheus_client_writes() -> None:
    tally = filled()
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally))
    writer = TextWriter()
    for _ in range(2):
        ours = writer.plain(tally.snapshot(), tally.metrics).decode()
        assert _sorted(ours) == _sorted(generate_latest(registry).decode())
    tally.histogram(HISTOGRAM).labels("a").observe(0.7, TRACE)
    examples = writer.openmetrics(tally.snapshot(), tally.metrics).decode()
    assert f'le="1.0"}} 3.0 # {{trace_id="{TRACE}"}} 0.7\n' in examples
    assert _sorted(examples) == _sorted(generate_openmetrics(registry).decode())


def _sorted(text: str) -> list[tuple[str, ...]]:
    """The library sorts labels."""
    return sorted(_parts(line) for line in text.splitlines())


def _parts(line: str) -> tuple[str, ...]:
    if line.startswith("# "):
        return (line,)
    sample, _, example = line.partition(" # ")
    name, _, value = sample.rpartition(" ")
    head, _, labels = name.partition("{")
    return (head, *sorted(labels.rstrip("}").split(",")), str(float(value)), example)


def test_a_metric_without_a_value_has_its_help_and_type() -> None:
    tally = Tally()
    tally.counter(COUNTER)
    assert TextWriter().plain(tally.snapshot(), tally.metrics) == (
        b"# HELP em_things_total Things\n# TYPE em_things_total counter\n"
    )


def test_series_of_what_is_gone_go() -> None:
    tally = Tally()
    things = tally.counter(COUNTER)
    for name in ("a", "b", "c"):
        things.labels(name, "x").inc()
    things.keep("name", {"a", "b"})
    things.drop("name", "b")
    assert [labels for labels, _ in things.items()] == [("a", "x")]
