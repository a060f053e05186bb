"""The controller's own metrics, set after every turn of its loop."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from expertmesh.core.domain.fleet import GroupState, RankInfo
from expertmesh.core.scaling.contract import Decision, GroupRecord, ModelState
from expertmesh.telemetry import metrics as names
from expertmesh.telemetry.metrics import Metric

_SECONDS_PER_HOUR = 3600.0


class ControllerMetrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._groups = self._gauge(names.CONTROLLER_GROUPS)
        self._desired = self._gauge(names.CONTROLLER_DESIRED_GROUPS)
        self._demand = self._gauge(names.CONTROLLER_DEMAND)
        self._spend_rate = self._gauge(names.CONTROLLER_SPEND_RATE)
        self._report_age = self._gauge(names.CONTROLLER_REPORT_AGE)
        self._decisions = self._counter(names.CONTROLLER_DECISIONS)
        self._spend = self._counter(names.CONTROLLER_SPEND)
        self._expert_tokens = self._counter(names.EXPERT_TOKENS)
        self._expert_tokens_seen: dict[tuple[str, int], Mapping[str, int]] = {}
        self._loop = self._histogram(names.CONTROLLER_LOOP_DURATION)
        self._start = self._histogram(names.CONTROLLER_START_DURATION)
        self._spent_at_s: float | None = None

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def decided(self, decision: Decision, before: ModelState) -> None:
        for action in decision.actions:
            self._decisions.labels(decision.model, action.kind.value).inc()
        self._desired.labels(decision.model).set(decision.state.wanted)
        self._demand.labels(decision.model).set(decision.demand.work)
        known = {record.spec.name: record for record in before.groups}
        for step in decision.transitions:
            record = known.get(step.group)
            if (
                step.before is GroupState.STARTING
                and step.after is GroupState.READY
                and record is not None
                and not record.served
                and not record.adopted
            ):
                after = next(r for r in decision.state.groups if r.spec.name == step.group)
                took_s = after.since_s - record.requested_at_s
                self._start.labels(decision.model, step.pool).observe(took_s)

    def turned(
        self,
        states: Mapping[str, ModelState],
        report_ages_s: Mapping[str, float],
        now_s: float,
        duration_s: float,
    ) -> None:
        records = [record for state in states.values() for record in state.groups]
        self._count_groups(records)
        self._count_spend(records, now_s)
        self._report_age.clear()
        for gateway, age_s in report_ages_s.items():
            self._report_age.labels(gateway).set(age_s)
        self._loop.observe(duration_s)

    def saw_ranks(self, ranks: Iterable[RankInfo | None]) -> None:
        """Adds what each expert got since the last look; a rank that restarted counts from zero."""
        seen = {}
        for info in ranks:
            if info is None:
                continue
            key = (info.group, info.rank)
            seen[key] = info.expert_tokens
            before = self._expert_tokens_seen.get(key, {})
            restarted = any(
                tokens < before.get(expert, 0) for expert, tokens in info.expert_tokens.items()
            )
            for expert, tokens in info.expert_tokens.items():
                new = tokens - (0 if restarted else before.get(expert, 0))
                self._expert_tokens.labels(info.model, info.group, expert).inc(new)
        self._expert_tokens_seen |= seen

    def _count_groups(self, records: list[GroupRecord]) -> None:
        tally = Tally((r.spec.model, r.spec.pool, r.state.value) for r in records)
        self._groups.clear()
        for labels, count in tally.items():
            self._groups.labels(*labels).set(count)

    def _count_spend(self, records: list[GroupRecord], now_s: float) -> None:
        passed_s = max(0.0, now_s - self._spent_at_s) if self._spent_at_s is not None else 0.0
        self._spent_at_s = now_s
        self._spend_rate.clear()
        for record in records:
            spec = record.spec
            self._spend_rate.labels(spec.model, spec.pool).inc(spec.usd_per_hour)
            self._spend.labels(spec.model, spec.pool).inc(
                spec.usd_per_hour * passed_s / _SECONDS_PER_HOUR
            )

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(
            metric.name,
            metric.help,
            metric.labels,
            buckets=metric.buckets,
            registry=self._registry,
        )
