"""How many redundant experts pay for their memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rate = Callable[[float, int], float]
"""Balancedness and redundant experts to the group's rate, e.g. in tokens/s.

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
    """With the highest rate; of equal ones the fewest copies."""


def redundancy(
    counts: Sequence[int],
    ranks: int,
    memory_per_slot: int,
    balance: Callable[[int], float],
    rate: Rate,
    equal_share: float = 0.0,
) -> Redundancy:
    """What each number of redundant experts costs and brings.

    `memory_per_slot`: bytes on a rank for one more slot in all layers. `balance`: balancedness with
    so many. Of rates that are lower than the highest by no more than `equal_share`, the fewest
    copies win. Raises ValueError for negative memory, or without counts.
    """
    if memory_per_slot < 0 or not counts:
        raise ValueError(
            f"memory is at least 0 and a number is asked, got {memory_per_slot} bytes and {counts}"
        )
    options: list[RedundancyOption] = []
    for redundant in counts:
        balanced = balance(redundant)
        extra = redundant / ranks
        value = rate(balanced, redundant)
        gain = 0.0
        if options and options[-1].rate > 0.0:
            before = options[-1]
            gain = (value / before.rate - 1.0) / (extra - before.extra_slots)
        options.append(
            RedundancyOption(
                redundant, extra, balanced, round(extra * memory_per_slot), value, gain
            )
        )
    enough = max(option.rate for option in options) * (1.0 - equal_share)
    best = min(
        (option for option in options if option.rate >= enough),
        key=lambda option: option.redundant,
    )
    return Redundancy(tuple(options), best)


def redundant_counts(experts: int, ranks: int, most_slots: int) -> list[int]:
    """Numbers of redundant experts with which all ranks have the same number of slots."""
    return [-experts % ranks + ranks * slots for slots in range(most_slots + 1)]


def memory_bound_rate(
    expert_share: float, kv_bytes: int, fixed_share: float, bytes_per_copy: float
) -> Rate:
    """A rate for a batch that fills the memory, relative to that with perfect balance.

    `expert_share`: of the time of a step, what experts take in perfect balance; `kv_bytes`: of a
    rank's cache without redundant experts, which also decides how large the batch is;
    `fixed_share`: of the time of a step, what a smaller batch does not save (reading weights,
    starting kernels); `bytes_per_copy`: on a rank for one redundant expert of all of them. Ranges:
    shares from 0 to 1. Raises ValueError outside.
    """
    if not (0.0 <= expert_share <= 1.0 and 0.0 <= fixed_share <= 1.0 and kv_bytes > 0):
        raise ValueError(
            f"shares lie between 0 and 1 and the cache has bytes, got {expert_share:g}, "
            f"{fixed_share:g} and {kv_bytes}"
        )

    def rate(balance: float, redundant: int) -> float:
        batch = max(0.0, 1.0 - redundant * bytes_per_copy / kv_bytes)
        step = 1.0 - expert_share + expert_share / balance
        return batch / (step * (fixed_share + (1.0 - fixed_share) * batch)) if batch else 0.0

    return rate
