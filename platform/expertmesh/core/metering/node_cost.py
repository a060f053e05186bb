"""What groups cost while their pool's nodes are known, and what of the nodes nobody used.

A pool costs what its nodes cost. Each group has its share of that; shares that are together more
than the nodes are reduced alike, as for a gang that waits for nodes which do not exist yet. What no
group has is idle nodes. Where nobody looked at the nodes, groups cost their own price.

Money is counted in whole nano-dollars. Counted from the start of Unix time at a rate of r, the
moment t has seen floor(r·t) of them, so windows side by side add up. In a pool, nano-dollar number
n belongs to whoever's part of 0 to 1 holds the bits of n read backwards (van der Corput's
sequence): each has one owner whatever window is asked for, nobody has a negative number, and in any
time everybody has what is due to within some tens of nano-dollars.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
from expertmesh.core.metering.rating import exact_usd

_US_PER_S = 1_000_000
# 1 USD an hour is 10/36 nano-dollars a microsecond.
_NANO_USD_PER_US = Fraction(10, 36)
_PART_BITS = 48
_WHOLE = 1 << _PART_BITS
_MILLI = 1000

Terms = tuple[tuple[int, int], ...]
"""The numbers below a bound, as classes (remainder, bits of the modulus)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A time during which the rate of a hold does not change."""

    start_us: int
    end_us: int
    nano_usd_per_us: Fraction
    """Of the hold, or of its whole pool when it has an owner's part."""
    part: tuple[Terms, Terms] | None = None
    """From and to, of the pool's nano-dollars; None: all of them."""

    def nano_usd(self, start_us: int, end_us: int) -> int:
        return self.running_nano_usd(end_us) - self.running_nano_usd(start_us)

    def running_nano_usd(self, at_us: int) -> int:
        """Since the start of Unix time, had the rate always been this one."""
        rate = self.nano_usd_per_us
        running = rate.numerator * at_us // rate.denominator
        if self.part is None:
            return running
        low, high = self.part
        return _owned(running, high) - _owned(running, low)


@dataclass(frozen=True, slots=True)
class PoolCost:
    """One pool inside the window that was asked for."""

    pool: str
    nano_usd: int
    """Of its nodes where they are known, and of its groups elsewhere."""
    idle_nodes_nano_usd: int
    """The part of it that no group has."""
    idle_nodes_us: int
    """Time of nodes that no group has; a node of which a group has half counts half."""
    idle_energy_uj: int | None
    """Of the accelerators that no group has, in microjoules; None: not known."""


@dataclass(frozen=True, slots=True)
class CapacityCost:
    pieces: tuple[tuple[Piece, ...], ...]
    """For each hold, in the order of the holds; without gaps."""
    pools: tuple[PoolCost, ...]


def capacity_cost(
    holds: Sequence[CapacityHold], nodes: Iterable[NodeHold], since_us: int, until_us: int
) -> CapacityCost:
    """The time from `since_us` to `until_us` only."""
    holds_of: dict[str, list[int]] = {}
    nodes_of: dict[str, list[NodeHold]] = {}
    for index, hold in enumerate(holds):
        holds_of.setdefault(hold.pool, []).append(index)
    for node in nodes:
        nodes_of.setdefault(node.pool, []).append(node)
    pieces: list[list[Piece]] = [[] for _ in holds]
    pools = []
    for pool in sorted({*holds_of, *nodes_of}):
        # The order of the parts must not depend on the order of the rows.
        here = sorted(
            holds_of.get(pool, ()), key=lambda i: (holds[i].group, holds[i].started_at_s, i)
        )
        spans = {index: _span(holds[index], since_us, until_us) for index in here}
        if pool in nodes_of:
            kept = [(node, _span(node, since_us, until_us)) for node in nodes_of[pool]]
            cost = _divide(pool, {i: holds[i] for i in here}, spans, kept, pieces)
        else:
            for index, (start_us, end_us) in spans.items():
                if start_us < end_us:
                    pieces[index].append(Piece(start_us, end_us, _rate(holds[index])))
            cost = PoolCost(pool, _sum(pieces[index] for index in here), 0, 0, 0)
        pools.append(cost)
    return CapacityCost(tuple(map(tuple, pieces)), tuple(pools))


