"""Counts on the hot path, cheap enough for every request, that add up over several workers.

A child (one metric with one set of label values) is looked up once and kept by its caller. The text
that is exported is prometheus_client's, made of the families that `exposition` returns.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate
from typing import Generic, TypeVar

import msgspec
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Exposed
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from expertmesh.telemetry.metrics import Metric

OTHER = "(other)"
"""Value of all labels of what comes after a metric has its most children."""
MOST_CHILDREN = 2000


class CounterChild:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class GaugeChild:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class HistogramChild:
    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket alone; the last is for what lies beyond all bounds."""
        self.sum = 0.0
        self.exemplars: dict[int, tuple[str, float]] = {}

    def observe(self, value: float, trace_id: str = "") -> None:
        """With a `trace_id` (32 hex digits) the value is the example of its bucket."""
        index = bisect_left(self.bounds, value)
        self.counts[index] += 1
        self.sum += value
        if trace_id:
            self.exemplars[index] = (trace_id, value)


Child = TypeVar("Child", CounterChild, GaugeChild, HistogramChild)


class Family(Generic[Child]):
    """A metric with its children."""

    def __init__(self, metric: Metric, new: Callable[[], Child], most_children: int) -> None:
        self.metric = metric
        self._new: Callable[[], Child] = new
        self._most_children = most_children
        self._children: dict[tuple[str, ...], Child] = {}
        if not metric.labels:
            self.labels()

    def labels(self, *values: str) -> Child:
        """Values that a client can choose without end must not come here; there is a limit, after
        which all share one child."""
        child = self._children.get(values)
        return self._add(values) if child is None else child

    def clear(self) -> None:
        """Forgets all children, for gauges that are set anew; children kept by callers are lost."""
        self._children.clear()

    def keep(self, label: str, values: Collection[str]) -> None:
        """Forgets the children with another value of the label."""
        place = self.metric.labels.index(label)
        for labels in [each for each in self._children if each[place] not in values]:
            del self._children[labels]

    def drop(self, label: str, value: str) -> None:
        """Forgets the children with that value of the label."""
        place = self.metric.labels.index(label)
        for labels in [each for each in self._children if each[place] == value]:
            del self._children[labels]

    def items(self) -> Iterator[tuple[tuple[str, ...], Child]]:
        return iter(self._children.items())

    def _add(self, values: tuple[str, ...]) -> Child:
        if len(values) != len(self.metric.labels):
            raise ValueError(
                f"{self.metric.name} has the labels {self.metric.labels}, not {values}"
            )
        if len(self._children) >= self._most_children:
            values = (OTHER,) * len(values)
        return self._children.setdefault(values, self._new())


Labels = tuple[str, ...]


class HistogramState(msgspec.Struct, array_like=True):
    bounds: tuple[float, ...]
    counts: list[int]
    sum: float
    exemplars: dict[int, tuple[str, float]]


class Snapshot(msgspec.Struct, array_like=True):
    """All values at one moment: of a worker, or the sums of several."""

    counters: list[tuple[str, Labels, float]]
    gauges: list[tuple[str, Labels, float]]
    histograms: list[tuple[str, Labels, HistogramState]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Snapshot).decode


