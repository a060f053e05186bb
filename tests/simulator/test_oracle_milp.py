from dataclasses import replace

import numpy as np
import pytest
from tests.simulator.oracle_milp import cost_of, least_cost_milp

from expertmesh.simulator.oracle import Least, NotServable, Problem, least_cost

SEEDS = range(12)


def random_problem(seed: int, options: int = 2, bins: int = 24) -> Problem:
    draw = np.random.default_rng(seed)
    work = np.cumsum(draw.normal(0, 0.4, bins)) + draw.uniform(1, 3)
    work = np.maximum(work, 0.0) * (draw.random(bins) > 0.1)
    speed = draw.uniform(0.3, 1.5, options)
    # Lengths change over time, so options are not worth the same in every bin.
    drift = draw.uniform(0.9, 1.1, (bins, options))
    return Problem(
        bin_s=60.0,
        usd_per_hour=tuple(draw.uniform(10, 100, options).round(2).tolist()),
        start_s=tuple(draw.uniform(30, 900, options).round().tolist()),
        max_groups=tuple([9 if options == 2 else 6] * options),
        loads=work[:, None] * drift / speed,
        requests=work * 100,
        nodes=tuple(draw.integers(1, 3, options).tolist()),
    )


def solved(problem: Problem) -> Least:
    least = least_cost(problem)
    assert isinstance(least, Least)
    return least


def agrees(problem: Problem) -> bool:
    """True when both found a fleet."""
    expected = least_cost_milp(problem)
    if expected is None:
        assert isinstance(least_cost(problem), NotServable)
        return False
    least = solved(problem)
    assert least.usd == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert cost_of(problem, least.fleet) == pytest.approx(least.usd, rel=1e-9)
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_two_options_cost_what_the_integer_program_says(seed: int) -> None:
    assert agrees(random_problem(seed))


@pytest.mark.parametrize("seed", range(4))
def test_three_options_cost_what_the_integer_program_says(seed: int) -> None:
    assert agrees(random_problem(seed, options=3, bins=16))


def test_one_option_costs_what_the_integer_program_says() -> None:
    assert agrees(random_problem(3, options=1))


def test_a_zone_that_comes_and_goes_costs_what_the_integer_program_says() -> None:
    found = 0
    for seed in SEEDS:
        problem = random_problem(seed)
        nodes = np.random.default_rng(seed).integers(0, 7, problem.bins).astype(float)
        found += agrees(replace(problem, zones=(((1,), nodes),)))
        # Both options on the same nodes: often there are too few.
        found += agrees(replace(problem, zones=(((0, 1), nodes + 6),)))
    assert found > len(SEEDS)


def test_a_budget_and_a_minimum_cost_what_the_integer_program_says() -> None:
    found = 0
    for seed in SEEDS:
        problem = random_problem(seed)
        free = solved(problem)
        most = float((free.fleet * np.array(problem.usd_per_hour)).sum(axis=1).max())
        found += agrees(replace(problem, min_groups=3, budget_usd_per_hour=most * 1.1))
        agrees(replace(problem, budget_usd_per_hour=most * 0.7))
    assert found > len(SEEDS) / 2


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_with_misses_is_below_the_integer_program_and_near_it(seed: int) -> None:
    problem = random_problem(seed, bins=18)
    expected = least_cost_milp(problem, miss_share=0.03)
    assert expected is not None
    least = least_cost(problem, miss_share=0.03)
    assert isinstance(least, Least)
    assert least.usd <= expected * (1 + 1e-6)
    assert least.usd >= 0.9 * expected
    assert least.usd < solved(problem).usd
