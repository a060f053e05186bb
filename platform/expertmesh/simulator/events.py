"""A run request by request: arrivals, the real admission and routing, engines, and the fleet."""

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, nan

import numpy as np
from numpy.typing import NDArray

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.engine import Sequence
from expertmesh.simulator.fleet import Change, Fleet, FleetEvent
from expertmesh.simulator.flow import Flow
from expertmesh.simulator.gateway import Gateway, GatewayRules, Place, serves
from expertmesh.simulator.observation import Observer
from expertmesh.simulator.outcome import Outcome, Recorder, served_by_tick
from expertmesh.simulator.policy import PolicyMaker
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.workload import Floats, Requests

_READ_AT_ONCE = 65_536
"""Requests that are turned from columns into numbers at once."""
_PROGRESS_TICKS = 64
_WHOLE = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """What became of each request, in the order of arrival."""

    ttft_s: Floats
    """From the arrival, the wait in the gateway included; not a number when no token came."""
    wait_s: Floats
    """In the gateway, until it was sent for the last time; not a number when it never was."""
    tpot_s: Floats
    """Not a number for answers of one token, and for those that were not finished."""
    end_s: Floats
    """Not a number when it was refused."""
    refused: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    output_tokens: Floats
    """That were delivered."""


@dataclass(frozen=True, slots=True, eq=False)
class EventRun:
    outcome: Outcome
    times: RequestTimes
    cut_by_drains: int
    """Streams that a drain past its deadline ended."""
    cut_by_losses: int
    requeued: int
    """Requests that a lost group had not begun to answer, and that went to the queue again."""
    preemptions: int
    steps: int
    """Of all engines."""


