from itertools import pairwise

import pytest

from expertmesh.core.planner.expert_load import measured_by_layer, power_law
from expertmesh.core.planner.placement import balancedness, first_placement


def test_a_power_law_lies_between_its_limits_and_is_skewed_more_by_a_larger_exponent() -> None:
    shares = []
    for exponent in (0.0, 0.5, 1.0, 1.01, 1.2, 2.0):
        (layer,) = power_law(256, 1, exponent, spread=1000.0)
        assert 1.0 <= min(layer) < max(layer) <= 1000.0
        shares.append(max(layer) / sum(layer))
    assert all(less < more for less, more in pairwise(shares))


def test_a_power_law_has_the_stated_density() -> None:
    """Density 1/x: as many experts between 1 and 10 as between 10 and 100."""
    (layer,) = power_law(100, 1, 1.0, spread=100.0)
    assert sum(load < 10.0 for load in layer) == 50
    (even,) = power_law(4, 1, 0.0, spread=9.0)
    assert sorted(even) == pytest.approx([2.0, 4.0, 6.0, 8.0])


def test_layers_have_the_same_loads_in_other_orders_that_never_change() -> None:
    loads = power_law(64, 3, 1.2)
    assert sorted(loads[0]) == sorted(loads[1]) == sorted(loads[2])
    assert loads[0] != loads[1] != loads[2] != sorted(loads[2])
    assert loads == power_law(64, 3, 1.2)


def test_no_spread_is_no_skew() -> None:
    assert power_law(4, 1, 1.2, spread=1.0) == [[1.0] * 4]


def test_the_default_spread_gives_the_measured_imbalance_of_deepseek_r1() -> None:
    loads = power_law(256, 58, 1.01)
    imbalance = 1 / balancedness(first_placement(58, 256, 32), loads) - 1
    assert imbalance == pytest.approx(1.564, rel=0.02)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 1.0, 2.0), (1, 0, 1.0, 2.0), (1, 1, 1.0, 0.5), (1, 1, 1.0, float("nan"))]
)
def test_impossible_power_laws_are_refused(arguments: tuple[int, int, float, float]) -> None:
    with pytest.raises(ValueError, match="a power law needs"):
        power_law(*arguments)


def test_ranks_report_shares_of_each_layer() -> None:
    shares = [{3: {"0": 5, "1": 1}, 1: {"0": 2}}, {1: {"2": 4}, 3: {"2": 7, "1": 2}}]
    assert measured_by_layer(shares, experts=4) == [[2, 0, 4, 0], [5, 3, 7, 0]]


@pytest.mark.parametrize("tokens", [{"4": 1}, {"-1": 1}])
def test_tokens_of_experts_that_the_model_lacks_are_refused(tokens: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="the model has 4 experts"):
        measured_by_layer([{0: tokens}], 4)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="negative number of tokens"):
        measured_by_layer([{0: {"1": -1}}], 4)


def test_nothing_measured_yet_is_said() -> None:
    with pytest.raises(ValueError, match="no rank has reported"):
        measured_by_layer([{}], 4)
