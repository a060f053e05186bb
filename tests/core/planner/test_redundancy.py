import pytest

from expertmesh.core.planner.expert_load import power_law
from expertmesh.core.planner.placement import Loads, Ranks, balancedness, place
from expertmesh.core.planner.redundancy import (
    Rate,
    Redundancy,
    memory_bound_rate,
    redundancy,
    redundant_counts,
)

LOADS = power_law(64, 2, 1.3)


def test_options_fill_all_ranks_alike() -> None:
    assert redundant_counts(256, 32, 2) == [0, 32, 64]
    assert redundant_counts(256, 144, 1) == [32, 176]
    assert redundant_counts(256, 512, 0) == [256]


def found(
    loads: Loads, memory: int, ranks: int, rate: Rate, most_slots: int = 4, equal_share: float = 0.0
) -> Redundancy:
    counts = redundant_counts(len(loads[0]), ranks, most_slots)

    def balance(redundant: int) -> float:
        return balancedness(place(loads, Ranks(ranks, redundant), trials=1), loads)

    return redundancy(counts, ranks, memory, balance, rate, equal_share)


def only_balance(balance: float, _: int) -> float:
    return balance


def test_each_option_says_what_it_costs_and_brings() -> None:
    weighed = found(LOADS, 1000, 24, only_balance, most_slots=2)
    assert [option.redundant for option in weighed.options] == [8, 32, 56]
    assert [option.bytes_per_rank for option in weighed.options] == [333, 1333, 2333]
    first, second, third = weighed.options
    assert first.gain_per_slot == 0.0
    assert second.gain_per_slot == pytest.approx(second.rate / first.rate - 1)
    assert third.gain_per_slot == pytest.approx(third.rate / second.rate - 1)
    assert second.balancedness > first.balancedness


def test_free_memory_buys_the_best_balance_and_dear_memory_none() -> None:
    free = found(LOADS, 0, 16, only_balance)
    assert free.best.balancedness == max(option.balancedness for option in free.options)
    assert free.best.redundant > 0
    dear = found(LOADS, 10, 16, lambda balance, redundant: balance / (1 + redundant))
    assert dear.best.redundant == 0


def test_of_equal_rates_the_fewest_copies_win() -> None:
    assert found(LOADS, 1, 16, lambda balance, redundant: 1.0).best.redundant == 0

    def slowly_better(_: float, redundant: int) -> float:
        return 1.0 + redundant / 16 * 0.004

    assert found(LOADS, 1, 16, slowly_better).best.redundant == 64
    assert found(LOADS, 1, 16, slowly_better, equal_share=0.01).best.redundant == 32


def test_options_that_do_not_fit_are_not_chosen() -> None:
    weighed = found(LOADS, 10, 16, lambda balance, redundant: balance if redundant <= 16 else 0.0)
    assert weighed.best.redundant == 16
    assert [option.rate for option in weighed.options[2:]] == [0.0] * 3
    assert weighed.options[3].gain_per_slot == 0.0


def test_skewed_loads_want_more_redundant_experts_than_even_ones() -> None:
    rate = memory_bound_rate(0.4, kv_bytes=1000, fixed_share=0.5, bytes_per_copy=20 / 16)
    even = found([[1.0] * 64], 20, 16, rate)
    skewed = found(LOADS, 20, 16, rate)
    assert even.best.redundant == 0
    assert skewed.best.redundant > 0


def test_the_rate_falls_with_imbalance_and_with_less_memory() -> None:
    rate = memory_bound_rate(0.5, kv_bytes=100, fixed_share=1.0, bytes_per_copy=1)
    assert rate(1.0, 0) == 1.0
    assert rate(0.5, 0) == pytest.approx(1 / 1.5)
    assert rate(1.0, 25) == pytest.approx(0.75)
    assert rate(1.0, 100) == rate(1.0, 200) == 0.0
    assert memory_bound_rate(0.5, 100, 0.0, 1)(1.0, 50) == 1.0


@pytest.mark.parametrize("arguments", [(-0.1, 1, 0.5), (1.1, 1, 0.5), (0.5, 0, 0.5), (0.5, 1, 2.0)])
def test_impossible_shares_are_refused(arguments: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="shares lie between 0 and 1"):
        memory_bound_rate(*arguments, bytes_per_copy=1)


def test_impossible_memory_and_no_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="memory is at least 0"):
        found(LOADS, -1, 16, only_balance)
    with pytest.raises(ValueError, match="a number is asked"):
        redundancy([], 16, 1, lambda redundant: 1.0, only_balance)
