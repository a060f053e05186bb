"""Which experts the ranks of one layer hold, so that the heaviest rank is as light as possible.

Every rank has the same number of slots. An expert with several replicas spreads its load evenly
over them, as vLLM's router does. The greedy start replicates the hottest expert again and again and
packs the heaviest replica first onto the lightest rank; then swaps of two slots and new owners for
single slots lower the heaviest rank, one step at a time.
"""

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from math import ceil

_CLOSE = 1.0 + 1e-4
"""Nearer to the lower bound than this is not worth another step."""
_CLOSE_ENOUGH = 1.0 + 1e-3
"""Nearer than this is not worth another start."""
_LESS = 1.0 - 1e-12
"""A gain below the precision of floats is none."""
_HOPELESS = 1.1
"""Starts that are heavier than the best by more are not improved."""
_STEPS = 128
"""Swaps and new owners for one start at most."""
_COARSER = (1.06, 1.15, 1.3, 1.45, 1.6)
"""Largest shares to try, as multiples of the smallest possible one."""
_GIVERS = 8
"""Experts to take a replica from that are tried for each one that gets it."""


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


def pack(
    weights: Sequence[float], ranks: int, slots: int, trials: int, allowed: float = 0.0
) -> Packing:
    """Never heavier than `greedy` (or than `allowed`, if that is more).

    No expert is twice on a rank unless that is what it takes. Names do not matter: of two experts
    of one weight either may get the other's place. At most `trials` numbers of replicas are tried,
    which bounds the time; with 0 it is the greedy start.
    """
    published = greedy(weights, ranks, slots)
    if trials < 1:
        return published
    order = sorted(range(len(weights)), key=lambda expert: (-weights[expert], expert))
    falling = [weights[expert] for expert in order]
    counts = replicate(falling, ranks * slots, ranks)
    bound = max(sum(falling) / ranks, _largest_share(falling, counts))
    target = min(bound * _CLOSE, max(bound, published.heaviest))
    best = _lightest(falling, counts, ranks, slots, target, trials)
    if best.heaviest * _LESS > max(published.heaviest, allowed):
        improve(published, target)
        return published
    return Packing(weights, [[order[expert] for expert in rank] for rank in best.ranks])


def _lightest(
    weights: Sequence[float],
    counts: list[int],
    ranks: int,
    slots: int,
    target: float,
    trials: int,
) -> Packing:
    """Of the starts that these and other numbers of replicas give."""
    best = _dealt(weights, counts, ranks, slots, target, None)
    target *= _CLOSE_ENOUGH
    largest = _largest_share(weights, counts)
    for factor in _COARSER[: trials - 1]:
        if best.heaviest <= target:
            return best
        other = _coarser(weights, ranks * slots, ranks, largest * factor)
        if other is not None:
            packing = _dealt(weights, other, ranks, slots, target, best.heaviest)
            if packing.heaviest < best.heaviest * _LESS:
                best = packing
    left = trials - 1 - len(_COARSER)
    while left > 0 and best.heaviest > target:
        known = best.heaviest
        for other in islice(_neighbours(best, ranks), left):
            left -= 1
            packing = _dealt(weights, other, ranks, slots, target, known)
            if packing.heaviest < known * _LESS:
                best = packing
                break
        else:
            return best
    return best


def _dealt(
    weights: Sequence[float],
    counts: Sequence[int],
    ranks: int,
    slots: int,
    target: float,
    known: float | None,
) -> Packing:
    """A start, improved unless it is hopelessly heavier than what is known."""
    packing = Packing(weights, _deal(weights, counts, ranks, slots))
    if known is None or packing.heaviest < known * _HOPELESS:
        improve(packing, target)
    return packing


def _coarser(weights: Sequence[float], total: int, most: int, share: float) -> list[int] | None:
    """Just enough replicas that no share is larger; the slots left over halve other experts.

    Larger pieces can fill the ranks better than the smallest possible ones: two pieces of a little
    over half a rank's load each must not meet.
    """
    counts = [min(most, max(1, ceil(weight / share * _LESS))) for weight in weights]
    left = total - sum(counts)
    for expert, count in enumerate(counts):
        if left > 0 and count == 1 < most:
            counts[expert] = 2
            left -= 1
    return counts if left == 0 else None


def _neighbours(packing: Packing, most: int) -> Iterator[list[int]]:
    """Numbers of replicas with one more of an expert on the heaviest rank and one less of another.

    Those first that make the largest share smaller and lose least elsewhere.
    """
    counts, weights = packing.counts, packing.weights
    heaviest = set(packing.ranks[packing.loads.index(packing.heaviest)])
    givers = [expert for expert, count in enumerate(counts) if count > 1]
    givers.sort(key=lambda expert: (weights[expert] / (counts[expert] - 1), expert))
    for new in sorted(heaviest, key=lambda expert: (-packing.shares[expert], expert)):
        for given in givers[:_GIVERS]:
            if new != given and counts[new] < most:
                other = list(counts)
                other[given] -= 1
                other[new] += 1
                yield other


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


def improve(packing: Packing, target: float) -> None:
    """Until the heaviest rank is no heavier than `target` or nothing helps."""
    for _ in range(_STEPS):
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
        least, most = load - best, best - other_load
        for expert in mine:
            share = shares[expert]
            if share <= least or expert in theirs:
                continue
            for other in theirs:
                if least < share - shares[other] < most and other not in mine:
                    moved = share - shares[other]
                    best = max(load - moved, other_load + moved)
                    least, most = load - best, best - other_load
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
    counts, shares, weights, loads = packing.counts, packing.shares, packing.weights, packing.loads
    mine = packing.ranks[rank]
    givers: dict[int, list[int]] = {expert: [] for expert, n in enumerate(counts) if n > 1}
    for index, experts in enumerate(packing.ranks):
        for expert in experts:
            if expert in givers:
                givers[expert].append(index)
    later = [weight / (count + 1) for weight, count in zip(weights, counts, strict=True)]
    others = (new for new in range(len(counts)) if new not in mine)
    lightest = min(others, key=later.__getitem__, default=None)
    best = loads[rank] * _LESS
    choice: tuple[int, int, int] | None = None
    for given, holders in givers.items():
        if len(set(holders)) < len(holders):
            continue
        rise = weights[given] / (counts[given] - 1) - shares[given]
        for giver in holders:
            freed = loads[giver] - shares[given]
            if giver == rank:
                gainers: Sequence[int] = () if lightest is None else (lightest,)
            else:
                gainers = mine
            for new in gainers:
                worst = freed + later[new]
                if worst >= best or new == given or new in packing.ranks[giver]:
                    continue
                fall = shares[new] - later[new]
                if giver != rank:
                    # It holds `new`, whose replicas all get lighter.
                    worst = max(worst, loads[rank] - fall + (rise if given in mine else 0.0))
                for holder in holders:
                    if worst >= best:
                        break
                    if holder not in (giver, rank):
                        after = loads[holder] + rise
                        if after > worst and new in packing.ranks[holder]:
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
