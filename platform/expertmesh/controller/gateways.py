"""The gateways' last reports, when they came, and which fleet each gateway had when it sent one."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from expertmesh.controller.recent import Recent, rate
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.demand import Flow, GatewaySeen

_NO_TRAFFIC = ModelTraffic()
_NO_GROUP_TRAFFIC = GroupTraffic()


@dataclass(frozen=True, slots=True)
class Latency:
    """Means over the answers of a group that gateways saw lately; None when there were none."""

    ttft_s: float | None = None
    """From asking a rank to the first token."""
    tpot_s: float | None = None


NO_LATENCY = Latency()


@dataclass(frozen=True, slots=True)
class _Fleet:
    version: int
    as_of_s: float


@dataclass(frozen=True, slots=True)
class _Heard:
    report: GatewayReport
    at_s: float
    knew: _Fleet | None
    """The fleet that the gateway had when it sent the report."""
    told: _Fleet | None
    """The fleet in the last answer to it."""
    recent: Recent[GatewayReport] = field(default_factory=Recent)

    def has(self, version: int) -> _Fleet | None:
        """An answer may be lost on the way: what counts is the version that the gateway names."""
        if version == 0:
            return self.told
        return next((f for f in (self.told, self.knew) if f and f.version == version), None)


class GatewayBook:
    def __init__(self, forget_s: float) -> None:
        self._forget_s = forget_s
        self._heard: dict[str, _Heard] = {}
        self._awaited: set[str] = set()
        self._recalled: dict[str, dict[str, GatewaySeen]] = {}
        """By model, then gateway: what an earlier controller recorded of an awaited gateway."""

    def receive(self, report: GatewayReport, now_s: float) -> None:
        """A report that was overtaken by a later one of the same gateway changes nothing."""
        known = self._heard.get(report.gateway)
        self._awaited.discard(report.gateway)
        if known is None:
            self._heard[report.gateway] = heard = _Heard(report, now_s, None, None)
        elif _is_overtaken(report, known.report):
            return
        else:
            knew = known.has(report.fleet_version)
            heard = replace(known, report=report, at_s=now_s, knew=knew)
            self._heard[report.gateway] = heard
            if _began_anew(report, known.report):
                heard.recent.clear()
        heard.recent.add(now_s, report)

    def told(self, gateway: str, version: int, as_of_s: float) -> None:
        known = self._heard.get(gateway)
        if known is not None:
            self._heard[gateway] = replace(known, told=_Fleet(version, as_of_s))

    def recall(self, model: str, gateways: Iterable[GatewaySeen], now_s: float) -> None:
        """Expect the gateways that an earlier controller knew; until they report, they are silent
        ones with their last value."""
        seen = {
            gateway.gateway: replace(gateway, heard_at_s=now_s, knows_s=None)
            for gateway in gateways
            if gateway.gateway not in self._heard
        }
        self._recalled[model] = seen
        self._awaited.update(seen)

    def forget_silent(self, now_s: float) -> None:
        self._heard = {
            name: heard
            for name, heard in self._heard.items()
            if now_s - heard.at_s <= self._forget_s
        }
        for model, gateways in self._recalled.items():
            self._recalled[model] = {
                name: seen
                for name, seen in gateways.items()
                if name in self._awaited and now_s - seen.heard_at_s <= self._forget_s
            }
        self._awaited = {name for seen in self._recalled.values() for name in seen}

    @property
    def awaited(self) -> frozenset[str]:
        return frozenset(self._awaited)

    def ages_s(self, now_s: float) -> dict[str, float]:
        return {name: now_s - heard.at_s for name, heard in self._heard.items()}

    def in_flight(self, heard_from_s: float) -> dict[str, int]:
        """By group, over the gateways that have reported since then."""
        sums: dict[str, int] = {}
        for heard in self._heard.values():
            if heard.at_s >= heard_from_s:
                for group, counts in heard.report.groups.items():
                    sums[group] = sums.get(group, 0) + counts.in_flight
        return sums

    def latencies(self, heard_from_s: float) -> dict[str, Latency]:
        """By group, over the gateways that have reported since then."""
        sums: dict[str, GroupTraffic] = {}
        for heard in self._heard.values():
            span = heard.recent.span() if heard.at_s >= heard_from_s else None
            if span is None:
                continue
            _, first, last = span
            for group, counts in last.groups.items():
                before = first.groups.get(group, _NO_GROUP_TRAFFIC)
                known = sums.get(group, _NO_GROUP_TRAFFIC)
                sums[group] = GroupTraffic(
                    ttft_s_sum=known.ttft_s_sum + counts.ttft_s_sum - before.ttft_s_sum,
                    ttft_count=known.ttft_count + counts.ttft_count - before.ttft_count,
                    tpot_s_sum=known.tpot_s_sum + counts.tpot_s_sum - before.tpot_s_sum,
                    tpot_count=known.tpot_count + counts.tpot_count - before.tpot_count,
                )
        return {
            group: Latency(
                ttft_s=_mean(total.ttft_s_sum, total.ttft_count),
                tpot_s=_mean(total.tpot_s_sum, total.tpot_count),
            )
            for group, total in sums.items()
        }

    def seen(
        self, model: str, groups: Iterable[str], stale_from_s: float
    ) -> tuple[GatewaySeen, ...]:
        """What concerns one model. A recalled gateway counts as heard before `stale_from_s`."""
        names = sorted(set(groups))
        live = [_seen(name, heard, model, names) for name, heard in self._heard.items()]
        recalled = [
            replace(seen, heard_at_s=min(seen.heard_at_s, stale_from_s))
            for name, seen in self._recalled.get(model, {}).items()
            if name in self._awaited
        ]
        return tuple(sorted(live + recalled, key=lambda seen: seen.gateway))


def _is_overtaken(report: GatewayReport, known: GatewayReport) -> bool:
    """A worker's clock may jump back, so its time alone does not tell; nor does its count of
    reports, which begins again with the worker."""
    return report.sent_at_s < known.sent_at_s and report.number <= known.number


def _began_anew(report: GatewayReport, known: GatewayReport) -> bool:
    return any(
        report.models.get(model, _NO_TRAFFIC).arrivals_total < traffic.arrivals_total
        for model, traffic in known.models.items()
    )


def _mean(total: float, count: int) -> float | None:
    return round(total / count, 6) if count > 0 and total >= 0.0 else None


def _flow(recent: Recent[GatewayReport], model: str) -> Flow | None:
    span = recent.span()
    if span is None:
        return None
    span_s, first, last = span
    # A model that a report does not have had no requests so far.
    before = first.models.get(model, _NO_TRAFFIC)
    after = last.models.get(model, _NO_TRAFFIC)
    return Flow(
        span_s=round(span_s, 3),
        arrivals_per_s=rate(before.arrivals_total, after.arrivals_total, span_s),
        arrived_prompt_tokens_per_s=rate(
            before.arrived_prompt_tokens_total, after.arrived_prompt_tokens_total, span_s
        ),
        finished_per_s=rate(before.finished_total, after.finished_total, span_s),
        uncached_prompt_tokens_per_s=rate(
            before.uncached_prompt_tokens_total, after.uncached_prompt_tokens_total, span_s
        ),
        output_tokens_per_s=rate(before.output_tokens_total, after.output_tokens_total, span_s),
        external_per_s=rate(before.external_requests_total, after.external_requests_total, span_s),
        external_prompt_tokens_per_s=rate(
            before.external_prompt_tokens_total, after.external_prompt_tokens_total, span_s
        ),
        external_output_tokens_per_s=rate(
            before.external_output_tokens_total, after.external_output_tokens_total, span_s
        ),
    )


def _seen(name: str, heard: _Heard, model: str, groups: list[str]) -> GatewaySeen:
    counts = heard.report.groups
    traffic = heard.report.models.get(model, _NO_TRAFFIC)
    return GatewaySeen(
        gateway=name,
        heard_at_s=heard.at_s,
        knows_s=heard.knew.as_of_s if heard.knew else None,
        queued=traffic.queued_requests,
        queued_prompt_tokens=traffic.queued_prompt_tokens,
        waking=traffic.wake_requests,
        oldest_wait_s=traffic.oldest_wait_s,
        flow=_flow(heard.recent, model),
        in_flight={
            group: counts[group].in_flight
            for group in groups
            if group in counts and counts[group].in_flight
        },
    )
