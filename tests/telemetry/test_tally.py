import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.telemetry.metrics import Metric
from expertmesh.telemetry.shared_tally import TallyCollector
from expertmesh.telemetry.tally import OTHER, Tally, decode, encode, lasting, merge

REQUESTS = Metric("em_requests_total", "counter", "Requests", ("model", "status"))
QUEUED = Metric("em_queued", "gauge", "Queued", ("model",))
WORST = Metric("em_worst", "gauge", "Worst", ("model",), merge="max")
WAIT = Metric("em_wait_seconds", "histogram", "Wait", ("model",), (0.1, 1.0, 2.5))
PLAIN = Metric("em_plain_total", "counter", "No labels")
ALL = (REQUESTS, QUEUED, WORST, WAIT, PLAIN)

labels = st.sampled_from(["a", "b", "c"])
seconds = st.floats(0, 5)
events = st.lists(
    st.one_of(
        st.tuples(st.just("inc"), labels, st.integers(1, 5)),
        st.tuples(st.just("set"), labels, st.integers(0, 9)),
        st.tuples(st.just("observe"), labels, st.one_of(seconds, st.sampled_from((0.1, 1.0)))),
    ),
    max_size=30,
)


def played(happened: list[tuple[str, str, float]]) -> Tally:
    tally = Tally()
    requests, queued = tally.counter(REQUESTS), tally.gauge(QUEUED)
    worst, wait, plain = tally.gauge(WORST), tally.histogram(WAIT), tally.counter(PLAIN)
    for kind, label, value in happened:
        if kind == "inc":
            requests.labels(label, "200").inc(value)
            plain.labels().inc()
        elif kind == "set":
            queued.labels(label).set(value)
            worst.labels(label).set(value)
        else:
            wait.labels(label).observe(value)
    return tally


def text(tally: Tally) -> str:
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally))
    return generate_latest(registry).decode()


def values(exposed: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(events)
def test_the_text_is_that_of_prometheus_client(happened: list[tuple[str, str, float]]) -> None:
    registry = CollectorRegistry()
    requests = Counter(REQUESTS.name, REQUESTS.help, REQUESTS.labels, registry=registry)
    queued = Gauge(QUEUED.name, QUEUED.help, QUEUED.labels, registry=registry)
    worst = Gauge(WORST.name, WORST.help, WORST.labels, registry=registry)
    wait = Histogram(WAIT.name, WAIT.help, WAIT.labels, registry=registry, buckets=WAIT.buckets)
    plain = Counter(PLAIN.name, PLAIN.help, registry=registry)
    for kind, label, value in happened:
        if kind == "inc":
            requests.labels(label, "200").inc(value)
            plain.inc()
        elif kind == "set":
            queued.labels(label).set(value)
            worst.labels(label).set(value)
        else:
            wait.labels(label).observe(value)
    theirs = generate_latest(registry).decode()
    ours = text(played(happened))
    assert values(ours) == values(theirs)
    for line in theirs.splitlines():
        if line.startswith("#") and "_created" not in line:
            assert line in ours.splitlines()


@given(events, events)
def test_the_sum_of_two_workers_is_that_of_one_that_did_both(
    first: list[tuple[str, str, float]], second: list[tuple[str, str, float]]
) -> None:
    counted = [[event for event in part if event[0] != "set"] for part in (first, second)]
    snapshots = [decode(encode(played(part).snapshot())) for part in counted]
    total = merge(snapshots, ALL)
    whole = played([*counted[0], *counted[1]]).snapshot()
    assert sorted(total.counters) == sorted(whole.counters)
    sums = {(name, label): state.sum for name, label, state in whole.histograms}
    for name, label, state in total.histograms:
        assert state.sum == pytest.approx(sums[name, label])
    assert {(n, label, tuple(s.counts)) for n, label, s in total.histograms} == {
        (n, label, tuple(s.counts)) for n, label, s in whole.histograms
    }


def test_gauges_add_up_or_the_highest_counts() -> None:
    workers = [played([("set", "a", 3)]), played([("set", "a", 5), ("set", "b", 1)])]
    total = merge([worker.snapshot() for worker in workers], ALL)
    assert sorted(total.gauges) == [
        (QUEUED.name, ("a",), 8.0),
        (QUEUED.name, ("b",), 1.0),
        (WORST.name, ("a",), 5.0),
        (WORST.name, ("b",), 1.0),
    ]


def test_what_another_release_counted_otherwise_is_left_out() -> None:
    other = Tally()
    other.counter(Metric(REQUESTS.name, "counter", "Requests", ("model",))).labels("a").inc()
    other.counter(Metric("em_gone_total", "counter", "Gone")).labels().inc()
    other.histogram(Metric(WAIT.name, "histogram", "Wait", ("model",), (7.0,))).labels("a")
    mine = played([("inc", "a", 2), ("observe", "a", 0.5)])
    assert merge([other.snapshot(), mine.snapshot()], ALL) == merge([mine.snapshot()], ALL)


def test_what_lasts_has_no_gauges_and_no_examples() -> None:
    tally = played([("inc", "a", 2), ("set", "a", 3)])
    tally.histogram(WAIT).labels("a").observe(0.5, "ab" * 16)
    kept = lasting(tally.snapshot())
    assert kept.gauges == [] and kept.counters == tally.snapshot().counters
    ((_, _, state),) = kept.histograms
    assert state.counts == [0, 1, 0, 0] and state.exemplars == {}


def test_a_trace_is_the_example_of_its_bucket() -> None:
    tally = Tally()
    wait = tally.histogram(WAIT).labels("a")
    wait.observe(0.5, "ab" * 16)
    wait.observe(0.7)
    wait.observe(9.0, "cd" * 16)
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally))
    lines = openmetrics(registry).decode().splitlines()
    assert (
        'em_wait_seconds_bucket{le="1.0",model="a"} 2.0 # {trace_id="' + "ab" * 16 + ('"} 0.5')
        in lines
    )
    assert (
        'em_wait_seconds_bucket{le="+Inf",model="a"} 3.0 # {trace_id="' + "cd" * 16 + ('"} 9.0')
        in lines
    )
    assert "trace_id" not in generate_latest(registry).decode()


def test_children_are_bounded() -> None:
    tally = Tally(most_children=3)
    requests = tally.counter(REQUESTS)
    for number in range(10):
        requests.labels(f"m{number}", "200").inc()
    counted = dict(requests.items())
    assert len(counted) == 4
    assert counted[OTHER, OTHER].value == 7
    requests.labels("m0", "200").inc()
    assert counted["m0", "200"].value == 2


def test_a_wrong_number_of_labels_is_refused() -> None:
    requests = Tally().counter(REQUESTS)
    with pytest.raises(ValueError, match=r"em_requests_total has the labels \('model', 'status'\)"):
        requests.labels("a")


def test_a_metric_asked_for_twice_is_one() -> None:
    tally = Tally()
    tally.counter(REQUESTS).labels("a", "200").inc()
    tally.counter(REQUESTS).labels("a", "200").inc()
    assert tally.snapshot().counters == [(REQUESTS.name, ("a", "200"), 2.0)]


def test_a_name_that_is_taken_is_refused() -> None:
    registry = CollectorRegistry()
    Counter(PLAIN.name, PLAIN.help, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(TallyCollector(played([])))