def encode(snapshot: Snapshot) -> bytes:
    return _encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Raises msgspec.MsgspecError when it is none, or of another version."""
    return _decode(data)


class Tally:
    """All metrics of one worker, used by one thread."""

    def __init__(self, most_children: int = MOST_CHILDREN) -> None:
        self._most_children = most_children
        self._counters: dict[str, Family[CounterChild]] = {}
        self._gauges: dict[str, Family[GaugeChild]] = {}
        self._histograms: dict[str, Family[HistogramChild]] = {}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            *(family.metric for family in self._counters.values()),
            *(family.metric for family in self._gauges.values()),
            *(family.metric for family in self._histograms.values()),
        )

    def counter(self, metric: Metric) -> Family[CounterChild]:
        family = Family(metric, CounterChild, self._most_children)
        return self._counters.setdefault(metric.name, family)

    def gauge(self, metric: Metric) -> Family[GaugeChild]:
        family = Family(metric, GaugeChild, self._most_children)
        return self._gauges.setdefault(metric.name, family)

    def histogram(self, metric: Metric) -> Family[HistogramChild]:
        family = Family(metric, lambda: HistogramChild(metric.buckets), self._most_children)
        return self._histograms.setdefault(metric.name, family)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            [
                (name, labels, child.value)
                for name, family in self._counters.items()
                for labels, child in family.items()
            ],
            [
                (name, labels, child.value)
                for name, family in self._gauges.items()
                for labels, child in family.items()
            ],
            [
                (
                    name,
                    labels,
                    HistogramState(
                        child.bounds, list(child.counts), child.sum, dict(child.exemplars)
                    ),
                )
                for name, family in self._histograms.items()
                for labels, child in family.items()
            ],
        )


def merge(snapshots: Iterable[Snapshot], metrics: Iterable[Metric]) -> Snapshot:
    """Sums; of gauges that say so, the maximum. What `metrics` does not name is left out.

    A histogram with other bounds than its metric has, as an older release wrote it, is left out.
    """
    known = {metric.name: metric for metric in metrics}
    counters: dict[tuple[str, Labels], float] = {}
    gauges: dict[tuple[str, Labels], float] = {}
    histograms: dict[tuple[str, Labels], HistogramState] = {}
    for snapshot in snapshots:
        for name, labels, value in snapshot.counters:
            if _fits(known.get(name), labels):
                counters[name, labels] = counters.get((name, labels), 0.0) + value
        for name, labels, value in snapshot.gauges:
            metric = known.get(name)
            if metric is not None and _fits(metric, labels):
                sum_up = sum if metric.merge == "sum" else max
                gauges[name, labels] = sum_up((gauges.get((name, labels), 0.0), value))
        for name, labels, state in snapshot.histograms:
            metric = known.get(name)
            if metric is None or not _fits(metric, labels) or state.bounds != metric.buckets:
                continue
            total = histograms.get((name, labels))
            if total is None:
                total = HistogramState(state.bounds, [0] * len(state.counts), 0.0, {})
                histograms[name, labels] = total
            total.counts = [a + b for a, b in zip(total.counts, state.counts, strict=True)]
            total.sum += state.sum
            total.exemplars.update(state.exemplars)
    return Snapshot(
        [(name, labels, value) for (name, labels), value in counters.items()],
        [(name, labels, value) for (name, labels), value in gauges.items()],
        [(name, labels, state) for (name, labels), state in histograms.items()],
    )


def lasting(snapshot: Snapshot) -> Snapshot:
    """What still counts when its worker has ended: no gauges, and no examples."""
    return Snapshot(
        snapshot.counters,
        [],
        [
            (name, labels, HistogramState(state.bounds, state.counts, state.sum, {}))
            for name, labels, state in snapshot.histograms
        ],
    )


def exposition(snapshot: Snapshot, metrics: Iterable[Metric]) -> list[Exposed]:
    """All of `metrics`, those without a value too."""
    counters: dict[str, CounterMetricFamily] = {}
    gauges: dict[str, GaugeMetricFamily] = {}
    histograms: dict[str, HistogramMetricFamily] = {}
    for metric in metrics:
        if metric.kind == "counter":
            counters[metric.name] = CounterMetricFamily(
                metric.name, metric.help, labels=metric.labels
            )
        elif metric.kind == "gauge":
            gauges[metric.name] = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        else:
            histograms[metric.name] = HistogramMetricFamily(
                metric.name, metric.help, labels=metric.labels
            )
    for name, values, value in snapshot.counters:
        counters[name].add_metric(values, value)
    for name, values, value in snapshot.gauges:
        gauges[name].add_metric(values, value)
    for name, values, state in snapshot.histograms:
        bounds = [_go_text(bound) for bound in (*state.bounds, float("inf"))]
        buckets = [
            (bound, float(count), _exemplar(state.exemplars.get(index)))
            for index, (bound, count) in enumerate(
                zip(bounds, accumulate(state.counts), strict=True)
            )
        ]
        histograms[name].add_metric(values, buckets, state.sum)  # type: ignore[arg-type]
    return [*counters.values(), *gauges.values(), *histograms.values()]


def _go_text(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


def _exemplar(example: tuple[str, float] | None) -> Exemplar | None:
    return None if example is None else Exemplar({"trace_id": example[0]}, example[1])


def _fits(metric: Metric | None, labels: Labels) -> bool:
    return metric is not None and len(metric.labels) == len(labels)
