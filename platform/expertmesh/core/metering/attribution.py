"""Divide what the groups cost between the requests they served and the time they served none.

Each instant's cost is split among the requests in flight at the group at that instant, in
proportion to their work a second: the group's time that a request takes, over the time that it was
in flight. A group whose rates are not known splits it equally. With nobody in flight the cost is
that of starting, of draining or of idle time. Amounts are integers of nano-dollars, and cost =
attributed + idle + starting + draining holds to the last of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.node_cost import Piece, PoolCost, capacity_cost, us_of
from expertmesh.core.metering.usage import UsageRecord

NANO_USD_PER_USD = 1_000_000_000
# Fractional bits of a microsecond's split; their error is far below a nano-dollar.
_SPLIT_BITS = 96
# Of a request's work a microsecond, so that it is an integer.
_WORK_BITS = 60
_PART_BITS = 32
_LONGEST_S = 1e9
_MOST_PENDING = 4096
"""Parts of requests that wait to be priced: bounds memory and the size of sums."""
_MILLI = 1000


@dataclass(frozen=True, slots=True)
class HoldCost:
    """One hold inside the window that was asked for."""

    hold: CapacityHold
    attributed_nano_usd: int
    idle_nano_usd: int
    """Ready, with nothing to do."""
    starting_nano_usd: int = 0
    draining_nano_usd: int = 0
    idle_us: int = 0
    starting_us: int = 0
    draining_us: int = 0
    resting_energy_uj: int | None = 0
    """With nobody in flight, in microjoules; None: not known."""

    @property
    def cost_nano_usd(self) -> int:
        return (
            self.attributed_nano_usd
            + self.idle_nano_usd
            + self.starting_nano_usd
            + self.draining_nano_usd
        )


@dataclass(slots=True)
class RequestCost:
    nano_usd: int = 0
    prefill_nano_usd: int = 0
    """Part of it; with `decode_nano_usd` all of it where the group's rates are known."""
    decode_nano_usd: int = 0
    energy_uj: int | None = 0
    """None: not known."""


@dataclass(frozen=True, slots=True)
class Attribution:
    holds: tuple[HoldCost, ...]
    costs: Mapping[str, RequestCost]
    """By request id; a request that no hold served has no entry."""
    pools: tuple[PoolCost, ...] = ()

    @property
    def requests(self) -> dict[str, int]:
        """Request id to its share in nano-dollars."""
        return {request_id: cost.nano_usd for request_id, cost in self.costs.items()}

    @property
    def cost_nano_usd(self) -> int:
        """Of groups and idle nodes."""
        return sum(held.cost_nano_usd for held in self.holds) + self.idle_nodes_nano_usd

    @property
    def attributed_nano_usd(self) -> int:
        return sum(cost.nano_usd for cost in self.costs.values())

    @property
    def idle_nano_usd(self) -> int:
        return sum(held.idle_nano_usd for held in self.holds)

    @property
    def idle_nodes_nano_usd(self) -> int:
        return sum(pool.idle_nodes_nano_usd for pool in self.pools)


def attribute(
    holds: Sequence[CapacityHold],
    requests: Iterable[UsageRecord],
    now_s: float,
    since_s: float | None = None,
    nodes: Sequence[NodeHold] = (),
) -> Attribution:
    """Costs from `since_s` (or the start) to `now_s`.

    Adjacent windows add up to their union, for each hold and each of its parts; a single request's
    share may move by a nano-dollar or two with the cut.
    """
    until_us = us_of(now_s)
    if since_s is None:
        starts_s = [hold.started_at_s for hold in holds] + [node.started_at_s for node in nodes]
        since_s = min(starts_s, default=now_s)
    since_us = us_of(since_s)
    in_flight: dict[str, list[_Flight]] = {}
    for request in requests:
        flight = (us_of(request.at_s + request.queue_s), us_of(request.finished_at_s), request)
        in_flight.setdefault(request.group, []).append(flight)
    for flights in in_flight.values():
        flights.sort(key=_order)
    capacity = capacity_cost(holds, nodes, since_us, until_us)
    found: dict[str, RequestCost] = {}
    costs = tuple(
        _Sweep(hold, pieces, found).run(in_flight.get(hold.group, ()))
        for hold, pieces in zip(holds, capacity.pieces, strict=True)
    )
    return Attribution(costs, found, capacity.pools)


_Flight = tuple[int, int, UsageRecord]


def _order(flight: _Flight) -> tuple[int, int, str]:
    start_us, end_us, request = flight
    return start_us, end_us, request.request_id


@dataclass(slots=True)
class _Active:
    request: UsageRecord
    density: int
    prefill_part: int | None
    """Of its work, in 2**-_PART_BITS; None when the group's rates are not known."""
    since: int
    """The running total per density from which it pays."""


