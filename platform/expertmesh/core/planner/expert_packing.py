"""Which experts the ranks of one layer hold, so that the heaviest rank is as light as possible.

Every rank has the same number of slots. An expert with several replicas spreads its load evenly
over them, as vLLM's router does. The greedy start replicates the hottest expert again and again and
packs the heaviest replica first onto the lightest rank; then swaps of two slots and new owners for
single slots lower the heaviest rank, one step at a time.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

_CLOSE = 1.0 + 1e-4
"""Nearer to the lower bound than this is not worth the time."""
_LESS = 1.0 - 1e-12
"""A gain below the precision of floats is none."""


class Packing:
    """Experts by rank, and the loads that follow. An expert is its index in `weights`."""

    __slots__ = ("counts", "loads", "ranks", "shares", "weights")

    def __init__(self, weights: Sequence[float], ranks: Sequence[Sequence[int]]) -> None:
        """Every expert must be on some rank."""
        self.weights = weights
        self.ranks = [list(rank) for rank in ranks]
        self.counts = [0] * len(weights)
        for rank in self.ranks:
            for expert in rank:
                self.counts[expert] += 1
        self.shares = [weight / count for weight, count in zip(weights, self.counts, strict=True)]
        self.loads = [self._load(rank) for rank in self.ranks]

    @property
    def heaviest(self) -> float:
        return max(self.loads)

    def swap(self, rank: int, expert: int, other_rank: int, other: int) -> None:
        _replace(self.ranks[rank], expert, other)
        _replace(self.ranks[other_rank], other, expert)
        self.loads[rank] = self._load(self.ranks[rank])
        self.loads[other_rank] = self._load(self.ranks[other_rank])

    def reassign(self, rank: int, expert: int, new: int) -> None:
        """The slot of `expert` on this rank becomes one more replica of `new`."""
        _replace(self.ranks[rank], expert, new)
        for changed, difference in ((expert, -1), (new, 1)):
            self.counts[changed] += difference
            self.shares[changed] = self.weights[changed] / self.counts[changed]
        for index, experts in enumerate(self.ranks):
            if index == rank or expert in experts or new in experts:
                self.loads[index] = self._load(experts)

    def _load(self, rank: Sequence[int]) -> float:
        shares = self.shares
        return sum([shares[expert] for expert in rank])


def pack(weights: Sequence[float], ranks: int, slots: int, steps: int) -> Packing:
    """Never heavier than `greedy`; no expert twice on a rank unless that is what it takes.

    Of two experts with one weight either may get the other's place: names do not matter. At most
    `steps` swaps and new owners; 0 leaves the start as it is.
    """
    order = sorted(range(len(weights)), key=lambda expert: (-weights[expert], expert))
    falling = [weights[expert] for expert in order]
    counts = replicate(falling, ranks * slots, ranks)
    bound = max(sum(falling) / ranks, _largest_share(falling, counts))
    published = greedy(weights, ranks, slots)
    target = min(bound * _CLOSE, max(bound, published.heaviest))
    packing = Packing(falling, _deal(falling, counts, ranks, slots))
    improve(packing, target, steps)
    if packing.heaviest * _LESS > published.heaviest:
        improve(published, target, steps)
        return published
    return Packing(weights, [[order[expert] for expert in rank] for rank in packing.ranks])


def greedy(weights: Sequence[float], ranks: int, slots: int) -> Packing:
    """The published greedy algorithm, which may put an expert twice on a rank.

    Source: README of deepseek-ai/EPLB, "The Algorithm"; vLLM's default policy does the same.
    """
    counts = replicate(weights, ranks * slots, None)
    return Packing(weights, _deal(weights, counts, ranks, slots, apart=False))


def replicate(weights: Sequence[float], slots: int, most: int | None) -> list[int]:
    """Replicas by expert, so that the largest load of one replica is as small as can be.

    With `most`, no expert has more of them, where the slots can be filled that way.
    """
    counts = [1] * len(weights)
    if most is not None and slots > most * len(weights):
        most = None
    heap = [(-weight, expert) for expert, weight in enumerate(weights)]
    heapify(heap)
    for _ in range(slots - len(weights)):
        expert = heap[0][1]
        counts[expert] += 1
        if counts[expert] == most:
            heappop(heap)
        else:
            heapreplace(heap, (-weights[expert] / counts[expert], expert))
    return counts


def improve(packing: Packing, target: float, steps: int) -> None:
    """Until the heaviest rank is no heavier than `target` or nothing helps."""
    for _ in range(steps):
        loads = packing.loads
        heaviest = max(loads)
        if heaviest <= target:
            return
        rank = loads.index(heaviest)
        if not _swap(packing, rank, target) and not _reassign(packing, rank):
            return


def _largest_share(weights: Sequence[float], counts: Sequence[int]) -> float:
    return max(weight / count for weight, count in zip(weights, counts, strict=True))


def _deal(
    weights: Sequence[float],
    counts: Sequence[int],
    ranks: int,
    slots: int,
    *,
    apart: bool = True,
) -> list[list[int]]:
    """The heaviest replica goes first, to the lightest rank that has a slot left.

    With `apart`, to the lightest that does not hold the expert yet, where there is one.
    """
    shares = [weight / count for weight, count in zip(weights, counts, strict=True)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    open_ranks = [(0.0, rank) for rank in range(ranks)]
    stuck = False
    for expert in sorted(range(len(weights)), key=lambda expert: (-shares[expert], expert)):
        share = shares[expert]
        if counts[expert] == 1:
            load, rank = open_ranks[0]
            dealt[rank].append(expert)
            if len(dealt[rank]) == slots:
                heappop(open_ranks)
            else:
                heapreplace(open_ranks, (load + share, rank))
            continue
        passed: list[tuple[float, int]] = []
        for _ in range(counts[expert]):
            if apart and not open_ranks:
                # Only ranks are left that have it: the slots cannot be filled in this order.
                stuck = True
                open_ranks, passed = passed, []
            load, rank = heappop(open_ranks)
            dealt[rank].append(expert)
            if len(dealt[rank]) < slots:
                heappush(passed if apart else open_ranks, (load + share, rank))
        for entry in passed:
            heappush(open_ranks, entry)
    return _deal_in_turn(counts, ranks, slots) if stuck else dealt


def _deal_in_turn(counts: Sequence[int], ranks: int, slots: int) -> list[list[int]]:
    """Replicas of an expert follow each other round the ranks, so that they lie apart."""
    replicas = [expert for expert, count in enumerate(counts) for _ in range(count)]
    return [replicas[rank::ranks] for rank in range(ranks)]


def _swap(packing: Packing, rank: int, target: float) -> bool:
    """The swap with another rank that leaves the lightest pair, if that is lighter than now."""
    ranks, shares, loads = packing.ranks, packing.shares, packing.loads
    load = loads[rank]
    mine = ranks[rank]
    best = load * _LESS
    choice: tuple[int, int, int] | None = None
    for other_rank in sorted(range(len(loads)), key=loads.__getitem__):
        other_load = loads[other_rank]
        if (load + other_load) / 2 >= best or best <= target:
            break
        theirs = ranks[other_rank]
        for expert in mine:
            if expert in theirs:
                continue
            share = shares[expert]
            for other in theirs:
                moved = share - shares[other]
                if moved <= 0.0:
                    continue
                heavier = max(load - moved, other_load + moved)
                if heavier < best and other not in mine:
                    best = heavier
                    choice = (expert, other_rank, other)
    if choice is None:
        return False
    expert, other_rank, other = choice
    packing.swap(rank, expert, other_rank, other)
    return True


def _reassign(packing: Packing, rank: int) -> bool:
    """One slot gets another expert, so that all ranks which that concerns are lighter than this.

    Either an expert of this rank gets a replica elsewhere, or a replica leaves this rank.
    """
    counts, shares, weights = packing.counts, packing.shares, packing.weights
    holders: list[list[int]] = [[] for _ in counts]
    for index, experts in enumerate(packing.ranks):
        for expert in experts:
            holders[expert].append(index)
    best = packing.loads[rank] * _LESS
    choice: tuple[int, int, int] | None = None
    mine = set(packing.ranks[rank])
    shared = [expert for expert, count in enumerate(counts) if count > 1]
    for given in shared:
        rise = weights[given] / (counts[given] - 1) - shares[given]
        for giver in set(holders[given]):
            if giver == rank:
                gainers: Sequence[int] = [new for new in range(len(counts)) if new not in mine]
            else:
                gainers = [new for new in mine if giver not in holders[new] and new != given]
            for new in gainers:
                share = weights[new] / (counts[new] + 1)
                fall = shares[new] - share
                worst = packing.loads[giver] - shares[given] + share
                if worst >= best:
                    continue
                if rank != giver:
                    after = packing.loads[rank] - fall + (rise if given in mine else 0.0)
                    worst = max(worst, after)
                for holder in holders[given]:
                    if holder not in (giver, rank):
                        after = packing.loads[holder] + rise
                        if holder in holders[new]:
                            after -= fall
                        worst = max(worst, after)
                if worst < best:
                    best = worst
                    choice = (giver, given, new)
    if choice is None:
        return False
    packing.reassign(*choice)
    return True


def _replace(experts: list[int], old: int, new: int) -> None:
    experts[experts.index(old)] = new
