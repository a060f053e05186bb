"""A new placement for new loads that moves few experts from where they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain

from expertmesh.core.planner.expert_packing import Packing, improve
from expertmesh.core.planner.placement import (
    TRIALS,
    Loads,
    Placement,
    Ranks,
    balancedness,
    place,
)

ByRank = list[list[int]]
"""Of one layer, the experts in the slots of each rank."""

_EXACT = 1.0 + 1e-12


@dataclass(frozen=True, slots=True)
class Replan:
    placement: Placement
    """Experts that stay on a rank keep their slot."""
    moved_experts: int
    """Slots, over all layers, whose rank has to fetch the expert from another one."""
    moved_bytes: int
    before: float | None
    """Balancedness of the present placement under the new loads; None if some expert is lost."""
    after: float
    best: float
    """Balancedness of a fresh placement."""
    best_moved_experts: int
    """What the fresh placement would move, its ranks named so that it is as little as possible."""


def replan(
    current: Placement,
    loads: Loads,
    ranks: Ranks,
    expert_bytes: int = 0,
    slack: float = 0.02,
    trials: int = TRIALS,
) -> Replan:
    """The fewest moves found after which no layer's heaviest rank exceeds a fresh one's by `slack`.

    `expert_bytes`: of one expert in one layer. The number of ranks and of redundant experts may
    differ from the present ones; the ranks up to the smaller number are taken to be the same.
    Raises ValueError as `place` does, or for another number of layers or experts.
    """
    if slack < 0.0:
        raise ValueError(f"slack is at least 0, got {slack:g}")
    fresh = place(loads, ranks, trials)
    if (current.experts, len(current.slots)) != (fresh.experts, len(fresh.slots)):
        raise ValueError(
            f"the present placement has {len(current.slots)} layers of {current.experts} experts, "
            f"the loads are for {len(fresh.slots)} layers of {fresh.experts}"
        )
    slots_per_rank = fresh.slots_per_rank
    slots: list[tuple[int, ...]] = []
    moved = fresh_moved = 0
    for layer, weights in enumerate(loads):
        held = _held(current, layer, ranks.count)
        chosen = _as_near_as_possible(_by_rank(fresh, layer), held, ranks)
        moves = _moves(held, chosen)
        fresh_moved += moves
        limit = Packing(weights, chosen).heaviest * (1.0 + slack)
        for start in (held, _leaving(held, chosen, weights, ranks)):
            lighter = _lightened(start, weights, ranks, slots_per_rank, limit)
            if lighter is not None and _moves(held, lighter) < moves:
                chosen, moves = lighter, _moves(held, lighter)
        moved += moves
        slots.append(_in_their_slots(held, chosen))
    placement = Placement(fresh.experts, ranks.count, tuple(slots))
    return Replan(
        placement=placement,
        moved_experts=moved,
        moved_bytes=moved * expert_bytes,
        before=balancedness(current, loads) if _complete(current) else None,
        after=balancedness(placement, loads),
        best=balancedness(fresh, loads),
        best_moved_experts=fresh_moved,
    )


def _by_rank(placement: Placement, layer: int) -> ByRank:
    return [list(rank) for rank in placement.by_rank(layer)]


def _held(current: Placement, layer: int, ranks: int) -> ByRank:
    """By rank of the new placement; a rank that is new holds nothing."""
    held = _by_rank(current, layer)[:ranks]
    return held + [[] for _ in range(ranks - len(held))]


def _complete(placement: Placement) -> bool:
    return all(len(set(layer)) == placement.experts for layer in placement.slots)


def _moves(held: ByRank, wanted: ByRank) -> int:
    """An expert that lies twice on a rank is fetched once."""
    return sum(len(set(new) - set(old)) for old, new in zip(held, wanted, strict=True))


def _lightened(
    start: ByRank, weights: Sequence[float], ranks: Ranks, slots: int, limit: float
) -> ByRank | None:
    """This placement, changed until it is light enough; None if that does not succeed."""
    parts = _parts(start, len(weights), ranks)
    if parts is None or any(len(rank) != slots for rank in start):
        return None
    lightened: ByRank = []
    per_part = len(start) // len(parts)
    for index, experts in enumerate(parts):
        name = {expert: local for local, expert in enumerate(experts)}
        part = start[index * per_part : (index + 1) * per_part]
        packing = Packing(
            [weights[expert] for expert in experts],
            [[name[expert] for expert in rank] for rank in part],
        )
        improve(packing, limit)
        if packing.heaviest > limit * _EXACT:
            return None
        lightened += [[experts[local] for local in rank] for rank in packing.ranks]
    return lightened


def _leaving(held: ByRank, wanted: ByRank, weights: Sequence[float], ranks: Ranks) -> ByRank:
    """As many replicas of each expert as wanted, on the same node, but left where they are held."""
    per_part = ranks.count // ranks.nodes if ranks.hierarchical else ranks.count
    left: ByRank = []
    for start in range(0, ranks.count, per_part):
        end = start + per_part
        left += _leaving_on_node(held[start:end], wanted[start:end], weights)
    return left


def _leaving_on_node(held: ByRank, wanted: ByRank, weights: Sequence[float]) -> ByRank:
    missing = Counter(chain(*wanted))
    shares = {expert: weights[expert] / count for expert, count in missing.items()}
    slots = len(wanted[0])
    kept: ByRank = []
    for experts in held:
        staying = [expert for expert in dict.fromkeys(experts) if missing[expert] > 0][:slots]
        missing.subtract(staying)
        kept.append(staying)
    free = [(sum(shares[e] for e in rank), i) for i, rank in enumerate(kept) if len(rank) < slots]
    heapify(free)
    for expert in sorted(missing.elements(), key=lambda expert: (-shares[expert], expert)):
        passed: list[tuple[float, int]] = []
        while len(free) > 1 and expert in kept[free[0][1]]:
            passed.append(heappop(free))
        load, rank = heappop(free)
        kept[rank].append(expert)
        if len(kept[rank]) < slots:
            heappush(free, (load + shares[expert], rank))
        for entry in passed:
            heappush(free, entry)
    return kept


def _parts(held: ByRank, experts: int, ranks: Ranks) -> list[list[int]] | None:
    """The experts of each part that may exchange slots among its ranks: a node's, or all.

    None when an expert is missing, or an expert group does not lie on one node as it should.
    """
    nodes = ranks.nodes if ranks.hierarchical else 1
    per_node = ranks.count // nodes
    parts = [
        sorted({expert for rank in held[start : start + per_node] for expert in rank})
        for start in range(0, ranks.count, per_node)
    ]
    if sum(len(part) for part in parts) != experts or len(set().union(*parts)) != experts:
        return None
    size = experts // ranks.groups
    if nodes > 1 and any(
        len(part) != size * len({expert // size for expert in part}) for part in parts
    ):
        return None
    return parts


def _as_near_as_possible(wanted: ByRank, held: ByRank, ranks: Ranks) -> ByRank:
    """The wanted ranks in the order in which most experts are there already.

    Nodes are matched first where experts are bound to them, then the ranks of each.
    """
    if not ranks.hierarchical:
        return [wanted[index] for index in _matched(held, wanted)]
    per_node = ranks.count // ranks.nodes
    starts = range(0, ranks.count, per_node)

    def on_node(by_rank: ByRank) -> list[list[int]]:
        return [list(chain(*by_rank[start : start + per_node])) for start in starts]

    near: ByRank = []
    for start, node in zip(starts, _matched(on_node(held), on_node(wanted)), strict=True):
        there = wanted[node * per_node : (node + 1) * per_node]
        near += [there[i] for i in _matched(held[start : start + per_node], there)]
    return near


def _matched(held: ByRank, wanted: ByRank) -> list[int]:
    """For each place the index of what goes there: the pairs with most in common first."""
    places: dict[int, list[int]] = {}
    for position, experts in enumerate(held):
        for expert in experts:
            places.setdefault(expert, []).append(position)
    common: Counter[tuple[int, int]] = Counter(
        (position, index)
        for index, experts in enumerate(wanted)
        for expert in experts
        for position in places.get(expert, ())
    )
    match: dict[int, int] = {}
    taken: set[int] = set()
    for position, index in sorted(common, key=lambda pair: (-common[pair], pair)):
        if position not in match and index not in taken:
            match[position] = index
            taken.add(index)
    left = iter([index for index in range(len(wanted)) if index not in taken])
    return [match[i] if i in match else next(left) for i in range(len(held))]


def _in_their_slots(held: ByRank, wanted: ByRank) -> tuple[int, ...]:
    """Experts that a rank keeps stay in their slots; the others fill the gaps in order."""
    slots: list[int] = []
    for old, new in zip(held, wanted, strict=True):
        left = Counter(new)
        places: list[int | None] = [None] * len(new)
        for index, expert in enumerate(old[: len(new)]):
            if left[expert]:
                places[index] = expert
                left[expert] -= 1
        arriving = iter(sorted(left.elements()))
        slots += [next(arriving) if expert is None else expert for expert in places]
    return tuple(slots)
