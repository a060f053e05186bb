"""The gateway's metrics in a registry of their own, given by the caller."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from expertmesh.telemetry import metrics as names
from expertmesh.telemetry.metrics import Metric


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = _counter(names.GATEWAY_REQUESTS, registry)
        self.retries = _counter(names.GATEWAY_RETRIES, registry)
        self.tokens = _counter(names.GATEWAY_TOKENS, registry)
        self.revenue_usd = _counter(names.GATEWAY_REVENUE, registry)
        self.ttft = _histogram(names.GATEWAY_TTFT, registry)
        self.tpot = _histogram(names.GATEWAY_TPOT, registry)
        self.duration = _histogram(names.GATEWAY_DURATION, registry)
        self.queue_wait = _histogram(names.GATEWAY_QUEUE_WAIT, registry)
        self.queued = _gauge(names.GATEWAY_QUEUED, registry)
        self.in_flight = _gauge(names.GATEWAY_IN_FLIGHT, registry)


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(
        metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
    )
