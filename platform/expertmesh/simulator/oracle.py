"""The least that a fleet could have cost, for someone who knew the load in advance.

A dynamic program over the counts of groups by option. Starting a group costs its price for as long
as the start takes: someone who knows the future asks early enough, so a start delays nothing.
Stopping is free. The fleet at the beginning is free to start.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from expertmesh.simulator.scenario import Scenario, SimulatedOption
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.workload import Load

Floats = NDArray[np.float64]

_ENOUGH = 1.0 - 1e-9
"""Of the load: rounding must not ask for a further group."""
_BLOCK = 128
"""Bins between two that are kept for the way back, where not all can be."""
_MEMORY_BYTES = 320_000_000
_SEARCHES = 24
"""Of a multiplier; each one goes over the whole time."""
_QUANTILES = 2000
_STEPS = 12
"""Of a bin, at least, in which work is spread over time."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """`options` in this order everywhere; r groups serve a bin when the sum of r / load over the
    options is at least 1."""

    bin_s: float
    usd_per_hour: tuple[float, ...]
    """Of one group."""
    start_s: tuple[float, ...]
    max_groups: tuple[int, ...]
    loads: Floats
    """Bins x options: the work of a bin, in groups of each option alone."""
    requests: Floats
    """That arrive in each bin; they weigh what may be missed."""
    nodes: tuple[int, ...]
    """Of one group."""
    zones: tuple[tuple[tuple[int, ...], Floats], ...] = ()
    """Options that share a zone's nodes, and how many nodes it has in each bin."""
    min_groups: int = 0
    budget_usd_per_hour: float | None = None
    """Of ready groups; what starts cost is not counted against it, so a bound stays one."""
    bound: str = ""
    """What the result is a bound of, for a person."""

    @property
    def bins(self) -> int:
        return len(self.loads)


@dataclass(frozen=True, slots=True, eq=False)
class Least:
    """The cheapest way that serves every bin, or misses as much as is allowed."""

    usd: float
    """A lower bound where `missed_share` is not 0, exact otherwise."""
    fleet: NDArray[np.int64]
    """Bins x options; when something may be missed, of the multiplier that gave the bound."""
    usd_by_bin: Floats
    """What that fleet costs, starts included."""
    bin_s: float
    missed_share: float
    """Of the requests, that may be missed."""
    usd_per_missed_request: float
    """The multiplier; 0 when nothing may be missed."""
    bound: str


@dataclass(frozen=True, slots=True)
class NotServable:
    """No fleet serves this bin, whatever it costs."""

    bin: int


def problem(
    scenario: Scenario, load: Load, bin_s: float = 60.0, *, strict: bool = False
) -> Problem:
    """Of the same load and the same groups that the fluid mode simulates.

    A request's work is spread over the time that it stays in a group, from when it arrives, with
    the memoryless lengths of the fluid mode. That is what it takes when nothing waits; someone may
    do up to `ttft_s` of work later, which matters little in bins that are long against it.
    `strict` leaves nothing to that: only the work counts that cannot be put off beyond the bin in
    which it arrived. Such a bound always holds, and is loose when bins are not long against
    `ttft_s` and the time that a request stays.

    Raises ValueError when the bins are shorter than `ttft_s`: the result would bound nothing.
    """
    slo = scenario.slo
    if bin_s < slo.ttft_s:
        raise ValueError(f"bins of {bin_s:g} s are shorter than the TTFT target, {slo.ttft_s:g} s")
    per_bin = math.ceil(bin_s / min(load.bin_s, bin_s / _STEPS) - 1e-9)
    fine_s = bin_s / per_bin
    columns = _resampled(load, fine_s)
    requests, _, output = columns
    stay_s = float(output.sum()) / max(float(requests.sum()), 1e-9) * slo.tpot_s
    if strict:
        left_s = bin_s - (np.arange(len(requests)) % per_bin + 1) * fine_s - slo.ttft_s
        counts = -np.expm1(-np.maximum(left_s, 0.0) / max(stay_s, 1e-9))
        spread = tuple(column * counts for column in columns)
        bound = f"of every fleet that meets the targets, by bins of {bin_s:g} s"
    else:
        keep = math.exp(-fine_s / max(stay_s, 1e-9))
        spread = tuple(_spread(column, keep) for column in columns)
        bound = f"of fleets in which no work waits beyond its bin of {bin_s:g} s"
    requests_in, prompt_in, output_in = (_summed(column, per_bin) for column in spread)
    some = np.maximum(requests_in, 1e-12)
    loads = np.empty((len(requests_in), len(scenario.options)))
    for index, option in enumerate(scenario.options):
        sizes = (prompt_in / some, output_in / some)
        rates = slo_rates(option.service, slo.tpot_s, *sizes, scenario.output_cv2)
        loads[:, index] = rates.seconds(prompt_in, output_in) / bin_s
    return Problem(
        bin_s=bin_s,
        usd_per_hour=tuple(option.option.usd_per_hour for option in scenario.options),
        start_s=tuple(mean_start_s(option) for option in scenario.options),
        max_groups=tuple(option.max_groups for option in scenario.options),
        loads=loads,
        requests=_summed(requests, per_bin),
        nodes=tuple(max(1, option.nodes) for option in scenario.options),
        zones=_zones(scenario, len(loads), bin_s),
        min_groups=scenario.min_groups,
        budget_usd_per_hour=scenario.budget_usd_per_hour,
        bound=bound,
    )