class _Sweep:
    """One pass over a hold's time, from edge to edge.

    A request's part is the difference of the running total per density between its end and its
    start, so the cost does not grow with the number in flight. Parts of one busy time wait until
    its end, and then divide what it cost.
    """

    def __init__(
        self, hold: CapacityHold, pieces: Sequence[Piece], found: dict[str, RequestCost]
    ) -> None:
        self._hold = hold
        self._pieces = pieces
        self._found = found
        self._active: dict[int, _Active] = {}
        self._density = 0
        self._per_density = 0
        self._pending: list[tuple[_Active, int]] = []
        self._busy_from_us = 0
        self._running = 0
        """The piece's running total up to which all is paid."""
        self._attributed = self._idle = self._starting = self._draining = 0
        self._idle_us = self._starting_us = self._draining_us = 0
        self._ready_from_us = None if hold.ready_at_s is None else us_of(hold.ready_at_s)
        self._draining_from_us = None if hold.draining_at_s is None else us_of(hold.draining_at_s)
        self._busy_mw = None if hold.busy_watts is None else round(hold.busy_watts * _MILLI)

    def run(self, flights: Sequence[_Flight]) -> HoldCost:
        """`flights` in the order of `_order`."""
        ends: list[tuple[int, int]] = []
        upcoming = 0
        for piece in self._pieces:
            now_us, end_us = piece.start_us, piece.end_us
            self._busy_from_us = now_us
            self._running = piece.running_nano_usd(now_us)
            while True:
                start_us = flights[upcoming][0] if upcoming < len(flights) else end_us
                at_us = min(max(start_us, now_us), ends[0][0] if ends else end_us, end_us)
                self._pass(piece, now_us, at_us)
                now_us = at_us
                if ends and ends[0][0] <= now_us:
                    self._end(piece, now_us, heappop(ends)[1])
                elif now_us == end_us:
                    break
                else:
                    if flights[upcoming][1] > now_us:
                        self._start(now_us, upcoming, flights[upcoming])
                        heappush(ends, (flights[upcoming][1], upcoming))
                    upcoming += 1
            self._cut(piece, end_us)
        hold = self._hold
        resting_uj = None
        if hold.idle_watts is not None:
            resting_us = self._idle_us + self._starting_us + self._draining_us
            resting_uj = round(hold.idle_watts * _MILLI) * resting_us // _MILLI
        return HoldCost(
            hold=hold,
            attributed_nano_usd=self._attributed,
            idle_nano_usd=self._idle,
            starting_nano_usd=self._starting,
            draining_nano_usd=self._draining,
            idle_us=self._idle_us,
            starting_us=self._starting_us,
            draining_us=self._draining_us,
            resting_energy_uj=resting_uj,
        )

    def _pass(self, piece: Piece, start_us: int, end_us: int) -> None:
        if start_us == end_us:
            return
        if self._active:
            self._per_density += (end_us - start_us << _SPLIT_BITS) // self._density
            return
        # What comes first counts: a group can be drained that never was ready.
        draining_us = end_us if self._draining_from_us is None else self._draining_from_us
        ready_us = draining_us
        if self._ready_from_us is not None:
            ready_us = min(ready_us, self._ready_from_us)
        first_us = min(max(ready_us, start_us), end_us)
        last_us = min(max(draining_us, start_us), end_us)
        if start_us < first_us:
            self._starting_us += first_us - start_us
            self._starting += self._pay_until(piece, first_us)
        if first_us < last_us:
            self._idle_us += last_us - first_us
            self._idle += self._pay_until(piece, last_us)
        if last_us < end_us:
            self._draining_us += end_us - last_us
            self._draining += self._pay_until(piece, end_us)

    def _pay_until(self, piece: Piece, at_us: int) -> int:
        before, self._running = self._running, piece.running_nano_usd(at_us)
        return self._running - before

    def _start(self, now_us: int, number: int, flight: _Flight) -> None:
        if not self._active:
            self._busy_from_us = now_us
        start_us, end_us, request = flight
        work = self._hold.work_s(
            request.prompt_tokens - request.cached_tokens, request.completion_tokens
        )
        density, prefill_part = 1, None
        if work is not None:
            prefill_s, decode_s = work
            work_s = prefill_s + decode_s
            # One more, so that a request without tokens is not free while it is alone.
            density += int(min(work_s, _LONGEST_S) * (1 << _WORK_BITS)) // (end_us - start_us)
            prefill_part = int((prefill_s / work_s if work_s else 1.0) * (1 << _PART_BITS))
        self._density += density
        self._active[number] = _Active(request, density, prefill_part, self._per_density)

    def _end(self, piece: Piece, now_us: int, number: int) -> None:
        ended = self._active.pop(number)
        self._density -= ended.density
        self._pending.append((ended, ended.density * (self._per_density - ended.since)))
        if not self._active:
            self._pay(piece, now_us)
        elif len(self._pending) > _MOST_PENDING + 4 * len(self._active):
            self._cut(piece, now_us)

    def _cut(self, piece: Piece, now_us: int) -> None:
        for active in self._active.values():
            self._pending.append((active, active.density * (self._per_density - active.since)))
            active.since = self._per_density
        self._pay(piece, now_us)

    def _pay(self, piece: Piece, now_us: int) -> None:
        """By running totals: each part is a difference of two, and the last one takes the rest."""
        whole = sum(part for _, part in self._pending)
        nano_usd = self._pay_until(piece, now_us) if whole else 0
        energy_uj = (self._busy_mw or 0) * (now_us - self._busy_from_us) // _MILLI
        running = paid = paid_uj = 0
        for active, part in self._pending:
            running += part
            total = nano_usd * running // whole if whole else 0
            total_uj = energy_uj * running // whole if whole else 0
            self._give(active, total - paid, total_uj - paid_uj)
            paid, paid_uj = total, total_uj
        self._attributed += nano_usd
        self._pending.clear()
        self._busy_from_us = now_us

    def _give(self, active: _Active, nano_usd: int, energy_uj: int) -> None:
        cost = self._found.get(active.request.request_id)
        if cost is None:
            cost = self._found[active.request.request_id] = RequestCost()
        cost.nano_usd += nano_usd
        if active.prefill_part is not None:
            prefill = nano_usd * active.prefill_part >> _PART_BITS
            cost.prefill_nano_usd += prefill
            cost.decode_nano_usd += nano_usd - prefill
        if self._busy_mw is None:
            cost.energy_uj = None
        elif cost.energy_uj is not None:
            cost.energy_uj += energy_uj
