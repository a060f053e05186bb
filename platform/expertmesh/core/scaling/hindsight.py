"""The least that groups for the work of the past could have cost, known in advance.

A dynamic program over the counts of groups by option, minute by minute. Who knows the future asks
for a group early enough, so a start delays nothing but costs its price for as long as it takes.
Stopping is free, and so are the groups at the beginning. What groups serve they serve while it
comes; beyond the bounds of the manifest work waits. Nothing is kept in hand, nothing is lost, and
the planned rates hold as far as they were corrected: so no fleet that serves the same work in the
same minutes at these rates costs less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from operator import mul

from expertmesh.core.domain.hardware import Market
from expertmesh.core.scaling.contract import ModelState, ScalingConfig
from expertmesh.core.scaling.kinds import Kind, Kinds, kinds_of
from expertmesh.core.scaling.mix import Bounds

_ENOUGH = 1.0 - 1e-9
"""Of the load: rounding must not ask for a further group."""
_MOST_STEPS = 1_500_000
"""States times bins; some seconds of one processor."""
_LONGEST_BIN_S = 3600.0
_HARDLY = 0.05
"""Of a request: a group is not kept for less."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came to the groups of a model within one bin of time, until it was done."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    """Uncached."""
    output_tokens: float = 0.0
    at_groups_s: float = 0.0
    """Time that these requests were at a group, all together."""

    def __add__(self, other: "Served") -> "Served":
        return Served(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
            self.at_groups_s + other.at_groups_s,
        )

    def scaled(self, share: float) -> "Served":
        return Served(
            self.requests * share,
            self.prompt_tokens * share,
            self.output_tokens * share,
            self.at_groups_s * share,
        )


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run groups, as it turned out to be."""

    usd_per_hour: float
    """Of one group."""
    start_s: float
    pool: str
    workers: int
    """Of one group."""


@dataclass(frozen=True, slots=True)
class Least:
    usd: float
    bin_s: float
    """Within which work may be put off."""
    by_tokens: bool
    """Work was measured in tokens and rates; otherwise in requests at once."""


@dataclass(frozen=True, slots=True)
class Regret:
    """What the groups of a model have cost, beside the least.

    They have cost less than that where they did more than the learned rates say, or where fewer
    ran than the manifest wants at least.
    """

    since_s: float
    """A day before `until_s`, or the first whole minute of its first group."""
    until_s: float
    spent_usd: float
    least: Least


def hindsight(
    config: ScalingConfig, state: ModelState, served: Sequence[Served], bin_s: float
) -> Least | None:
    """`served`: by the bin in which requests came. `state` tells what rates and starts have turned
    out to be. None: the model has no way to run a group, or too many to look through."""
    kinds = kinds_of(config, state, state.work, ())
    spread = spread_out(served, bin_s)
    while kinds.all:
        loads = [_loads(kinds, each, bin_s) for each in spread]
        usd = least_usd(_ways(kinds), _bounds(config), loads, bin_s)
        if usd is not None:
            return Least(usd, bin_s, kinds.by_tokens)
        if bin_s >= _LONGEST_BIN_S:
            break
        bin_s *= 2
        spread = [one + two for one, two in _pairs(spread)]
    return None


def spread_out(served: Sequence[Served], bin_s: float) -> list[Served]:
    """A request's work over the time that it stays at a group, from when it came: exponentially,
    with the mean stay of all, until hardly anything is left of it. What is done after the last bin
    is left out."""
    total = sum(served, start=Served())
    stay_s = total.at_groups_s / total.requests if total.requests else 0.0
    if stay_s <= 0:
        return list(served)
    kept = math.exp(-bin_s / stay_s)
    # Of what comes evenly within a bin.
    done_at_once = 1 - stay_s / bin_s * (1 - kept)
    there, spread = Served(), []
    for new in served:
        left = there.scaled(kept) + new.scaled(1 - done_at_once)
        done = there.scaled(1 - kept) + new.scaled(done_at_once)
        if left.requests < _HARDLY:
            done, left = done + left, Served()
        spread.append(done)
        there = left
    return spread


def least_usd(
    ways: Sequence[Way], bounds: Bounds, loads: Sequence[Sequence[float]], bin_s: float
) -> float | None:
    """`loads`: by bin, the work in groups of each way alone. None: too many states to look through,
    or the bounds allow none.

    What no allowed fleet can do within its bin waits for the next one; after the last one it is
    left out.
    """
    if not loads:
        return 0.0
    shape = _shape(ways, bounds, loads)
    if math.prod(most + 1 for most in shape) * len(loads) > _MOST_STEPS:
        return None
    states = [
        state
        for state in product(*(range(most + 1) for most in shape))
        if _is_allowed(state, ways, bounds)
    ]
    return _cheapest(ways, shape, states, _runs(states, loads), bin_s) if states else None


@dataclass(frozen=True, slots=True)
class _Run:
    """Bins in a row that allow the same states."""

    bins: int
    allowed: tuple[bool, ...]


def _shape(
    ways: Sequence[Way], bounds: Bounds, loads: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    """The most groups of each way that can be of use."""
    return tuple(
        min(
            bounds.max_groups,
            bounds.workers.get(way.pool, 0) // way.workers,
            # Work only waits where the bounds above are lower than this.
            max(bounds.min_groups, math.ceil(max(load[index] for load in loads) - 1e-9)),
        )
        for index, way in enumerate(ways)
    )


def _is_allowed(state: tuple[int, ...], ways: Sequence[Way], bounds: Bounds) -> bool:
    groups = sum(state)
    if not bounds.min_groups <= groups <= bounds.max_groups:
        return False
    used: dict[str, int] = {}
    for count, way in zip(state, ways, strict=True):
        used[way.pool] = used.get(way.pool, 0) + count * way.workers
    if any(workers > bounds.workers.get(pool, 0) for pool, workers in used.items()):
        return False
    if bounds.usd_per_hour is None:
        return True
    usd = sum(count * way.usd_per_hour for count, way in zip(state, ways, strict=True))
    return usd <= bounds.usd_per_hour * (1 + 1e-9)


def _runs(states: Sequence[tuple[int, ...]], loads: Sequence[Sequence[float]]) -> list[_Run]:
    runs: list[_Run] = []
    waiting = [0.0] * len(states[0])
    for new in loads:
        load = [one + other for one, other in zip(new, waiting, strict=True)]
        shares = _shares(states, load)
        can = min(1.0, max(shares))
        waiting = [each * (1 - can) for each in load]
        allowed = tuple(share >= can * _ENOUGH for share in shares)
        if runs and runs[-1].allowed == allowed:
            runs[-1] = _Run(runs[-1].bins + 1, allowed)
        else:
            runs.append(_Run(1, allowed))
    return runs


def _shares(states: Sequence[tuple[int, ...]], load: Sequence[float]) -> list[float]:
    """Of the load, that the groups of each state do."""
    if max(load) <= 0:
        return [1.0] * len(states)
    of_one = [1.0 / max(each, 1e-12) for each in load]
    return [sum(map(mul, state, of_one)) for state in states]


def _cheapest(
    ways: Sequence[Way],
    shape: tuple[int, ...],
    states: Sequence[tuple[int, ...]],
    runs: Sequence[_Run],
    bin_s: float,
) -> float:
    strides = [math.prod(most + 1 for most in shape[axis + 1 :]) for axis in range(len(shape))]
    size = math.prod(most + 1 for most in shape)
    places = [sum(n * stride for n, stride in zip(state, strides, strict=True)) for state in states]
    bin_usd = [
        sum(n * way.usd_per_hour for n, way in zip(state, ways, strict=True)) * bin_s / 3600.0
        for state in states
    ]
    start_usd = [way.usd_per_hour * way.start_s / 3600.0 for way in ways]
    values = [0.0] * size
    for number, run in enumerate(runs):
        if number:
            for axis, most in enumerate(shape):
                _move(values, strides[axis], most + 1, start_usd[axis])
        after = [math.inf] * size
        for place, usd, allowed in zip(places, bin_usd, run.allowed, strict=True):
            if allowed:
                after[place] = values[place] + usd * run.bins
        values = after
    return min(values)


def _move(values: list[float], stride: int, count: int, start_usd: float) -> None:
    """The cheapest way into each count of one axis: starts cost, stops do not."""
    block = stride * count
    for first in range(0, len(values), block):
        for offset in range(first, first + stride):
            line = range(offset, offset + block, stride)
            # Up first: what comes down later may have been started for nothing, which is dearer.
            for lower, higher in pairwise(line):
                values[higher] = min(values[higher], values[lower] + start_usd)
            for higher, lower in pairwise(reversed(line)):
                values[lower] = min(values[lower], values[higher])


def _ways(kinds: Kinds) -> list[Way]:
    return [
        Way(kind.option.usd_per_hour, kind.start_s, kind.option.pool, kind.option.workers)
        for kind in kinds.all
    ]


def _bounds(config: ScalingConfig) -> Bounds:
    return Bounds(
        config.rules.min_groups,
        config.rules.max_groups,
        {
            pool.name: pool.max_nodes * pool.workers_per_node
            for pool in config.pools
            if pool.market is not Market.EXTERNAL
        },
        config.rules.usd_per_hour_budget,
    )


def _loads(kinds: Kinds, served: Served, bin_s: float) -> list[float]:
    return [_seconds(kinds, kind, served) / bin_s for kind in kinds.all]


def _seconds(kinds: Kinds, kind: Kind, served: Served) -> float:
    """Of one group's time that the work takes."""
    if not kinds.by_tokens:
        return served.at_groups_s / kind.rates.in_flight
    planned_s = kind.rates.seconds(served.prompt_tokens, served.output_tokens)
    if planned_s is not None:
        return planned_s * kind.ratio
    return served.requests * (kind.seconds or 0.0)


def _pairs(spread: Sequence[Served]) -> list[tuple[Served, Served]]:
    return [
        (spread[at], spread[at + 1] if at + 1 < len(spread) else Served())
        for at in range(0, len(spread), 2)
    ]
