import pytest

from expertmesh.core.planner.expert_load import power_law
from expertmesh.core.planner.placement import Ranks
from expertmesh.core.planner.redundancy import memory_bound_rate, redundancy, redundant_counts

LOADS = power_law(64, 2, 1.3)


def test_options_fill_all_ranks_alike() -> None:
    assert redundant_counts(256, 32, 2) == [0, 32, 64]
    assert redundant_counts(256, 144, 1) == [32, 176]
    assert redundant_counts(256, 512, 0) == [256]


def test_each_option_says_what_it_costs_and_brings() -> None:
    found = redundancy(LOADS, 1000, Ranks(24), lambda balance, taken: balance, most_slots=2)
    assert [option.redundant for option in found.options] == [8, 32, 56]
    assert [option.bytes_per_rank for option in found.options] == [333, 1333, 2333]
    first, second, third = found.options
    assert first.gain_per_slot == 0.0
    assert second.gain_per_slot == pytest.approx(second.rate / first.rate - 1)
    assert third.gain_per_slot == pytest.approx(third.rate / second.rate - 1)
    assert second.balancedness > first.balancedness


def test_free_memory_buys_the_best_balance_and_dear_memory_none() -> None:
    free = redundancy(LOADS, 0, Ranks(16), lambda balance, taken: balance)
    assert free.best.balancedness == max(option.balancedness for option in free.options)
    assert free.best.redundant > 0
    dear = redundancy(LOADS, 10, Ranks(16), lambda balance, taken: balance / (1 + taken))
    assert dear.best.redundant == 0


def test_of_equal_rates_the_smallest_wins() -> None:
    assert redundancy(LOADS, 1, Ranks(16), lambda balance, taken: 1.0).best.redundant == 0


def test_options_that_do_not_fit_are_not_chosen() -> None:
    found = redundancy(LOADS, 10, Ranks(16), lambda balance, taken: balance if taken <= 10 else 0.0)
    assert found.best.redundant == 16
    assert [option.rate for option in found.options[2:]] == [0.0] * 3
    assert found.options[3].gain_per_slot == 0.0


def test_skewed_loads_want_more_redundant_experts_than_even_ones() -> None:
    rate = memory_bound_rate(expert_share=0.4, kv_bytes=1000, fixed_share=0.5)
    even = redundancy([[1.0] * 64], 20, Ranks(16), rate)
    skewed = redundancy(LOADS, 20, Ranks(16), rate)
    assert even.best.redundant == 0
    assert skewed.best.redundant > 0


def test_the_rate_falls_with_imbalance_and_with_less_memory() -> None:
    rate = memory_bound_rate(expert_share=0.5, kv_bytes=100, fixed_share=1.0)
    assert rate(1.0, 0) == 1.0
    assert rate(0.5, 0) == pytest.approx(1 / 1.5)
    assert rate(1.0, 25) == pytest.approx(0.75)
    assert rate(1.0, 100) == rate(1.0, 200) == 0.0
    assert memory_bound_rate(0.5, 100, 0.0)(1.0, 50) == 1.0


@pytest.mark.parametrize("arguments", [(-0.1, 1, 0.5), (1.1, 1, 0.5), (0.5, 0, 0.5), (0.5, 1, 2.0)])
def test_impossible_shares_are_refused(arguments: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="shares lie between 0 and 1"):
        memory_bound_rate(*arguments)


def test_impossible_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory and slots are at least 0"):
        redundancy(LOADS, -1, Ranks(16), lambda balance, taken: balance)
    with pytest.raises(ValueError, match="at least one layer"):
        redundancy([], 1, Ranks(16), lambda balance, taken: balance)