def us_of(at_s: float) -> int:
    return round(at_s * _US_PER_S)


def _divide(
    pool: str,
    holds: Mapping[int, CapacityHold],
    spans: Mapping[int, tuple[int, int]],
    nodes: Sequence[tuple[NodeHold, tuple[int, int]]],
    pieces: list[list[Piece]],
) -> PoolCost:
    total = idle = 0
    idle_us = Fraction(0)
    energy_nj: Fraction | None = Fraction(0)
    edges = {edge for span in spans.values() for edge in span}
    edges |= {edge for _, span in nodes for edge in span}
    for start_us, end_us in pairwise(sorted(edges)):
        held = [index for index, (a, b) in spans.items() if a <= start_us and end_us <= b]
        alive = [node for node, (a, b) in nodes if a <= start_us and end_us <= b]
        known = any(node.node_id == WHOLE_POOL for node in alive)
        alive = [node for node in alive if node.node_id != WHOLE_POOL]
        of_nodes = sum((_rate(node) for node in alive), Fraction(0))
        rates = {index: _rate(holds[index]) for index in held}
        of_groups = sum(rates.values(), Fraction(0))
        if not known and of_nodes <= of_groups:
            for index, rate in rates.items():
                pieces[index].append(Piece(start_us, end_us, rate))
                total += pieces[index][-1].nano_usd(start_us, end_us)
            continue
        total += Piece(start_us, end_us, of_nodes).nano_usd(start_us, end_us)
        whole = max(of_nodes, of_groups)
        low, running = _terms(0), Fraction(0)
        for index, rate in rates.items():
            running += rate
            high = _terms(int(_WHOLE * running / whole) if whole else 0)
            pieces[index].append(Piece(start_us, end_us, of_nodes, (low, high)))
            low = high
        rest = Piece(start_us, end_us, of_nodes, (low, _terms(_WHOLE)))
        # Parts of no price have no width: all of nothing is idle.
        idle += rest.nano_usd(start_us, end_us)
        unused = 1 - of_groups / whole if whole else Fraction(0)
        idle_us += len(alive) * unused * (end_us - start_us)
        if unused:
            energy_nj = _plus(energy_nj, _idle_nj(alive, unused, end_us - start_us))
    energy_uj = None if energy_nj is None else int(energy_nj / _MILLI)
    return PoolCost(pool, total, idle, int(idle_us), energy_uj)


def _idle_nj(alive: Iterable[NodeHold], unused: Fraction, held_us: int) -> Fraction | None:
    total = Fraction(0)
    for node in alive:
        if node.idle_watts is None:
            return None
        total += round(node.idle_watts * _MILLI) * held_us * unused
    return total


def _plus(one: Fraction | None, other: Fraction | None) -> Fraction | None:
    return None if one is None or other is None else one + other


def _owned(count: int, terms: Terms) -> int:
    """Of the numbers below `count`, those whose bits read backwards are below a bound."""
    owned = 0
    for remainder, bits in terms:
        owned += (count - remainder - 1 >> bits) + 1
    return owned


def _terms(bound: int) -> Terms:
    """For the bound `bound` / 2**_PART_BITS."""
    if bound >= _WHOLE:
        return ((0, 0),)
    terms = []
    prefix = 0
    for bit in range(_PART_BITS):
        if bound >> (_PART_BITS - 1 - bit) & 1:
            terms.append((prefix, bit + 1))
            prefix |= 1 << bit
    return tuple(terms)


def _span(hold: CapacityHold | NodeHold, since_us: int, until_us: int) -> tuple[int, int]:
    start_us = max(us_of(hold.started_at_s), since_us)
    return start_us, max(start_us, min(us_of(hold.held_until_s), until_us))


def _rate(hold: CapacityHold | NodeHold) -> Fraction:
    return Fraction(exact_usd(hold.usd_per_hour)) * _NANO_USD_PER_US


def _sum(pieces: Iterable[Iterable[Piece]]) -> int:
    return sum(piece.nano_usd(piece.start_us, piece.end_us) for piece in _flat(pieces))


def _flat(pieces: Iterable[Iterable[Piece]]) -> Iterator[Piece]:
    for some in pieces:
        yield from some
