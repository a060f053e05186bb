"""The gateway's metrics, tallied in this process and exported through a registry."""

import asyncio
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry

from expertmesh.telemetry import metrics as names
from expertmesh.telemetry.shared_tally import TallyCollector, TallyFolder
from expertmesh.telemetry.tally import CounterChild, Tally
from expertmesh.telemetry.text import OPENMETRICS_TYPE, PLAIN_TYPE, TextWriter

if TYPE_CHECKING:
    from expertmesh.gateway.access_log import AccessLog
    from expertmesh.gateway.admission import Admission
    from expertmesh.gateway.fleet_view import FleetView
    from expertmesh.gateway.relay import Relay
    from expertmesh.gateway.usage_writer import UsageWriter

_WRITE_PERIOD_S: Final = 1.0
_OPENMETRICS: Final = b"application/openmetrics-text"


class GatewayMetrics:
    """`labels(…)` of each metric finds a child; keep it where requests pass."""

    def __init__(self, registry: CollectorRegistry, folder: TallyFolder | None = None) -> None:
        """`folder` is shared by the workers behind one port: each then exports the sums of all."""
        self.registry: Final = registry
        tally = Tally()
        self._collector = TallyCollector(tally, folder)
        self._writer: Final = TextWriter()
        self._requests: dict[tuple[str, str, int], CounterChild] = {}
        self._served: dict[tuple[str, str], ServedMetrics] = {}
        self._tenants: dict[str, TenantMetrics] = {}
        self._slo: dict[tuple[str, str], CounterChild] = {}
        # Answers
        self.requests: Final = tally.counter(names.GATEWAY_REQUESTS)
        self.ttft: Final = tally.histogram(names.GATEWAY_TTFT)
        self.tpot: Final = tally.histogram(names.GATEWAY_TPOT)
        self.duration: Final = tally.histogram(names.GATEWAY_DURATION)
        self.slo_requests: Final = tally.counter(names.GATEWAY_SLO)
        # Queue
        self.queue_wait: Final = tally.histogram(names.GATEWAY_QUEUE_WAIT)
        self.queued: Final = tally.gauge(names.GATEWAY_QUEUED)
        self.queued_tokens: Final = tally.gauge(names.GATEWAY_QUEUED_TOKENS)
        self.held_streams: Final = tally.gauge(names.GATEWAY_HELD_STREAMS)
        self.open_requests: Final = tally.gauge(names.GATEWAY_OPEN)
        # Refusals
        self.rejections: Final = tally.counter(names.GATEWAY_REJECTIONS)
        self.limit_refusals: Final = tally.counter(names.GATEWAY_LIMIT_REFUSALS)
        self.client_aborts: Final = tally.counter(names.GATEWAY_CLIENT_ABORTS)
        # Upstream
        self.in_flight: Final = tally.gauge(names.GATEWAY_IN_FLIGHT)
        self.retries: Final = tally.counter(names.GATEWAY_RETRIES)
        self.external_requests: Final = tally.counter(names.GATEWAY_EXTERNAL_REQUESTS)
        self.ejected_ranks: Final = tally.gauge(names.GATEWAY_EJECTED_RANKS)
        self.upstream_connections: Final = tally.gauge(names.GATEWAY_UPSTREAM_CONNECTIONS)
        # Usage
        self.tokens: Final = tally.counter(names.GATEWAY_TOKENS)
        self.revenue_usd: Final = tally.counter(names.GATEWAY_REVENUE)
        self.tenant_requests: Final = tally.counter(names.GATEWAY_TENANT_REQUESTS)
        self.tenant_tokens: Final = tally.counter(names.GATEWAY_TENANT_TOKENS)
        self.tenant_revenue_usd: Final = tally.counter(names.GATEWAY_TENANT_REVENUE)
        self.fleet_age: Final = tally.gauge(names.GATEWAY_FLEET_AGE).labels()
        self.usage_pending: Final = tally.gauge(names.GATEWAY_USAGE_PENDING).labels()
        self.usage_given_up: Final = tally.counter(names.GATEWAY_USAGE_GIVEN_UP).labels()
        self.access_log_dropped: Final = tally.counter(names.GATEWAY_ACCESS_LOG_DROPPED).labels()
        registry.register(self._collector)

    # Called for requests.

    def answered(self, model: str, endpoint: str, status: int) -> None:
        key = (model, endpoint, status)
        child = self._requests.get(key)
        if child is None:
            child = self._requests[key] = self.requests.labels(model, endpoint, str(status))
        child.value += 1

    def refused(self, endpoint: str, status: int) -> None:
        """Before its model was known."""
        self.answered("", endpoint, status)

    def served(self, model: str, pool: str) -> "ServedMetrics":
        """What an answer of the model from the pool adds to."""
        served = self._served.get((model, pool))
        if served is None:
            served = self._served[model, pool] = ServedMetrics(self, model, pool)
        return served

    def tenant(self, name: str) -> "TenantMetrics":
        """What the usage of the tenant adds to."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = TenantMetrics(self, name)
        return tenant

    def judged(self, model: str, result: str) -> None:
        """By the model's latency targets: met, slow_start, slow_tokens, failed."""
        key = (model, result)
        child = self._slo.get(key)
        if child is None:
            child = self._slo[key] = self.slo_requests.labels(model, result)
        child.value += 1

    def waited(self, model: str, priority: str, wait_s: float) -> None:
        self.queue_wait.labels(model, priority).observe(wait_s)

    def rejected(self, model: str, reason: str) -> None:
        """For want of room or capacity."""
        self.rejections.labels(model, reason).inc()

    def limited(self, model: str, kind: str) -> None:
        """By a limit of the tenant or the key."""
        self.limit_refusals.labels(model, kind).inc()

    def retried(self, model: str, reason: str = "") -> None:
        self.retries.labels(model, reason).inc()

    def aborted(self, model: str) -> None:
        """The client went away."""
        self.client_aborts.labels(model).inc()

    def sent_out(self, model: str, pool: str) -> None:
        """To an external provider."""
        self.external_requests.labels(model, pool).inc()

    # Called for exposition.

    def show(
        self,
        view: "FleetView",
        admission: "Admission",
        relay: "Relay",
        writer: "UsageWriter",
        access_log: "AccessLog",
    ) -> None:
        """Sets the metrics that these keep themselves."""
        self.in_flight.clear()
        for name, group in view.groups.items():
            self.in_flight.labels(group.model, name, group.pool).set(group.in_flight)
        self.queued.clear()
        self.queued_tokens.clear()
        self.held_streams.clear()
        self.ejected_ranks.clear()
        held = relay.held_streams()
        for model in {*view.names, *held}:
            self.held_streams.labels(model).set(held.get(model, 0))
        for model, count in view.ejected_ranks().items():
            self.ejected_ranks.labels(model).set(count)
        for model in view.names:
            self.queued.labels(model).set(admission.queued(model))
            self.queued_tokens.labels(model).set(admission.queued_tokens(model))
        self.open_requests.labels().set(relay.open_calls)
        self.upstream_connections.labels("idle").set(relay.pool.idle_connections)
        busy = sum(group.in_flight for group in view.groups.values())
        self.upstream_connections.labels("busy").set(busy)
        self.fleet_age.set(view.age_s)
        self.usage_pending.set(writer.pending)
        self.usage_given_up.value = writer.given_up
        self.access_log_dropped.value = access_log.dropped

    def watch(
        self,
        view: "FleetView",
        admission: "Admission",
        relay: "Relay",
        writer: "UsageWriter",
        access_log: "AccessLog",
    ) -> None:
        """From now on, `show` these whenever values are read or written for the other workers."""
        self._collector.refresh = lambda: self.show(view, admission, relay, writer, access_log)

    async def run(self) -> None:
        """Keeps the other workers behind the port informed."""
        while True:
            self._collector.write()
            await asyncio.sleep(_WRITE_PERIOD_S)

    def close(self) -> None:
        """Leaves the last counts to the other workers."""
        self._collector.close()

    def exposition(self, accept: bytes) -> tuple[bytes, bytes]:
        """Content type and text: OpenMetrics, with examples, for a client that accepts it."""
        snapshot, metrics = self._collector.read()
        if _OPENMETRICS in accept:
            return OPENMETRICS_TYPE.encode(), self._writer.openmetrics(snapshot, metrics)
        return PLAIN_TYPE.encode(), self._writer.plain(snapshot, metrics)


