"""The gateways' last reports, when they came, and which fleet each gateway had when it sent one."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from expertmesh.core.domain.traffic import GatewayReport, ModelTraffic
from expertmesh.core.scaling.demand import GatewaySeen


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
        if known is not None and report.sent_at_s < known.report.sent_at_s:
            return
        knew = known.has(report.fleet_version) if known else None
        self._heard[report.gateway] = _Heard(report, now_s, knew, known.told if known else None)
        self._awaited.discard(report.gateway)

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

    def seen(
        self, model: str, groups: Iterable[str], stale_from_s: float
    ) -> tuple[GatewaySeen, ...]:
        """What concerns one model. A recalled gateway counts as heard before `stale_from_s`."""
        names = set(groups)
        live = [
            _seen(name, heard, heard.report.models.get(model, ModelTraffic()), names)
            for name, heard in self._heard.items()
        ]
        recalled = [
            replace(seen, heard_at_s=min(seen.heard_at_s, stale_from_s))
            for name, seen in self._recalled.get(model, {}).items()
            if name in self._awaited
        ]
        return tuple(sorted(live + recalled, key=lambda seen: seen.gateway))


def _seen(name: str, heard: _Heard, traffic: ModelTraffic, groups: set[str]) -> GatewaySeen:
    return GatewaySeen(
        gateway=name,
        heard_at_s=heard.at_s,
        knows_s=heard.knew.as_of_s if heard.knew else None,
        queued=traffic.queued_requests,
        waking=traffic.wake_requests,
        oldest_wait_s=traffic.oldest_wait_s,
        in_flight={
            group: counts.in_flight
            for group, counts in sorted(heard.report.groups.items())
            if group in groups and counts.in_flight
        },
    )