def mean_start_s(option: SimulatedOption) -> float:
    """Expected time of the slowest of a group's nodes; failed starts are left out."""
    nodes = max(1, option.nodes)
    shares = ((np.arange(_QUANTILES) + 0.5) / _QUANTILES) ** (1 / nodes)
    normal = NormalDist(0.0, option.start.sigma) if option.start.sigma > 0 else None
    if normal is None:
        return option.start.median_s
    factors = [math.exp(normal.inv_cdf(share)) for share in shares.tolist()]
    return option.start.median_s * sum(factors) / len(factors)


def least_cost(
    problem: Problem, *, miss_share: float = 0.0, memory_bytes: int = _MEMORY_BYTES
) -> Least | NotServable:
    """`miss_share` of the requests may be missed (0: none); then a bin may be served in part, and
    the part that is not served counts as that share of its requests.

    With `miss_share` the result is the best bound of a Lagrange multiplier: at most the true least
    cost, and below it by what a mix of two fleets would gain. Where the values of all bins take
    more than `memory_bytes`, most of them are computed twice.
    """
    if miss_share > 0:
        return _with_misses(problem, miss_share, memory_bytes)
    table = _Table(problem, None, memory_bytes)
    values = table.last()
    if not np.isfinite(values).any():
        return NotServable(table.first_unservable())
    return _least(problem, float(values.min()), table.way_back())


def best_static(problem: Problem) -> tuple[float, tuple[int, ...]] | NotServable:
    """Cost of the cheapest fleet that serves every bin without a change, and that fleet."""
    table = _Table(problem, None)
    allowed = table.always_allowed()
    usd = np.where(allowed, table.usd_per_bin, math.inf)
    if not np.isfinite(usd).any():
        return NotServable(int(np.argmax(problem.loads.max(axis=1))))
    best = np.unravel_index(int(usd.argmin()), usd.shape)
    return float(usd[best]) * problem.bins, tuple(int(count) for count in best)


def static_peaks(problem: Problem) -> tuple[tuple[float, int] | None, ...]:
    """By option: cost of as many groups of it alone as the peak needs, and that number; None when
    so many are not always to be had."""
    peaks: list[tuple[float, int] | None] = []
    for option in range(len(problem.max_groups)):
        alone = [most if index == option else 0 for index, most in enumerate(problem.max_groups)]
        found = best_static(replace(problem, max_groups=tuple(alone)))
        peaks.append(None if isinstance(found, NotServable) else (found[0], found[1][option]))
    return tuple(peaks)


