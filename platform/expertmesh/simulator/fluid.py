"""A day in seconds: requests as a fluid, served by groups that hold a limited number at once.

Each tick, what waits enters the groups that are ready, as far as the gateway's limit of requests at
once, the cache and the speed of prefill allow; what is in a group leaves it at the speed of its
iterations. Lengths are taken as memoryless around their mean, so a group that drains empties like a
real one: fast at first, and with a tail. The wait of every part of the fluid is followed exactly,
first come first served. Times per token scatter around their mean as the prompts do that come
between.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.fleet import Change, Fleet, Measured
from expertmesh.simulator.flow import Flow
from expertmesh.simulator.late_counts import LateCounts
from expertmesh.simulator.outcome import Outcome, Recorder, Served
from expertmesh.simulator.policy import PolicyMaker, View
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.slo_rates import KV_SHARE, produced_tokens
from expertmesh.simulator.workload import Load

Floats = NDArray[np.float64]

_PASSES = 3
"""Of the search for a tick's mean number of requests in a group."""
_EMPTY = 0.5
"""Requests: with fewer a draining group is done."""
_SHORTEST_SHARE = 0.05
"""Of the time that is always left for decoding."""


def simulate_fluid(
    scenario: Scenario,
    load: Load,
    make_policy: PolicyMaker,
    *,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """`progress` is told the share that is done, now and then.

    A request that still waits at the end has not met its target. The targets are taken to be missed
    independently of each other. Where answers are so short that a few prompts beside them make one
    miss its time per token, the event mode finds more that do.

    Raises ManifestError for a scenario that contradicts itself.
    """
    policy = make_policy(scenario)
    flow = Flow.of(scenario, load)
    run = _Run(scenario, flow)
    for tick in range(flow.ticks):
        if progress is not None and tick % 256 == 0:
            progress(tick / flow.ticks)
        run.begin(tick)
        run.fleet.apply(policy.decide(run.view(tick)), tick * scenario.tick_s)
        run.serve(tick)
    return run.outcome(policy.name)


@dataclass(slots=True)
class _Cohort:
    """Part of a tick's arrivals that waits; they arrived evenly from `from_s` to `to_s`."""

    tick: int
    requests: float
    from_s: float
    to_s: float

    def take(self, requests: float) -> tuple[float, float]:
        """The earliest ones leave; when the first and the last of them arrived."""
        first = self.from_s
        share = min(1.0, requests / self.requests)
        self.from_s += share * (self.to_s - self.from_s)
        self.requests -= requests
        return first, self.from_s


class _Snapshot(NamedTuple):
    names: tuple[str, ...]
    figures: Floats
    """`_FIGURES` x groups, at the end of a tick or over it."""


class _Run:
    """The state of one run; times in seconds, one column a group."""

    def __init__(self, scenario: Scenario, flow: Flow) -> None:
        self.fleet = Fleet(scenario)
        self._scenario = scenario
        self._flow = flow
        self._tick_s = scenario.tick_s
        self._recorder = Recorder(scenario)
        self._engine = np.array(
            [
                (
                    service.alpha_s,
                    service.beta_s,
                    service.prompt_token_s,
                    service.gamma_s,
                    service.kv_tokens,
                    service.max_batched_tokens,
                    service.prompt_chunk_tokens or service.max_batched_tokens,
                    max(1.0, min(service.max_seqs, option.option.rates.in_flight)),
                )
                for option in scenario.options
                for service in (option.service,)
            ],
            dtype=np.float64,
        ).T
        self._version = -1
        self._names: tuple[str, ...] = ()
        self._option = np.zeros(0, dtype=np.int64)
        self._ready = np.zeros(0, dtype=bool)
        self._any_draining = False
        self._held = np.zeros((3, 0))
        """Requests, output tokens still to come, and prompt tokens of those requests."""
        self._tpot_s = np.zeros(0)
        """Mean over the lives of the requests that are there."""
        self._queue: deque[_Cohort] = deque()
        self._queued = 0.0
        self._snapshots: deque[_Snapshot] = deque(
            maxlen=math.ceil(scenario.metric_delay_s / scenario.tick_s) + 2
        )
        ticks = flow.ticks
        self._ttft_met = np.zeros(ticks)
        self._refused = np.zeros(ticks)
        self._cut = np.zeros(ticks)
        self._tpot_share = np.ones(ticks)
        self._stay_s = np.zeros(ticks)
        self._delivered = np.zeros(ticks)
        self._seen = LateCounts(flow, scenario)

    def begin(self, tick: int) -> None:
        """What happened by itself since the last tick."""
        for event in self.fleet.advance(tick * self._tick_s):
            if event.change in (Change.LOST, Change.DEADLINE) and event.group in self._names:
                column = self._names.index(event.group)
                self._cut_off(tick, float(self._held[0, column]))
        self._follow_fleet()

    def view(self, tick: int) -> View:
        now_s = tick * self._tick_s
        return self._seen.view(
            now_s,
            View(
                now_s=now_s,
                window_s=self._tick_s,
                groups=self.fleet.views(now_s, self._measured()),
                room=self.fleet.room(now_s),
                notices=self.fleet.notices(),
            ),
        )

    def serve(self, tick: int) -> None:
        """Lets the tick that starts now pass."""
        self._follow_fleet()
        flow, dt = self._flow, self._tick_s
        now_s = tick * dt
        alpha, beta, prompt_s, gamma, kv_tokens, tokens, chunk, limit = self._engine[
            :, self._option
        ]
        prompt_in, output_in = float(flow.mean_prompt[tick]), float(flow.mean_output[tick])
        requests = self._held[0]
        some = requests > 1e-9
        own = np.where(some, requests, 1.0)
        mean_output = np.where(some, self._held[1] / own, output_in)
        context = np.where(some, self._held[2] / own, prompt_in)
        context = context + produced_tokens(mean_output, self._scenario.output_cv2)

        batch = np.minimum(limit, KV_SHARE * kv_tokens / context)
        per_request_s = beta + prompt_s * prompt_in / output_in + gamma * context
        stay_full_s = mean_output * (alpha + batch * per_request_s)
        leave = np.exp(-dt / stay_full_s)
        by_slots = (batch - requests * leave) / (stay_full_s * (1 - leave))
        left = np.maximum(tokens - requests, 1.0)
        base_s = alpha + requests * (beta + gamma * context)
        by_prefill = left / (base_s + prompt_s * left) / max(prompt_in, 1.0)
        most = np.where(self._ready, np.maximum(np.minimum(by_slots, by_prefill), 0.0), 0.0)
        waiting = self._queued + float(flow.requests[tick])

        mean = requests
        rate = _part_of(most, waiting / dt)
        prefill_share = np.maximum(1 - rate * prompt_in * prompt_s, _SHORTEST_SHARE)
        for _ in range(_PASSES):
            step_s = (alpha + mean * (beta + gamma * context)) / prefill_share
            stay_s = mean_output * step_s
            leave = np.exp(-dt / stay_s)
            settled = rate * stay_s
            mean = settled + (requests - settled) * (1 - leave) * stay_s / dt
        # Many prompts at once slow a group down, and then fewer slots become free.
        by_slots = (batch - requests * leave) / (stay_s * (1 - leave))
        most = np.maximum(np.minimum(most, by_slots), 0.0)
        most_per_s = float(most.sum())
        rate = _part_of(most, waiting / dt)
        enter = rate * np.array([[1.0], [output_in], [prompt_in]])
        before = self._held
        self._held = enter * stay_s + (before - enter * stay_s) * leave
        gone = before + enter * dt - self._held
        self._tpot_s = np.where(some, self._tpot_s * leave + step_s * (1 - leave), step_s)
        steps = np.maximum(prompt_in / np.minimum(left, chunk), 1.0)
        ttft_s = step_s / 2 + base_s * steps + prompt_s * prompt_in

        first_s = float((ttft_s * most).sum() / most_per_s) if most_per_s > 0 else 0.0
        self._admit(tick, most_per_s, first_s)
        self._refuse(now_s + dt)
        # As many prompts come in the life of a request as there are others in its batch.
        scatter_s = prompt_s * prompt_in * np.sqrt(2 * np.maximum(requests, 1.0)) / mean_output
        self._finish(tick, gone, stay_s, rate, scatter_s)
        self._snapshots.append(
            _Snapshot(
                self._names,
                np.array(
                    [
                        self._held[0],
                        self._held[0] * context / kv_tokens,
                        rate * prompt_in,
                        gone[1] / dt,
                        gone[0],
                        ttft_s,
                        self._tpot_s,
                    ]
                ),
            )
        )
        head = self._queue[0] if self._queue else None
        self._seen.note(
            tick,
            gone.sum(axis=1) if gone.size else np.zeros(3),
            self._queued,
            0.0 if head is None else now_s + dt - head.from_s,
        )
        oldest_s = 0.0 if head is None else now_s + dt - head.from_s
        self._recorder.tick(
            now_s,
            self.fleet,
            loads=tuple(flow.loads[tick].tolist()),
            queued=self._queued,
            in_flight=float(self._held[0].sum()),
            waiting=oldest_s > self._scenario.slo.ttft_s,
        )
        if self._any_draining:
            self._release(now_s + dt)

    def outcome(self, policy: str) -> Outcome:
        flow = self._flow
        end_s = flow.ticks * self._tick_s
        self.fleet.advance(end_s)
        ticks = np.arange(flow.ticks)
        ended = np.minimum(ticks + np.rint(self._stay_s / self._tick_s), flow.ticks - 1)
        tpot_share = self._tpot_share[ended.astype(np.int64)]
        whole = np.maximum(flow.requests - self._refused - self._cut, 0.0)
        ttft_met = np.minimum(self._ttft_met, whole)
        served = Served(
            requests=flow.requests,
            ttft_met=ttft_met,
            tpot_met=whole * tpot_share,
            both_met=ttft_met * tpot_share,
            refused=self._refused,
            cut=self._cut,
            output_tokens=self._delivered,
        )
        return self._recorder.outcome(policy, "fluid", end_s, self.fleet, served)

    # The queue

    def _admit(self, tick: int, most_per_s: float, first_s: float) -> None:
        """Serves the queue and then the tick's own arrivals, first come first served."""
        dt, now_s = self._tick_s, tick * self._tick_s
        allowed_s = self._scenario.slo.ttft_s - first_s
        arrive = float(self._flow.requests[tick])
        room = most_per_s * dt
        served = 0.0
        while self._queue and room - served > 1e-9:
            cohort = self._queue[0]
            part = min(cohort.requests, room - served)
            from_s, to_s = cohort.take(part)
            begin_s = now_s + served / most_per_s
            served += part
            end_s = now_s + served / most_per_s
            self._ttft_met[cohort.tick] += part * _share_within(
                begin_s - from_s, end_s - to_s, allowed_s
            )
            if cohort.requests <= 1e-9:
                self._queue.popleft()
        self._queued = max(0.0, self._queued - served) if self._queue else 0.0
        if arrive <= 0:
            return
        # The x-th of the tick's arrivals comes at x / arrive * dt, and is served at
        # (served + x) / most_per_s or at once, whichever is later.
        own = min(arrive, max(0.0, room - served))
        if own > 0:
            begin_s = served / most_per_s
            end_s = (served + own) / most_per_s - own / arrive * dt
            if end_s >= 0:
                met = own * _share_within(begin_s, end_s, allowed_s)
            else:
                late = own * begin_s / (begin_s - end_s)
                met = late * _share_within(begin_s, 0.0, allowed_s)
                met += (own - late) * (allowed_s >= 0)
            self._ttft_met[tick] += met
        rest = arrive - own
        if rest > 1e-9:
            from_s = now_s + own / arrive * dt
            self._queue.append(_Cohort(tick, rest, from_s, now_s + dt))
            self._queued += rest

    def _refuse(self, now_s: float) -> None:
        latest_s = now_s - self._scenario.max_wait_s
        while self._queue and self._queue[0].from_s < latest_s:
            cohort = self._queue[0]
            span_s = cohort.to_s - cohort.from_s
            share = min(1.0, (latest_s - cohort.from_s) / span_s) if span_s > 0 else 1.0
            part = cohort.requests * share
            cohort.take(part)
            self._refused[cohort.tick] += part
            self._queued = max(0.0, self._queued - part)
            if share < 1.0:
                break
            self._queue.popleft()
        if not self._queue:
            self._queued = 0.0

    # The groups

    def _follow_fleet(self) -> None:
        """Columns for the groups that serve, as the fleet has them now."""
        if self.fleet.version == self._version:
            return
        self._version = self.fleet.version
        known = {name: column for column, name in enumerate(self._names)}
        serving = [group for group in self.fleet.groups if group.state is not GroupState.STARTING]
        held, tpot_s = np.zeros((3, len(serving))), np.zeros(len(serving))
        for column, group in enumerate(serving):
            if group.name in known:
                held[:, column] = self._held[:, known[group.name]]
                tpot_s[column] = self._tpot_s[known[group.name]]
        self._held, self._tpot_s = held, tpot_s
        self._names = tuple(group.name for group in serving)
        self._option = np.array([group.option for group in serving], dtype=np.int64)
        self._ready = np.array([group.state is GroupState.READY for group in serving], dtype=bool)
        self._any_draining = bool((~self._ready).any())

    def _release(self, now_s: float) -> None:
        for column in np.flatnonzero(~self._ready & (self._held[0] < _EMPTY)).tolist():
            self.fleet.release(self._names[column], now_s)

    def _cut_off(self, tick: int, requests: float) -> None:
        """Counted where they arrived: lately, and the fewer the longer ago."""
        if requests <= 0 or tick == 0:
            return
        stay_s = max(float(self._stay_s[tick - 1]), self._tick_s)
        first = max(0, tick - math.ceil(10 * stay_s / self._tick_s))
        ages = np.arange(tick - first, 0, -1) * self._tick_s
        weights = self._flow.requests[first:tick] * np.exp(-ages / stay_s)
        if weights.sum() > 0:
            self._cut[first:tick] += requests * weights / weights.sum()
        else:
            self._cut[tick - 1] += requests

    def _finish(
        self, tick: int, gone: Floats, stay_s: Floats, rate: Floats, scatter_s: Floats
    ) -> None:
        if not gone.size:
            self._stay_s[tick] = self._stay_s[tick - 1] if tick else 0.0
            return
        ended, total = gone[0], float(gone[0].sum())
        self._delivered[tick] = float(gone[1].sum())
        if total > 1e-9:
            spare = (self._scenario.slo.tpot_s - self._tpot_s) / np.maximum(scatter_s, 1e-9)
            self._tpot_share[tick] = float((ended * _share_below(spare)).sum()) / total
        elif tick:
            self._tpot_share[tick] = self._tpot_share[tick - 1]
        weights = rate if rate.sum() > 0 else np.ones_like(rate)
        self._stay_s[tick] = float((stay_s * weights).sum() / weights.sum())

    def _measured(self) -> dict[str, Measured]:
        """As old as the metrics are: between two snapshots, when both have the same groups."""
        age = self._scenario.metric_delay_s / self._tick_s
        back = math.ceil(age)
        if len(self._snapshots) <= back:
            return {}
        older = self._snapshots[-1 - back]
        names, figures = older
        if back > age and self._snapshots[-back].names is names:
            figures = figures + (back - age) * (self._snapshots[-back].figures - figures)
        return {
            name: Measured(
                in_flight,
                0.0,
                min(1.0, kv_usage),
                prompt_rate,
                output_rate,
                ttft_s if ended > 1e-6 else None,
                tpot_s if ended > 1e-6 else None,
            )
            for name, (
                in_flight,
                kv_usage,
                prompt_rate,
                output_rate,
                ended,
                ttft_s,
                tpot_s,
            ) in zip(names, figures.T.tolist(), strict=True)
        }


def _part_of(most: Floats, wanted: float) -> Floats:
    """Rates that add up to what is wanted, where that can be had."""
    total = float(most.sum())
    return most * min(1.0, wanted / total) if total > 0 else np.zeros_like(most)


def _share_below(deviations: Floats) -> Floats:
    """Of requests with memoryless lengths whose time per token is below its mean and so many
    standard deviations, those of a request of mean length; longer ones scatter less, as a mean of
    more does."""
    return np.asarray(0.5 * (1 + deviations / np.sqrt(deviations**2 + 2)))


def _share_within(first: float, last: float, allowed: float) -> float:
    """Of values that lie evenly between `first` and `last`."""
    low, high = min(first, last), max(first, last)
    if high <= allowed:
        return 1.0
    if low > allowed or high <= low:
        return 0.0
    return (allowed - low) / (high - low)
