"""Divide what the groups cost between the requests they served and the time they stood idle.

Each instant's cost is split equally among the requests in flight at the group at that instant.
Amounts are integers of nano-dollars, and cost = attributed + idle holds to the last of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.metering.rating import exact_usd
from expertmesh.core.metering.usage import UsageRecord

NANO_USD_PER_USD = 1_000_000_000
_US_PER_S = 1_000_000
_US_PER_HOUR = 3_600 * _US_PER_S
# Fractional bits of a microsecond's equal split; their error is far below a nano-dollar.
_SPLIT_BITS = 64


@dataclass(frozen=True, slots=True)
class HoldCost:
    """One hold inside the window that was asked for."""

    hold: CapacityHold
    attributed_nano_usd: int
    idle_nano_usd: int

    @property
    def cost_nano_usd(self) -> int:
        return self.attributed_nano_usd + self.idle_nano_usd


@dataclass(frozen=True, slots=True)
class Attribution:
    holds: tuple[HoldCost, ...]
    requests: Mapping[str, int]
    """Request id to its share in nano-dollars; a request that no hold served has no entry."""

    @property
    def cost_nano_usd(self) -> int:
        return sum(held.cost_nano_usd for held in self.holds)

    @property
    def attributed_nano_usd(self) -> int:
        return sum(self.requests.values())

    @property
    def idle_nano_usd(self) -> int:
        return sum(held.idle_nano_usd for held in self.holds)


def attribute(
    holds: Sequence[CapacityHold],
    requests: Sequence[UsageRecord],
    now_s: float,
    since_s: float | None = None,
) -> Attribution:
    """Costs from `since_s` (or the start) to `now_s`; adjacent windows add up to their union."""
    in_flight: dict[str, list[tuple[int, int, str]]] = {}
    for request in requests:
        start_us, end_us = _us(request.at_s + request.queue_s), _us(request.finished_at_s)
        in_flight.setdefault(request.group, []).append((start_us, end_us, request.request_id))
    costs: list[HoldCost] = []
    shares: dict[str, int] = {}
    for hold in holds:
        held_us = _held_us(hold, since_s, now_s)
        served = _clip(in_flight.get(hold.group, ()), held_us)
        *request_weights, idle_weight = _split_time(served, held_us)
        amounts = allocate(_cost_nano_usd(hold, held_us), (*request_weights, idle_weight))
        for (_, _, request_id), amount in zip(served, amounts[:-1], strict=True):
            shares[request_id] = shares.get(request_id, 0) + amount
        costs.append(HoldCost(hold, sum(amounts[:-1]), amounts[-1]))
    return Attribution(tuple(costs), shares)


def allocate(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Integers in proportion to `weights` whose sum is `total` (largest remainder, then order)."""
    whole = sum(weights)
    if whole == 0:
        if total:
            raise ValueError(f"{total} cannot be divided by weights that are all zero")
        return (0,) * len(weights)
    floors = [total * weight // whole for weight in weights]
    missing = total - sum(floors)
    if missing:
        remainders = [total * weight % whole for weight in weights]
        for index in sorted(range(len(weights)), key=lambda index: -remainders[index])[:missing]:
            floors[index] += 1
    return tuple(floors)


def _held_us(hold: CapacityHold, since_s: float | None, now_s: float) -> tuple[int, int]:
    start_us, end_us = _us(hold.started_at_s), min(_us(hold.held_until_s), _us(now_s))
    if since_s is not None:
        start_us = max(start_us, _us(since_s))
    return start_us, max(start_us, end_us)


def _cost_nano_usd(hold: CapacityHold, held_us: tuple[int, int]) -> int:
    """As a difference of two running totals, so that any cut of a hold in time loses nothing."""
    start_us, end_us = held_us
    nano_usd_per_us = Fraction(exact_usd(hold.usd_per_hour)) * NANO_USD_PER_USD / _US_PER_HOUR
    held_since_us = _us(hold.started_at_s)
    before = int(nano_usd_per_us * (start_us - held_since_us))
    return int(nano_usd_per_us * (end_us - held_since_us)) - before


def _clip(
    intervals: Iterable[tuple[int, int, str]], held_us: tuple[int, int]
) -> list[tuple[int, int, str]]:
    held_start_us, held_end_us = held_us
    clipped = [
        (max(start_us, held_start_us), min(end_us, held_end_us), request_id)
        for start_us, end_us, request_id in intervals
    ]
    return [interval for interval in clipped if interval[0] < interval[1]]


def _split_time(served: Sequence[tuple[int, int, str]], held_us: tuple[int, int]) -> list[int]:
    """The time that each request had to itself, and last the idle time, in 2**-64 microseconds.

    One pass over the edges: a request's part is the difference of the running per-request total
    between its end and its start, so the cost does not grow with the number in flight.
    """
    edges = [(start_us, 1, index) for index, (start_us, _, _) in enumerate(served)]
    edges += [(end_us, -1, index) for index, (_, end_us, _) in enumerate(served)]
    weights = [0] * len(served)
    now_us, end_us = held_us
    in_flight = per_request = idle = 0
    for at_us, step, index in sorted(edges):
        elapsed = (at_us - now_us) << _SPLIT_BITS
        if in_flight:
            per_request += elapsed // in_flight
        else:
            idle += elapsed
        now_us = at_us
        in_flight += step
        weights[index] = per_request - weights[index] if step < 0 else per_request
    idle += (end_us - now_us) << _SPLIT_BITS
    return [*weights, idle]


def _us(at_s: float) -> int:
    return round(at_s * _US_PER_S)
