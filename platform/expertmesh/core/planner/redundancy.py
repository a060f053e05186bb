"""How many redundant experts pay for their memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from expertmesh.core.planner.placement import Loads, Ranks, balancedness, place

Rate = Callable[[float, int], float]
"""Balancedness and bytes of redundant experts on a rank to the group's rate, e.g. in tokens/s.

0 when they do not fit.
"""


@dataclass(frozen=True, slots=True)
class RedundancyOption:
    redundant: int
    """Slots a layer beyond one for each expert, over all ranks."""
    extra_slots: float
    """Of a rank, beyond its share of the experts."""
    balancedness: float
    bytes_per_rank: int
    """Of the extra slots in all layers."""
    rate: float
    gain_per_slot: float
    """Relative change of the rate for each further slot of a rank, from the option before."""


@dataclass(frozen=True, slots=True)
class Redundancy:
    options: tuple[RedundancyOption, ...]
    best: RedundancyOption
    """With the highest rate; of equal ones the smallest."""


def redundancy(
    loads: Loads,
    memory_per_slot: int,
    ranks: Ranks,
    rate: Rate,
    most_slots: int = 4,
    trials: int = 1,
) -> Redundancy:
    """Every number of redundant experts that fills the ranks, up to `most_slots` more than needed.

    `memory_per_slot`: bytes on a rank for one more slot in all layers. `ranks.redundant` does not
    matter. With one trial balancedness is a little lower than what `place` reaches: a rate chosen
    on it is a safe one. Raises ValueError as `place` does, or for negative memory.
    """
    if memory_per_slot < 0 or most_slots < 0:
        raise ValueError(
            f"memory and slots are at least 0, got {memory_per_slot} bytes and {most_slots} slots"
        )
    experts = len(loads[0]) if loads else 0
    options: list[RedundancyOption] = []
    for redundant in redundant_counts(experts, ranks.count, most_slots):
        placement = place(loads, replace(ranks, redundant=redundant), trials)
        balance = balancedness(placement, loads)
        extra = redundant / ranks.count
        taken = round(extra * memory_per_slot)
        value = rate(balance, taken)
        gain = 0.0
        if options and options[-1].rate > 0.0:
            before = options[-1]
            gain = (value / before.rate - 1.0) / (extra - before.extra_slots)
        options.append(RedundancyOption(redundant, extra, balance, taken, value, gain))
    best = max(options, key=lambda option: (option.rate, -option.redundant))
    return Redundancy(tuple(options), best)


def redundant_counts(experts: int, ranks: int, most_slots: int) -> list[int]:
    """Numbers of redundant experts with which all ranks have the same number of slots."""
    return [-experts % ranks + ranks * slots for slots in range(most_slots + 1)]


def memory_bound_rate(expert_share: float, kv_bytes: int, fixed_share: float) -> Rate:
    """A rate for a batch that fills the memory, relative to that with perfect balance.

    `expert_share`: of the time of a step, what experts take in perfect balance; `kv_bytes`: of a
    rank's cache without redundant experts, which also decides how large the batch is;
    `fixed_share`: of the time of a step, what a smaller batch does not save (reading weights,
    starting kernels). Ranges: shares from 0 to 1. Raises ValueError outside.
    """
    if not (0.0 <= expert_share <= 1.0 and 0.0 <= fixed_share <= 1.0 and kv_bytes > 0):
        raise ValueError(
            f"shares lie between 0 and 1 and the cache has bytes, got {expert_share:g}, "
            f"{fixed_share:g} and {kv_bytes}"
        )

    def rate(balance: float, taken: int) -> float:
        batch = max(0.0, 1.0 - taken / kv_bytes)
        step = 1.0 - expert_share + expert_share / balance
        return batch / (step * (fixed_share + (1.0 - fixed_share) * batch)) if batch else 0.0

    return rate
