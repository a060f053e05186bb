"""The cheapest mix of groups that carries a load: a small integer program, solved exactly.

It minimises, over a horizon, what the groups cost, what starting them costs, and what a shortage
costs, now and after the loss of a spot zone. Depth-first search with a lower bound; a search that
grows too large keeps the best mix found, which begins as a greedy one.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

_MOST_NODES = 2_000
"""Of the search tree; it seldom has 200."""
_ALIKE = 0.01
"""Mixes whose costs differ by less than this share of a group's are alike: then change less."""
_CLOSE = 0.002
"""A mix within this share of the lower bound is good enough."""
_ENOUGH = 1e-9
"""A shortage below this is none."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Groups of one kind that can be had."""

    option: str
    pool: str
    capacity: float
    """Of one group, in the unit of the load."""
    usd: float
    """What one group costs over the horizon, risk of loss included."""
    start_usd: float
    """What starting one costs beside that."""
    usd_per_hour: float
    """Its plain price, as a budget counts it."""
    workers: int
    kept: int = 0
    """Groups that are there, or on the way: they need no start."""
    limit: int | None = None
    """Groups at most; None: as many as the pool has room for."""
    spot_zone: str | None = None
    """None: it cannot be lost."""

    def only(self, groups: int) -> "Offer":
        """So many of those that are there, and no more."""
        return Offer(
            self.option,
            self.pool,
            self.capacity,
            self.usd,
            self.start_usd,
            self.usd_per_hour,
            self.workers,
            kept=groups,
            limit=groups,
            spot_zone=self.spot_zone,
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    min_groups: int
    max_groups: int
    workers: dict[str, int]
    """By pool, that all groups of this model may take there; a pool that is missing has none."""
    usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    load: float
    """To be carried."""
    _: KW_ONLY
    short_usd: float
    """What a shortage of 1 costs over the horizon; infinite: whatever can be had."""
    cover: float = 0.0
    """To be carried still when all spot groups of any one zone are lost."""
    uncovered_usd: float = 0.0
    """What a shortage of 1 after the loss of a zone costs, times its likelihood."""


@dataclass(frozen=True, slots=True)
class Mix:
    counts: tuple[int, ...]
    """By offer."""
    capacity: float
    short: float
    """Load that is not carried."""
    uncovered: float
    """Load that would not be carried after the worst loss of a zone."""
    usd: float
    """The objective."""
    usd_per_hour: float
    """Plain price."""

    @property
    def groups(self) -> int:
        return sum(self.counts)


def cheapest(offers: Sequence[Offer], need: Need, bounds: Bounds) -> Mix:
    """Always an answer: when nothing can be had, the empty mix with all of the load short.

    Below `min_groups` only when there is no room or money for so many.
    """
    search = _Search(offers, need, bounds)
    search.greedy()
    search.descend(0, need.load, 0.0, 0, 0.0, 0.0)
    return search.best_mix()


def priced(offers: Sequence[Offer], need: Need, counts: Sequence[int]) -> Mix:
    """A given mix, whether or not it keeps within bounds."""
    capacity, cost, hourly = 0.0, 0.0, 0.0
    by_zone: dict[str, float] = {}
    for n, offer in zip(counts, offers, strict=True):
        if not n:
            continue
        capacity += n * offer.capacity
        cost += n * offer.usd + max(0, n - offer.kept) * offer.start_usd
        hourly += n * offer.usd_per_hour
        if offer.spot_zone is not None:
            held = by_zone.get(offer.spot_zone, 0.0)
            by_zone[offer.spot_zone] = held + n * offer.capacity
    short = max(0.0, need.load - capacity)
    uncovered = max(0.0, need.cover - capacity + max(by_zone.values(), default=0.0))
    if short > _ENOUGH:
        cost += short * need.short_usd
    if uncovered > _ENOUGH:
        cost += uncovered * need.uncovered_usd
    return Mix(tuple(counts), capacity, short, uncovered, cost, hourly)


def churn_usd(offers: Sequence[Offer], counts: Sequence[int]) -> float:
    """What a mix's difference to what there is counts for, where mixes are compared."""
    usd = 0.0
    for n, offer in zip(counts, offers, strict=True):
        if n != offer.kept:
            usd += _ALIKE * abs(n - offer.kept) * offer.usd
    return usd


def fits(offers: Sequence[Offer], bounds: Bounds, counts: Sequence[int]) -> bool:
    """Whether a given mix keeps within bounds."""
    workers: dict[str, int] = {}
    for n, offer in zip(counts, offers, strict=True):
        workers[offer.pool] = workers.get(offer.pool, 0) + n * offer.workers
        if offer.limit is not None and n > offer.limit:
            return False
    hourly = sum(n * offer.usd_per_hour for n, offer in zip(counts, offers, strict=True))
    return (
        bounds.min_groups <= sum(counts) <= bounds.max_groups
        and all(used <= bounds.workers.get(pool, 0) for pool, used in workers.items())
        and (bounds.usd_per_hour is None or hourly <= bounds.usd_per_hour + 1e-6)
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the load that groups of one offer can carry, if groups could be divided."""

    usd: float
    """Per unit of load."""
    place: int
    """Of the offer in the order of the search."""
    capacity: float
    """Of all its groups together."""


class _Search:
    def __init__(self, offers: Sequence[Offer], need: Need, bounds: Bounds) -> None:
        self.need = need
        self.bounds = bounds
        self.asked = offers
        self.left = dict(bounds.workers)
        # Cheapest work first, so that the first descents are good ones.
        self.order = sorted(
            (i for i, offer in enumerate(offers) if self.most_of(offer, 0, 0.0)),
            key=lambda i: (_unit_usd(offers[i]), i),
        )
        self.offers = [offers[i] for i in self.order]
        self.counts = [0] * len(self.offers)
        self.by_zone: dict[str, float] = {}
        """What the spot groups so far can do, that a zone's loss would take."""
        self.best_counts: list[int] | None = None
        self.best_usd = math.inf
        self.best_missing = math.inf
        """Groups that the best mix has too few for `min_groups`."""
        self.enough_usd = math.inf
        """A mix that costs as much is no better than the best."""
        self.nodes = 0
        self.pieces = self._pieces()
        self.pieces_from = [self.pieces]
        """Those of the offers from each place on."""
        for place in range(len(self.offers)):
            self.pieces_from.append([p for p in self.pieces_from[place] if p.place > place])
        self.cover_usd = [
            min(pieces[0].usd, need.uncovered_usd) if pieces else need.uncovered_usd
            for pieces in self.pieces_from
        ]
        """Least price of a load of 1 that a zone's loss leaves, with the offers from a place on."""
        lossy = any(offer.spot_zone is not None for offer in offers)
        self.covers = need.uncovered_usd > 0 and (lossy or need.cover > need.load)
        cover = need.cover if self.covers else 0.0
        self.cover_groups = [
            max(0, math.ceil(cover / offer.capacity - _ENOUGH)) for offer in self.offers
        ]
        """That carry all that is to be carried still after a loss."""

    def _pieces(self) -> list[_Piece]:
        pieces = []
        for place, offer in enumerate(self.offers):
            most = self.most(place, 0, 0.0)
            kept = min(offer.kept, most)
            unit_usd = offer.usd / offer.capacity
            if kept:
                pieces.append(_Piece(unit_usd, place, kept * offer.capacity))
            if most > kept:
                start_usd = offer.start_usd / offer.capacity
                more = (most - kept) * offer.capacity
                pieces.append(_Piece(unit_usd + start_usd, place, more))
        return sorted(pieces, key=lambda piece: piece.usd)

    def most(self, place: int, groups: int, hourly: float) -> int:
        return self.most_of(self.offers[place], groups, hourly)

    def most_of(self, offer: Offer, groups: int, hourly: float) -> int:
        """Groups of this offer that limits, room and money allow."""
        bounds = self.bounds
        most = bounds.max_groups - groups
        room = self.left.get(offer.pool, 0) // offer.workers
        if room < most:
            most = room
        if offer.limit is not None and offer.limit < most:
            most = offer.limit
        if bounds.usd_per_hour is not None and offer.usd_per_hour > 0:
            money = bounds.usd_per_hour - hourly + 1e-6
            most = min(most, math.floor(money / offer.usd_per_hour))
        return most if most > 0 else 0

    def is_no_better(self, place: int, load: float, usd: float, zone_capacity: float) -> bool:
        """Whatever is added of the offers from `place` on."""
        if self.best_missing:
            return False
        if load > _ENOUGH:
            usd += self.least_usd(place, load)
        if usd >= self.enough_usd:
            return True
        if not self.covers:
            return False
        return usd + self.least_uncovered_usd(place, load, zone_capacity) >= self.enough_usd

    def least_usd(self, place: int, load: float) -> float:
        """A lower bound on what it costs to carry this load with the offers from `place` on."""
        usd = 0.0
        short_usd = self.need.short_usd
        for piece in self.pieces_from[place]:
            if piece.usd >= short_usd:
                break
            if load <= piece.capacity:
                return usd + load * piece.usd
            usd += piece.capacity * piece.usd
            load -= piece.capacity
            if load <= _ENOUGH:
                return usd
        return usd + load * short_usd

    def least_uncovered_usd(self, place: int, load: float, zone_capacity: float) -> float:
        """A lower bound on the price of a zone's loss: it is borne, or covered by more groups,
        which cost at least as much as the cheapest piece that is left."""
        carried = self.need.load if load > 0 else self.need.load - load
        bare = self.need.cover - carried + zone_capacity
        return bare * self.cover_usd[place] if bare > _ENOUGH else 0.0

    def greedy(self) -> None:
        """The cheapest pieces in whole groups; then, for the last group, each offer in turn."""
        load, groups, hourly = self.need.load, 0, 0.0
        for piece in self.pieces:
            offer = self.offers[piece.place]
            taken = 0.0
            while (
                taken < piece.capacity
                and load >= offer.capacity
                and self._may_add(piece.place, groups, hourly)
            ):
                self.counts[piece.place] += 1
                self.left[offer.pool] -= offer.workers
                groups, hourly = groups + 1, hourly + offer.usd_per_hour
                load -= offer.capacity
                taken += offer.capacity
        counts, left = list(self.counts), dict(self.left)
        known = False
        for last in range(len(self.offers)):
            if load > _ENOUGH and self._may_add(last, groups, hourly):
                self._close(last, load, groups, hourly)
                self.counts, self.left = list(counts), dict(left)
            elif not known:
                self.take_if_better(groups)
                known = True
        self.left = dict(self.bounds.workers)
        self.counts = [0] * len(self.offers)

    def _close(self, place: int, load: float, groups: int, hourly: float) -> None:
        """The rest of the load in groups of one offer."""
        offer = self.offers[place]
        while load > _ENOUGH and self._may_add(place, groups, hourly):
            self.counts[place] += 1
            self.left[offer.pool] -= offer.workers
            groups, hourly = groups + 1, hourly + offer.usd_per_hour
            load -= offer.capacity
        self.take_if_better(groups)

    def _may_add(self, place: int, groups: int, hourly: float) -> bool:
        limit = self.offers[place].limit
        within = limit is None or self.counts[place] < limit
        return within and self.most(place, groups, hourly) > 0

    def descend(
        self,
        place: int,
        load: float,
        usd: float,
        groups: int,
        hourly: float,
        zone_capacity: float,
    ) -> None:
        """`load` is what is still to be carried, `usd` what the groups so far cost, and
        `zone_capacity` the most that the loss of one zone would take of them."""
        self.nodes += 1
        if self.nodes > _MOST_NODES or self.is_no_better(place, load, usd, zone_capacity):
            return
        lacking = self.bounds.min_groups - groups
        if place == len(self.offers) or (load <= _ENOUGH and lacking <= 0 and not self.covers):
            self.take_if_better(groups)
            return
        offer = self.offers[place]
        pool, zone = offer.pool, offer.spot_zone
        fill = load / offer.capacity
        useful = max(math.ceil(fill - _ENOUGH), lacking, self.cover_groups[place])
        most = self.most_of(offer, groups, hourly)
        left = self.left[pool]
        held = 0.0 if zone is None else self.by_zone.get(zone, 0.0)
        # All that follows runs ten thousand times a turn of many models.
        for n in _nearest_first(fill, min(useful, most)):
            if not n:
                cost = usd
            else:
                cost = usd + n * offer.usd
                if n > offer.kept:
                    cost += (n - offer.kept) * offer.start_usd
                if cost >= self.enough_usd and not self.best_missing:
                    self.nodes += 1
                    continue
            most_lost = zone_capacity
            if zone is not None:
                self.by_zone[zone] = lost = held + n * offer.capacity
                if lost > most_lost:
                    most_lost = lost
            self.counts[place] = n
            self.left[pool] = left - n * offer.workers
            self.descend(
                place + 1,
                load - n * offer.capacity,
                cost,
                groups + n,
                hourly + n * offer.usd_per_hour,
                most_lost,
            )
        self.counts[place] = 0
        self.left[pool] = left
        if zone is not None:
            self.by_zone[zone] = held

    def take_if_better(self, groups: int) -> None:
        mix = priced(self.offers, self.need, self.counts)
        missing = max(0, self.bounds.min_groups - groups)
        usd = mix.usd + churn_usd(self.offers, self.counts)
        if (missing, usd) < (self.best_missing, self.best_usd):
            self.best_counts = list(self.counts)
            self.best_missing, self.best_usd = missing, usd
            self.enough_usd = usd * (1 - _CLOSE)

    def best_mix(self) -> Mix:
        counts = [0] * len(self.asked)
        for place, n in zip(self.order, self.best_counts or self.counts, strict=True):
            counts[place] = n
        return priced(self.asked, self.need, counts)


def _nearest_first(fill: float, high: int) -> Sequence[int]:
    """The numbers up to `high`, of two that are as near the lower one first."""
    if fill <= 0:
        return range(high + 1)
    if abs(high - fill) < abs(high - 1 - fill):
        return range(high, -1, -1)
    return sorted(range(high + 1), key=lambda n: abs(n - fill))


def _unit_usd(offer: Offer) -> float:
    return offer.usd / offer.capacity
