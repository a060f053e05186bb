"""Who gets what, where several models compete for a pool's room or for the platform's budget.

Each model first decides alone; what it wants becomes its bid. What runs stays, unless a group that
finds no place elsewhere has a higher priority, or is worth more than twice as much for its price.
A group that is let in waits until those that make way for it have ended.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.capacity import held_workers
from expertmesh.core.scaling.contract import (
    ActionKind,
    Binding,
    Decision,
    Grant,
    GroupRecord,
    Observation,
    ScalingConfig,
    workers_of,
)
from expertmesh.core.scaling.kinds import Kind, Kinds, kind_of, kinds_of, miss_usd_per_hour

_WORTH_MORE = 2.0
"""Of a running group's value for its price: below it, nothing is moved between equal models."""
_LEAST_USD_PER_HOUR = 1e-6
_CLOSE = 1e-6
_SERVES_OR_WILL = (GroupState.READY, GroupState.STARTING, GroupState.DRAINING)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one group could be, and what it is worth there."""

    pool: str
    workers: int
    usd_per_hour: float
    value_usd_per_hour: float
    """What it would cost not to have it."""

    @property
    def worth(self) -> float:
        return self.value_usd_per_hour / max(self.usd_per_hour, _LEAST_USD_PER_HOUR)


@dataclass(frozen=True, slots=True)
class Ask:
    """One group that a model wants."""

    places: tuple[Place, ...]
    """The one that suits it best first; a group that is there has one."""
    is_there: bool
    is_fixed: bool = False
    """It is there and may not be taken away."""


@dataclass(frozen=True, slots=True)
class Bid:
    model: str
    priority: int
    asks: tuple[Ask, ...]
    pools: tuple[str, ...] = ()
    """That it may use."""
    there_workers: Mapping[str, int] = field(default_factory=dict)
    """By pool, of all its groups until they are gone."""
    there_usd_per_hour: float = 0.0
    starts_workers: Mapping[str, int] = field(default_factory=dict)
    """By pool: what it would start at once."""
    starts_usd_per_hour: float = 0.0


def bid_of(
    config: ScalingConfig, decision: Decision, observation: Observation, now_s: float
) -> Bid:
    """From what the model has decided without a grant."""
    started = {act.group for act in decision.actions if act.kind is ActionKind.START}
    there = [record for record in decision.state.groups if record.spec.name not in started]
    leaving = {seen.name: seen for seen in observation.groups if seen.leaving_at_s is not None}
    usable = [
        record
        for record in there
        if record.removed_at_s is None
        and record.state in _SERVES_OR_WILL
        and record.spec.name not in leaving
    ]
    pools = {pool.name: pool for pool in config.pools}
    there_workers: dict[str, int] = {}
    for record in there:
        name = record.spec.pool
        gone = leaving[record.spec.name].leaving_workers if record.spec.name in leaving else 0
        held = held_workers(pools.get(name), record, gone)
        there_workers[name] = there_workers.get(name, 0) + held
    starts = [act.spec for act in decision.actions if act.spec is not None]
    starts_workers: dict[str, int] = {}
    for spec in starts:
        workers = workers_of(spec.parallelism)
        starts_workers[spec.pool] = starts_workers.get(spec.pool, 0) + workers
    return Bid(
        model=config.model,
        priority=config.rules.priority,
        asks=tuple(_asks(config, decision, usable, _may_be_moved(config, observation), now_s)),
        pools=tuple(sorted(pools)),
        there_workers=there_workers,
        there_usd_per_hour=sum(record.spec.usd_per_hour for record in there),
        starts_workers=starts_workers,
        starts_usd_per_hour=sum(spec.usd_per_hour for spec in starts),
    )


def _may_be_moved(config: ScalingConfig, observation: Observation) -> bool:
    """Not what is only observed, and nothing while it cannot be seen what it does."""
    return (
        config.rules.mode is ScalingMode.ACT
        and observation.serve_answers
        and observation.journal_writes
        and observation.settled
    )


def _asks(
    config: ScalingConfig,
    decision: Decision,
    usable: Sequence[GroupRecord],
    movable: bool,
    now_s: float,
) -> Iterable[Ask]:
    acts = config.rules.mode is ScalingMode.ACT
    movable = movable and decision.demand.live_gateways > 0 and not decision.demand.stale_gateways
    state = decision.state
    kinds = kinds_of(config, state, state.work, [record.spec for record in state.groups])
    worth = _Worth(config, kinds, decision.load.needed)
    have: dict[str, int] = {}
    for record in usable:
        if acts or record.state is not GroupState.DRAINING:
            name = kind_of(config, record.spec)
            have[name] = have.get(name, 0) + 1
    wanted = decision.target if acts else have
    for name, count in sorted(wanted.items()):
        for _ in range(min(count, have.get(name, 0))):
            place = worth.next(kinds.named(name))
            yield Ask((place,), is_there=True, is_fixed=not movable)
    if not acts:
        return
    offered = [kind for kind in kinds.all if kind.is_offered]
    for name, count in sorted(wanted.items()):
        for _ in range(count - have.get(name, 0)):
            first = kinds.named(name)
            yield Ask(worth.next_of([first, *(k for k in offered if k is not first)]), False)
    if decision.binding is not Binding.ROOM:
        return
    # Others have the room that it lacks.
    choices = [kind for kind in offered if not _is_held_back(kind, decision, now_s)]
    choices.sort(key=lambda kind: (kind.option.usd_per_hour / kinds.capacity(kind), kind.name))
    while choices and worth.lacks(config.rules.max_groups):
        yield Ask(worth.next_of(choices), is_there=False)


def _is_held_back(kind: Kind, decision: Decision, now_s: float) -> bool:
    backoff = decision.state.backoff.get(kind.option.pool)
    zone = decision.state.zones.get(kind.zone) if kind.zone is not None else None
    return (backoff is not None and now_s < backoff.until_s) or (
        zone is not None and not zone.is_admitted(now_s)
    )


class _Worth:
    """The value of one group after the other: each carries what those before it do not."""

    def __init__(self, config: ScalingConfig, kinds: Kinds, load: float) -> None:
        self._kinds = kinds
        self._min_groups = config.rules.min_groups
        self._budget = config.rules.usd_per_hour_budget
        self._miss = miss_usd_per_hour(kinds, config.slo)
        self._left = load
        self._count = 0
        self._usd = 0.0

    def next(self, kind: Kind) -> Place:
        place = self._place(kind)
        self._take(kind)
        return place

    def next_of(self, kinds: Sequence[Kind]) -> tuple[Place, ...]:
        places = tuple(self._place(kind) for kind in kinds)
        self._take(kinds[0])
        return places

    def lacks(self, max_groups: int) -> bool:
        if self._count >= max_groups:
            return False
        if self._budget is not None and self._usd >= self._budget:
            return False
        return self._left > _CLOSE or self._count < self._min_groups

    def _take(self, kind: Kind) -> None:
        self._left = max(0.0, self._left - self._kinds.capacity(kind))
        self._usd += kind.option.usd_per_hour
        self._count += 1

    def _place(self, kind: Kind) -> Place:
        option = kind.option
        capacity = self._kinds.capacity(kind)
        carried = capacity if self._count < self._min_groups else min(capacity, self._left)
        value = max(option.usd_per_hour, self._miss * carried)
        return Place(option.pool, option.workers, option.usd_per_hour, value)


def allocate(
    bids: Sequence[Bid], pools: Mapping[str, int | None], usd_per_hour: float | None
) -> dict[str, Grant | None]:
    """`pools`: workers that each can hold, None where that is not known; a pool that is missing
    holds any number. `usd_per_hour`: the platform's budget. None for a model that gets all that it
    wants."""
    table = _Table(bids, pools, usd_per_hour)
    table.seat()
    return {bid.model: table.grant(bid) for bid in table.bids}


@dataclass(slots=True)
class _Seat:
    bid: Bid
    ask: Ask
    number: int
    """Of the ask in its bid."""
    place: Place | None = None
    """None: it has none."""
    waits: bool = False
    """It has a place that others have not left yet."""

    @property
    def order(self) -> tuple[float, float, float, str, int]:
        """Smaller is served earlier."""
        best = self.ask.places[0]
        value = best.value_usd_per_hour
        return (-self.bid.priority, -best.worth, -value, self.bid.model, self.number)


class _Table:
    def __init__(
        self, bids: Sequence[Bid], pools: Mapping[str, int | None], usd_per_hour: float | None
    ) -> None:
        self.bids = sorted(bids, key=lambda bid: bid.model)
        self.budget = usd_per_hour
        self.limits = {name: workers for name, workers in pools.items() if workers is not None}
        self.room: dict[str, float] = dict(self.limits)
        """Left of each pool, once all is as it should be."""
        self.money = math.inf if usd_per_hour is None else usd_per_hour
        self.seats = sorted(
            (
                _Seat(bid, ask, number)
                for bid in self.bids
                for number, ask in enumerate(bid.asks)
                if ask.places
            ),
            key=lambda seat: seat.order,
        )
        self.seats_of: dict[str, list[_Seat]] = {bid.model: [] for bid in self.bids}
        for seat in self.seats:
            self.seats_of[seat.bid.model].append(seat)
        self.movable = [
            seat for seat in reversed(self.seats) if seat.ask.is_there and not seat.ask.is_fixed
        ]
        """The one of least value first."""
        self.room_now = dict(self.room)
        self.money_now = self.money
        for bid in self.bids:
            for pool, workers in bid.there_workers.items():
                if pool in self.room_now:
                    self.room_now[pool] -= workers
            self.money_now -= bid.there_usd_per_hour

    def seat(self) -> None:
        for seat in self.seats:
            if seat.ask.is_there:
                self._take(seat, seat.ask.places[0])
        self._shed()
        new = [seat for seat in self.seats if not seat.ask.is_there]
        for seat in new:
            place = next((each for each in seat.ask.places if self._has_room(each)), None)
            if place is None:
                place = self._make_way(seat)
            if place is not None:
                self._take(seat, place)
        for seat in new:
            if seat.place is not None:
                self._wait_or_start(seat, seat.place)
        # What is over goes to those who got less than they want, the first one first.
        self.spare = {
            pool: max(0.0, min(left, self.room[pool])) for pool, left in self.room_now.items()
        }
        self.spare_usd = max(0.0, min(self.money_now, self.money))
        self.served: dict[str, Grant | None] = {}
        for bid in sorted(self.bids, key=lambda bid: (-bid.priority, bid.model)):
            self.served[bid.model] = self._grant(bid) if self._is_restrained(bid) else None

    def grant(self, bid: Bid) -> Grant | None:
        return self.served[bid.model]

    def _take(self, seat: _Seat, place: Place, sign: int = 1) -> None:
        if place.pool in self.room:
            self.room[place.pool] -= sign * place.workers
        self.money -= sign * place.usd_per_hour
        seat.place = place if sign > 0 else None

    def _has_room(self, place: Place) -> bool:
        room = self.room.get(place.pool, math.inf)
        return place.workers <= room and place.usd_per_hour <= self.money + _CLOSE

    def _shed(self) -> None:
        """Where a pool or the budget has become too small for what is there."""
        for seat in self.movable:
            place = seat.place
            if place is None:
                continue
            if self.money < -_CLOSE or self.room.get(place.pool, 0.0) < 0:
                self._take(seat, place, -1)

    def _make_way(self, seat: _Seat) -> Place | None:
        """The place for it at which the least is lost, which is freed; None when there is none."""
        best: tuple[float, Place, list[_Seat]] | None = None
        for place in seat.ask.places:
            victims = self._victims(seat, place)
            if victims is None:
                continue
            lost = sum(v.place.value_usd_per_hour for v in victims if v.place is not None)
            if best is None or lost < best[0]:
                best = (lost, place, victims)
        if best is None:
            return None
        for victim in best[2]:
            assert victim.place is not None
            self._take(victim, victim.place, -1)
        return best[1]

    def _victims(self, seat: _Seat, place: Place) -> list[_Seat] | None:
        lacking = place.workers - self.room.get(place.pool, math.inf)
        lacking_usd = place.usd_per_hour - self.money
        victims: list[_Seat] = []
        for other in self.movable:
            if lacking <= 0 and lacking_usd <= _CLOSE:
                break
            there = other.place
            if there is None or other.bid is seat.bid:
                continue
            if not _outranks(seat, place, other, there):
                # Nor those that follow: they are of higher priority or worth more.
                break
            if there.pool != place.pool and lacking_usd <= _CLOSE:
                continue
            victims.append(other)
            lacking -= there.workers if there.pool == place.pool else 0
            lacking_usd -= there.usd_per_hour
        if lacking > 0 or lacking_usd > _CLOSE:
            return None
        return _needed(victims, place.pool, -lacking, -lacking_usd)

    def _wait_or_start(self, seat: _Seat, place: Place) -> None:
        room = self.room_now.get(place.pool, math.inf)
        seat.waits = place.workers > room or place.usd_per_hour > self.money_now + _CLOSE
        if seat.waits:
            return
        if place.pool in self.room_now:
            self.room_now[place.pool] -= place.workers
        self.money_now -= place.usd_per_hour

    def _is_restrained(self, bid: Bid) -> bool:
        """It would start what it may not, or keep what it has to give up."""
        own = self.seats_of[bid.model]
        if any(seat.place is None for seat in own):
            return True
        new = [s.place for s in own if s.place and not s.ask.is_there and not s.waits]
        starts: dict[str, int] = {}
        for place in new:
            starts[place.pool] = starts.get(place.pool, 0) + place.workers
        usd = sum(place.usd_per_hour for place in new)
        return any(
            workers > starts.get(pool, 0) for pool, workers in bid.starts_workers.items()
        ) or (self.budget is not None and bid.starts_usd_per_hour > usd + _CLOSE)

    def _grant(self, bid: Bid) -> Grant:
        own = self.seats_of[bid.model]
        workers = dict.fromkeys(sorted({*bid.pools} & {*self.limits}), 0)
        usd = 0.0
        for seat in own:
            if seat.place is not None and not seat.waits:
                if seat.place.pool in workers:
                    workers[seat.place.pool] += seat.place.workers
                usd += seat.place.usd_per_hour
        why = self._why(bid, own)
        for pool in workers:
            workers[pool] += int(self.spare[pool])
            self.spare[pool] = 0.0
        if self.budget is None:
            return Grant(workers, None, why)
        usd, self.spare_usd = usd + self.spare_usd, 0.0
        return Grant(workers, usd, why)

    def _why(self, bid: Bid, own: Sequence[_Seat]) -> str:
        """Who has the rest of what it wants more of."""
        lacking = [seat for seat in own if seat.place is None or seat.waits]
        pools = sorted({place.pool for seat in lacking for place in seat.ask.places})
        parts = []
        for pool in pools:
            limit = self.limits.get(pool)
            if limit is None:
                continue
            short = all(
                place.workers > self.room_now.get(pool, math.inf)
                for seat in lacking
                for place in seat.ask.places
                if place.pool == pool
            )
            holders = self._holders(bid, pool)
            if short and holders:
                parts.append(f"of {limit} workers in pool {pool} {holders}")
        if self.budget is not None:
            usd = [place.usd_per_hour for seat in lacking for place in seat.ask.places]
            if usd and min(usd) > min(self.money_now, self.money) + _CLOSE:
                spent = self._spenders(bid)
                parts.append(f"the platform's budget is ${self.budget:.2f}/h{spent}")
        if any(seat.waits for seat in lacking):
            parts.append("groups that make way have not ended yet")
        return ", ".join(parts) or "others start groups at this moment"

    def _holders(self, bid: Bid, pool: str) -> str:
        sums: dict[str, int] = {}
        for seat in self.seats:
            if seat.bid is not bid and seat.place is not None and seat.place.pool == pool:
                sums[seat.bid.model] = sums.get(seat.bid.model, 0) + seat.place.workers
        for other in self.bids:
            there = other.there_workers.get(pool, 0)
            if other is not bid and there:
                sums[other.model] = max(there, sums.get(other.model, 0))
        priorities = {other.model: other.priority for other in self.bids}
        return " and ".join(
            f"{model} (priority {priorities[model]}) has {workers}"
            for model, workers in sorted(sums.items(), key=lambda item: (-item[1], item[0]))
        )

    def _spenders(self, bid: Bid) -> str:
        sums: dict[str, float] = {}
        for seat in self.seats:
            if seat.bid is not bid and seat.place is not None:
                model = seat.bid.model
                sums[model] = sums.get(model, 0.0) + seat.place.usd_per_hour
        priorities = {other.model: other.priority for other in self.bids}
        parts = [
            f"{model} (priority {priorities[model]}) has ${usd:.2f}/h"
            for model, usd in sorted(sums.items(), key=lambda item: (-item[1], item[0]))
        ]
        return f", of which {' and '.join(parts)}" if parts else ""


def _outranks(seat: _Seat, place: Place, other: _Seat, there: Place) -> bool:
    if seat.bid.priority != other.bid.priority:
        return seat.bid.priority > other.bid.priority
    return place.worth > _WORTH_MORE * there.worth


def _needed(victims: list[_Seat], pool: str, over: float, over_usd: float) -> list[_Seat]:
    """Without those whose going turned out not to be needed, the ones of most value first."""
    kept = []
    for victim in reversed(victims):
        assert victim.place is not None
        workers = victim.place.workers if victim.place.pool == pool else 0
        if workers <= over and victim.place.usd_per_hour <= over_usd + _CLOSE:
            over -= workers
            over_usd -= victim.place.usd_per_hour
        else:
            kept.append(victim)
    return kept