class ServedMetrics:
    """The children for one model on one pool."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "duration",
        "prompt_tokens",
        "revenue_usd",
        "tpot",
        "ttft",
    )

    def __init__(self, metrics: GatewayMetrics, model: str, pool: str) -> None:
        self.duration = metrics.duration.labels(model, pool)
        self.ttft = metrics.ttft.labels(model, pool)
        self.tpot = metrics.tpot.labels(model, pool)
        self.prompt_tokens = metrics.tokens.labels(model, pool, "in")
        """Without those from the cache."""
        self.cached_tokens = metrics.tokens.labels(model, pool, "cached")
        self.completion_tokens = metrics.tokens.labels(model, pool, "out")
        self.revenue_usd = metrics.revenue_usd.labels(model, pool)


class TenantMetrics:
    """The children for one tenant; operators make tenants, so there are not too many."""

    __slots__ = ("cached_tokens", "completion_tokens", "prompt_tokens", "requests", "revenue_usd")

    def __init__(self, metrics: GatewayMetrics, tenant: str) -> None:
        self.requests = metrics.tenant_requests.labels(tenant)
        self.prompt_tokens = metrics.tenant_tokens.labels(tenant, "in")
        """Without those from the cache."""
        self.cached_tokens = metrics.tenant_tokens.labels(tenant, "cached")
        self.completion_tokens = metrics.tenant_tokens.labels(tenant, "out")
        self.revenue_usd = metrics.tenant_revenue_usd.labels(tenant)