def simulate_events(
    scenario: Scenario,
    requests: Requests,
    make_policy: PolicyMaker,
    *,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """`progress` is told the share that is done, now and then.

    A request attains its targets when its first token comes within `slo.ttft_s` of its arrival,
    the wait in the gateway included, and its further ones on average within `slo.tpot_s` each. What
    is refused or cut attains nothing. After the last arrival the groups that are there serve what
    is left; that time is not paid for.

    Raises ManifestError for a scenario that contradicts itself.
    """
    return run_events(scenario, requests, make_policy, progress=progress).outcome


def run_events(
    scenario: Scenario,
    requests: Requests,
    make_policy: PolicyMaker,
    *,
    rules: GatewayRules | None = None,
    progress: Callable[[float], None] | None = None,
) -> EventRun:
    """As `simulate_events`, with what became of each request."""
    run = _Run(scenario, requests, make_policy, rules or GatewayRules(), progress)
    run.go()
    return run.result()


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        requests: Requests,
        make_policy: PolicyMaker,
        rules: GatewayRules,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._scenario = scenario
        self._requests = requests
        self._policy = make_policy(scenario)
        self._progress = progress
        self._period_s = rules.exchange_period_s
        self._fleet = Fleet(scenario)
        self._fleet_version = -1
        self._gateway = Gateway(scenario, rules)
        self._observer = Observer(scenario, self._gateway)
        self._recorder = Recorder(scenario)
        self._ticks = max(1, math.ceil(requests.span_s / scenario.tick_s - _WHOLE))
        self._end_s = self._ticks * scenario.tick_s
        self._flow = Flow.of(scenario, requests.load(scenario.tick_s))
        self._events: list[tuple[float, int, Place]] = []
        """Heap of the times at which engines have something to do; some are out of date."""
        self._draining: set[str] = set()
        self._tick = 0
        self._exchanges = 1
        self._observed = max(0, math.ceil(scenario.metric_delay_s / scenario.tick_s - _WHOLE))
        """Next tick whose observation is to be made; those before would be older than the run."""
        count = len(requests)
        self._ttft_s = array("d", [nan]) * count
        self._wait_s = array("d", [nan]) * count
        self._tpot_s = array("d", [nan]) * count
        self._ended_s = array("d", [nan]) * count
        self._delivered = array("d", [0.0]) * count
        self._refused = bytearray(count)
        self._cut = bytearray(count)
        self._tenants: dict[int, str] = {}
        self._cut_by_drains = self._cut_by_losses = self._requeued = self._steps = 0
        self._preemptions = 0

    def go(self) -> None:
        events = self._events
        arrivals = _arrivals(self._requests)
        arrival = next(arrivals, None)
        arrival_s = inf if arrival is None else arrival[1]
        timer_s = 0.0
        while True:
            event_s = events[0][0] if events else inf
            if timer_s <= arrival_s and timer_s <= event_s:
                if timer_s == inf:
                    break
                timer_s = self._on_time(timer_s)
            elif event_s <= arrival_s:
                at_s, _, place = heappop(events)
                if place.engine.next_s == at_s:
                    self._step(place, at_s)
            else:
                assert arrival is not None
                self._arrive(*arrival)
                arrival = next(arrivals, None)
                arrival_s = inf if arrival is None else arrival[1]
        for sequence in self._gateway.expire(inf):
            self._refuse(sequence)
        if self._progress is not None:
            self._progress(1.0)

    def result(self) -> EventRun:
        requests, scenario = self._requests, self._scenario
        times = RequestTimes(
            np.array(self._ttft_s),
            np.array(self._wait_s),
            np.array(self._tpot_s),
            np.array(self._ended_s),
            np.frombuffer(self._refused, dtype=np.uint8).astype(bool),
            np.frombuffer(self._cut, dtype=np.uint8).astype(bool),
            np.array(self._delivered),
        )
        served = served_by_tick(
            arrived_at_s=requests.at_s,
            ttft_s=times.ttft_s,
            tpot_s=times.tpot_s,
            refused=times.refused,
            cut=times.cut,
            output_tokens=times.output_tokens,
            slo=scenario.slo,
            tick_s=scenario.tick_s,
            ticks=self._ticks,
        )
        outcome = self._recorder.outcome(
            self._policy.name, "event", self._end_s, self._fleet, served
        )
        preemptions = self._preemptions + sum(
            place.engine.preemptions for place in self._gateway.places.values()
        )
        return EventRun(
            outcome,
            times,
            self._cut_by_drains,
            self._cut_by_losses,
            self._requeued,
            preemptions,
            self._steps,
        )

    # What happens at its own time

    def _on_time(self, now_s: float) -> float:
        """Fleet events, exchanges, observations and decisions; returns when the next is due."""
        fleet, scenario = self._fleet, self._scenario
        ended = now_s >= self._end_s
        for event in fleet.advance(min(now_s, self._end_s)):
            self._on_fleet_event(event)
        if now_s >= self._exchanges * self._period_s:
            self._exchanges += 1
            self._gateway.exchange(now_s)
            for sequence in self._gateway.expire(now_s):
                self._refuse(sequence)
        if not ended and now_s >= self._observation_s():
            self._observer.observe(now_s)
            self._observed += 1
        if not ended and now_s >= self._tick * scenario.tick_s:
            self._decide(now_s)
            self._tick += 1
        self._follow_fleet(now_s)
        self._pump(now_s)
        exchange_s = self._exchanges * self._period_s
        if now_s >= self._end_s:
            busy = self._gateway.queued or any(
                place.engine.in_flight for place in self._gateway.places.values()
            )
            return exchange_s if busy else inf
        return min(
            exchange_s,
            self._tick * scenario.tick_s,
            self._observation_s(),
            self._end_s,
            max(now_s, fleet.next_event_s()),
        )

    def _observation_s(self) -> float:
        return max(0.0, self._observed * self._scenario.tick_s - self._scenario.metric_delay_s)

    def _decide(self, now_s: float) -> None:
        fleet, gateway = self._fleet, self._gateway
        if self._progress is not None and self._tick % _PROGRESS_TICKS == 0:
            self._progress(self._tick / self._ticks)
        self._follow_fleet(now_s)
        fleet.apply(self._policy.decide(self._observer.view(now_s, fleet)), now_s)
        self._recorder.tick(
            now_s,
            fleet,
            loads=tuple(self._flow.loads[self._tick].tolist()),
            queued=gateway.queued,
            in_flight=sum(place.engine.in_flight for place in gateway.places.values()),
            waiting=gateway.oldest_wait_s(now_s) > self._scenario.slo.ttft_s,
        )
        self._follow_fleet(now_s)
        for name in list(self._draining):
            self._release_if_idle(gateway.places[name], now_s)

    def _on_fleet_event(self, event: FleetEvent) -> None:
        place = self._gateway.places.get(event.group)
        if place is None or event.change not in (Change.LOST, Change.DEADLINE):
            return
        by_drain = event.change is Change.DEADLINE
        self._preemptions += place.engine.preemptions
        place.engine.preemptions = 0
        stopped = place.engine.abort(event.at_s)
        self._follow_fleet(event.at_s)
        for sequence in stopped:
            self._gateway.ended(place, sequence, event.at_s)
            if sequence.first_token_at_s < 0.0:
                self._requeued += 1
                if not self._gateway.again(sequence, self._tenant(sequence), event.at_s):
                    self._refuse(sequence)
                continue
            index = sequence.index
            self._cut[index] = 1
            self._ended_s[index] = event.at_s
            self._ttft_s[index] = sequence.first_token_at_s - sequence.arrived_at_s
            self._delivered[index] = sequence.produced_tokens
            if by_drain:
                self._cut_by_drains += 1
            else:
                self._cut_by_losses += 1

    def _follow_fleet(self, now_s: float) -> None:
        fleet = self._fleet
        if fleet.version == self._fleet_version:
            return
        self._fleet_version = fleet.version
        groups = [group for group in fleet.groups if serves(group)]
        self._gateway.use(groups, now_s)
        self._draining = {g.name for g in groups if g.state is GroupState.DRAINING}

    def _release_if_idle(self, place: Place, now_s: float) -> None:
        if place.engine.in_flight == 0 and now_s < self._end_s:
            self._preemptions += place.engine.preemptions
            self._fleet.release(place.name, now_s)
            self._follow_fleet(now_s)

    # Requests

    def _arrive(
        self, index: int, at_s: float, prompt: int, output: int, cached: int, client: int
    ) -> None:
        sequence = Sequence(index, at_s, prompt, output, cached)
        tenant = self._tenants.get(client)
        if tenant is None:
            tenant = self._tenants[client] = str(client)
        place = self._gateway.arrive(sequence, tenant, at_s)
        if place is False:
            self._refuse(sequence)
        elif place is not True:
            self._send(sequence, place, at_s)

    def _send(self, sequence: Sequence, place: Place, now_s: float) -> None:
        if place.engine.submit(sequence, now_s):
            heappush(self._events, (place.engine.next_s, place.number, place))

    def _step(self, place: Place, now_s: float) -> None:
        self._steps += 1
        engine = place.engine
        finished = engine.step()
        if engine.next_s < inf:
            heappush(self._events, (engine.next_s, place.number, place))
        if not finished:
            return
        gateway = self._gateway
        for sequence in finished:
            gateway.finished(place, sequence, now_s)
            index, first_s = sequence.index, sequence.first_token_at_s
            self._ttft_s[index] = first_s - sequence.arrived_at_s
            self._wait_s[index] = sequence.sent_at_s - sequence.arrived_at_s
            self._ended_s[index] = now_s
            output = sequence.output_tokens
            self._delivered[index] = output
            if output > 1:
                self._tpot_s[index] = (now_s - first_s) / (output - 1)
        if gateway.queued:
            self._pump(now_s)
        if self._draining and place.name in self._draining:
            self._release_if_idle(place, now_s)

    def _pump(self, now_s: float) -> None:
        while (ready := self._gateway.next_to_send()) is not None:
            sequence, place = ready
            if place is None:
                self._refuse(sequence)
            else:
                self._send(sequence, place, now_s)

    def _refuse(self, sequence: Sequence) -> None:
        self._refused[sequence.index] = 1

    def _tenant(self, sequence: Sequence) -> str:
        return self._tenants[int(self._requests.client[sequence.index])]


def _arrivals(requests: Requests) -> Iterator[tuple[int, float, int, int, int, int]]:
    for start in range(0, len(requests), _READ_AT_ONCE):
        part = slice(start, start + _READ_AT_ONCE)
        yield from zip(
            range(start, len(requests)),
            requests.at_s[part].tolist(),
            requests.prompt_tokens[part].tolist(),
            requests.output_tokens[part].tolist(),
            requests.cached_tokens[part].tolist(),
            requests.client[part].tolist(),
            strict=False,
        )
