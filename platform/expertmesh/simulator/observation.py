"""What a policy sees of a run request by request: as old as metrics are."""

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

from expertmesh.simulator.fleet import Fleet, Measured
from expertmesh.simulator.gateway import Gateway, GatewayCounts, Place
from expertmesh.simulator.policy import View
from expertmesh.simulator.scenario import Scenario


class _Totals(NamedTuple):
    """Of one group, since it became ready."""

    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    finished: int = 0
    ttft_s_sum: float = 0.0
    tpot_s_sum: float = 0.0
    tpot_count: int = 0


_NONE = _Totals()


@dataclass(frozen=True, slots=True)
class _Seen:
    at_s: float
    measured: dict[str, Measured]
    queued: int
    queued_prompt_tokens: int
    oldest_wait_s: float
    arrivals_per_s: float
    arrived_prompt_tokens_per_s: float
    finished_per_s: float
    finished_prompt_tokens: float
    finished_output_tokens: float


class Observer:
    """Observe once a tick, `metric_delay_s` before it; the view at the tick shows that."""

    def __init__(self, scenario: Scenario, gateway: Gateway) -> None:
        self._scenario = scenario
        self._gateway = gateway
        self._seen: deque[_Seen] = deque()
        self._totals: dict[str, _Totals] = {}
        self._counts = GatewayCounts()
        self._since_s = 0.0

    def observe(self, now_s: float) -> None:
        gateway, window_s = self._gateway, max(now_s - self._since_s, 1e-9)
        totals = {name: _totals(place, now_s) for name, place in gateway.places.items()}
        measured = {
            name: _measured(place, self._totals.get(name, _NONE), totals[name], now_s, window_s)
            for name, place in gateway.places.items()
        }
        counts, before = gateway.counts, self._counts
        finished = counts.finished - before.finished
        self._seen.append(
            _Seen(
                now_s,
                measured,
                gateway.queued,
                counts.queued_prompt_tokens,
                gateway.oldest_wait_s(now_s),
                (counts.arrivals - before.arrivals) / window_s,
                (counts.arrived_prompt_tokens - before.arrived_prompt_tokens) / window_s,
                finished / window_s,
                (counts.finished_prompt_tokens - before.finished_prompt_tokens) / max(1, finished),
                (counts.finished_output_tokens - before.finished_output_tokens) / max(1, finished),
            )
        )
        self._totals, self._counts, self._since_s = totals, replace(counts), now_s

    def view(self, now_s: float, fleet: Fleet) -> View:
        """The groups and the room are those of now, their work and the traffic are older."""
        seen_by_s = now_s - self._scenario.metric_delay_s + 1e-6
        while len(self._seen) > 1 and self._seen[1].at_s <= seen_by_s:
            self._seen.popleft()
        seen = self._seen[0] if self._seen and self._seen[0].at_s <= seen_by_s else None
        view = View(
            now_s=now_s,
            window_s=self._scenario.tick_s,
            groups=fleet.views(now_s, seen.measured if seen is not None else {}),
            room=fleet.room(now_s),
            notices=fleet.notices(),
        )
        if seen is None:
            return view
        return replace(
            view,
            queued=float(seen.queued),
            queued_prompt_tokens=float(seen.queued_prompt_tokens),
            oldest_wait_s=seen.oldest_wait_s,
            arrivals_per_s=seen.arrivals_per_s,
            arrived_prompt_tokens_per_s=seen.arrived_prompt_tokens_per_s,
            finished_per_s=seen.finished_per_s,
            finished_prompt_tokens=seen.finished_prompt_tokens,
            finished_output_tokens=seen.finished_output_tokens,
        )


def _totals(place: Place, now_s: float) -> _Totals:
    return _Totals(
        *place.engine.progress(now_s),
        place.finished,
        place.ttft_s_sum,
        place.tpot_s_sum,
        place.tpot_count,
    )


def _measured(
    place: Place, before: _Totals, after: _Totals, now_s: float, window_s: float
) -> Measured:
    finished = after.finished - before.finished
    several = after.tpot_count - before.tpot_count
    return Measured(
        place.engine.in_flight,
        place.engine.waiting,
        place.engine.kv_usage(now_s),
        (after.prompt_tokens - before.prompt_tokens) / window_s,
        (after.output_tokens - before.output_tokens) / window_s,
        (after.ttft_s_sum - before.ttft_s_sum) / finished if finished else None,
        (after.tpot_s_sum - before.tpot_s_sum) / several if several else None,
    )