class _Table:
    """Costs of being in a state at the end of a bin, one array axis an option."""

    def __init__(
        self, problem: Problem, usd_per_missed: float | None, memory_bytes: int = 0
    ) -> None:
        self._problem = problem
        self._usd_per_missed = usd_per_missed
        self._shape = tuple(most + 1 for most in problem.max_groups)
        self._axes = range(len(self._shape))
        self._counts = [self._along(axis, np.arange(self._shape[axis])) for axis in self._axes]
        self.usd_per_bin = self._total(problem.usd_per_hour) * problem.bin_s / 3600
        self._start_usd = [
            usd * start_s / 3600
            for usd, start_s in zip(problem.usd_per_hour, problem.start_s, strict=True)
        ]
        self._slopes = [
            usd * counts for usd, counts in zip(self._start_usd, self._counts, strict=True)
        ]
        closed = self._total([1.0] * len(self._shape)) < problem.min_groups
        if problem.budget_usd_per_hour is not None:
            rate = self._total(problem.usd_per_hour)
            closed |= rate > problem.budget_usd_per_hour * (1 + 1e-12)
        self._base = np.where(closed, math.inf, self.usd_per_bin)
        self._zone_nodes = [
            self._total([problem.nodes[axis] if axis in members else 0 for axis in self._axes])
            for members, _ in problem.zones
        ]
        size_bytes = problem.bins * math.prod(self._shape) * 8
        self._block = 1 if size_bytes <= memory_bytes else _BLOCK
        self._kept: list[Floats] = []

    def last(self) -> Floats:
        """Of the last bin; keeps what the way back needs."""
        self._kept = []
        last = np.zeros(self._shape)
        for bin_, values in enumerate(self._from(0, last)):
            if bin_ % self._block == 0:
                self._kept.append(values)
            last = values
        return last

    def first_unservable(self) -> int:
        for bin_ in range(self._problem.bins):
            if not np.isfinite(self._stay(bin_)).any():
                return bin_
        return self._problem.bins - 1

    def way_back(self) -> NDArray[np.int64]:
        """The fleet of each bin, in one of the cheapest ways."""
        bins = self._problem.bins
        fleet = np.zeros((bins, len(self._shape)), dtype=np.int64)
        state: tuple[int, ...] | None = None
        for block in reversed(range(len(self._kept))):
            first = block * self._block
            count = min(self._block, bins - first)
            kept = [self._kept[block]]
            kept += islice(self._from(first + 1, self._kept[block]), count - 1)
            for offset in reversed(range(count)):
                values = kept[offset]
                if state is not None:
                    values = values + self._starting(state)
                flat = int(values.argmin())
                state = tuple(int(i) for i in np.unravel_index(flat, self._shape))
                fleet[first + offset] = state
        return fleet

    def always_allowed(self) -> NDArray[np.bool_]:
        """States that every bin allows."""
        allowed: NDArray[np.bool_] = np.isfinite(self._base)
        for (_, nodes), used in zip(self._problem.zones, self._zone_nodes, strict=True):
            allowed &= used <= nodes.min()
        # Only bins that no other bin exceeds in every option matter.
        for bin_ in _hardest(self._problem.loads):
            if self._problem.loads[bin_].max() > 0:
                allowed &= self._served(bin_) >= _ENOUGH
        return allowed

    def _from(self, first: int, values: Floats) -> Iterator[Floats]:
        """Values of the bins from `first` on, after those of the bin before it."""
        for bin_ in range(first, self._problem.bins):
            moved = values if bin_ == 0 else self._moved(values)
            values = moved + self._stay(bin_)
            yield values

    def _moved(self, values: Floats) -> Floats:
        """The cheapest way into each state, one option after the other: costs of starts add up."""
        for axis in self._axes:
            slope = self._slopes[axis]
            up = np.minimum.accumulate(values - slope, axis=axis) + slope
            reverse = np.flip(values, axis)
            down = np.flip(np.minimum.accumulate(reverse, axis=axis), axis)
            values = np.minimum(up, down)
        return values

    def _stay(self, bin_: int) -> Floats:
        """Cost of being in a state for this bin; infinite where it is not allowed."""
        problem = self._problem
        stay = self._base
        if problem.loads[bin_].max() > 0:
            served = self._served(bin_)
            if self._usd_per_missed is None:
                stay = np.where(served >= _ENOUGH, stay, math.inf)
            else:
                usd = self._usd_per_missed * float(problem.requests[bin_])
                stay = stay + usd * np.maximum(1 - served, 0.0)
        for (_, nodes), used in zip(problem.zones, self._zone_nodes, strict=True):
            stay = np.where(used <= nodes[bin_], stay, math.inf)
        return stay

    def _served(self, bin_: int) -> Floats:
        """Share of the bin's load."""
        return self._total([1 / max(load, 1e-12) for load in self._problem.loads[bin_].tolist()])

    def _starting(self, state: tuple[int, ...]) -> Floats:
        """Cost of coming into this state from each other one."""
        total = np.zeros(self._shape)
        for axis in self._axes:
            started = np.maximum(state[axis] - self._counts[axis], 0)
            total = total + self._start_usd[axis] * started
        return total

    def _total(self, weights: Sequence[float]) -> Floats:
        """Weighted sum of the counts of a state."""
        total: Floats = np.asarray(weights[0] * self._counts[0], dtype=np.float64)
        for counts, weight in zip(self._counts[1:], weights[1:], strict=True):
            # Only the last sum is as large as the table.
            total = total + weight * counts
        return total

    def _along(self, axis: int, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values.reshape([-1 if other == axis else 1 for other in self._axes])


def _with_misses(problem: Problem, miss_share: float, memory_bytes: int) -> Least | NotServable:
    """The best multiplier by golden section: the bound is concave in it."""
    allowed = miss_share * float(problem.requests.sum())

    def bound(usd_per_missed: float) -> float:
        values = _Table(problem, usd_per_missed).last()
        return float(values.min()) - usd_per_missed * allowed

    if not math.isfinite(bound(0.0)):
        return NotServable(_Table(problem, 0.0).first_unservable())
    mean = float(problem.requests.mean())
    dearest = max(problem.usd_per_hour) * (problem.bin_s + max(problem.start_s)) / 3600
    low, high = 0.0, 1.0
    scale = 1000 * dearest * max(problem.max_groups) / max(mean, 1e-12)
    golden = (math.sqrt(5) - 1) / 2

    def at(x: float) -> float:
        return scale * x**6

    left, right = high - golden * (high - low), low + golden * (high - low)
    left_bound, right_bound = bound(at(left)), bound(at(right))
    best = max((bound(0.0), 0.0), (left_bound, at(left)), (right_bound, at(right)))
    for _ in range(_SEARCHES):
        if left_bound < right_bound:
            low, left, left_bound = left, right, right_bound
            right = low + golden * (high - low)
            right_bound = bound(at(right))
            best = max(best, (right_bound, at(right)))
        else:
            high, right, right_bound = right, left, left_bound
            left = high - golden * (high - low)
            left_bound = bound(at(left))
            best = max(best, (left_bound, at(left)))
    usd, multiplier = best
    table = _Table(problem, multiplier, memory_bytes)
    table.last()
    least = _least(problem, usd, table.way_back())
    return replace(
        least,
        missed_share=miss_share,
        usd_per_missed_request=multiplier,
        bound=f"{problem.bound}, and miss at most {miss_share:.3%} of the requests",
    )


def _least(problem: Problem, usd: float, fleet: NDArray[np.int64]) -> Least:
    """With nothing missed."""
    price = np.array(problem.usd_per_hour) / 3600
    started = np.maximum(np.diff(fleet, axis=0, prepend=fleet[:1]), 0)
    by_bin = (fleet * problem.bin_s + started * np.array(problem.start_s)) @ price
    return Least(usd, fleet, by_bin, problem.bin_s, 0.0, 0.0, problem.bound)


def _hardest(loads: Floats) -> list[int]:
    """Bins of which no other bin asks as much or more of every option."""
    order = np.lexsort(loads.T[::-1])[::-1]
    kept: list[int] = []
    for bin_ in order.tolist():
        if not any((loads[other] >= loads[bin_]).all() for other in kept):
            kept.append(bin_)
    return kept


def _zones(
    scenario: Scenario, bins: int, bin_s: float
) -> tuple[tuple[tuple[int, ...], Floats], ...]:
    """Options of one pool share its nodes: those of its zone, or those of its largest option."""
    pools: dict[str, list[int]] = {}
    for index, option in enumerate(scenario.options):
        pools.setdefault(option.option.pool, []).append(index)
    zones: list[tuple[tuple[int, ...], Floats]] = []
    for members in pools.values():
        options = [scenario.options[index] for index in members]
        zone = options[0].availability
        if zone is not None:
            # The most nodes of a bin: it may be used for a part of it.
            edges = np.arange(bins) * bin_s
            first = np.maximum(np.searchsorted(zone.at_s, edges, side="right") - 1, 0)
            last = np.searchsorted(zone.at_s, edges + bin_s, side="left")
            steps = zip(first.tolist(), last.tolist(), strict=True)
            most = [max(zone.nodes[a : max(b, a + 1)]) for a, b in steps]
            zones.append((tuple(members), np.array(most, dtype=np.float64)))
        elif len(members) > 1:
            nodes = max(option.max_groups * max(1, option.nodes) for option in options)
            zones.append((tuple(members), np.full(bins, float(nodes))))
    return tuple(zones)


def _resampled(load: Load, fine_s: float) -> tuple[Floats, Floats, Floats]:
    count = max(1, math.ceil(load.span_s / fine_s - 1e-9))
    edges = np.arange(count + 1) * fine_s
    own = np.arange(len(load) + 1) * load.bin_s

    def fine(column: Floats) -> Floats:
        total = np.concatenate(([0.0], np.cumsum(column)))
        return np.diff(np.interp(edges, own, total))

    return fine(load.requests), fine(load.prompt_tokens), fine(load.output_tokens)


def _spread(column: Floats, keep: float) -> Floats:
    """What is done in each step when this share of what is there remains for the next one."""
    there, done = 0.0, []
    for value in column.tolist():
        there += value
        done.append(there * (1 - keep))
        there *= keep
    return np.array(done)


def _summed(column: Floats, size: int) -> Floats:
    return np.add.reduceat(column, np.arange(0, len(column), size))
