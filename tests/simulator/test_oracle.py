from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.oracle import (
    Least,
    NotServable,
    Problem,
    best_static,
    least_cost,
    mean_start_s,
    problem,
    static_peaks,
)
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.workload import Load

HOUR = 3600.0
ENGINE = ServiceTime(0.01, 1e-5, 1e-8, 2_000_000, 1024, 8192)


def hours(*loads: float, usd: float = 10.0, start_s: float = HOUR / 2, most: int = 5) -> Problem:
    """One option, a bin an hour; a start costs half an hour."""
    column = np.array(loads, dtype=float)
    return Problem(HOUR, (usd,), (start_s,), (most,), column[:, None], column, (1,))


def solved(question: Problem, miss_share: float = 0.0) -> Least:
    least = least_cost(question, miss_share=miss_share)
    assert isinstance(least, Least)
    return least


def fleet(least: Least) -> list[list[int]]:
    return least.fleet.tolist()


def test_a_quiet_hour_is_bridged_when_a_start_costs_more_than_idling() -> None:
    cheap_start = solved(hours(2, 1, 2, start_s=HOUR / 2))
    assert (cheap_start.usd, fleet(cheap_start)) == (55.0, [[2], [1], [2]])
    assert cheap_start.usd_by_bin.tolist() == [20.0, 10.0, 25.0]
    dear_start = solved(hours(2, 1, 2, start_s=2 * HOUR))
    assert (dear_start.usd, fleet(dear_start)) == (60.0, [[2], [2], [2]])


def test_a_full_group_is_enough_and_a_little_more_is_not() -> None:
    assert fleet(solved(hours(2.0))) == [[2]]
    assert fleet(solved(hours(2.001))) == [[3]]


def test_nothing_to_do_costs_nothing_but_the_minimum() -> None:
    assert solved(hours(0, 0)).usd == 0
    assert solved(replace(hours(0, 0), min_groups=2)).usd == 40.0


def test_the_first_bin_that_cannot_be_served_is_named() -> None:
    assert least_cost(hours(1, 6, 7)) == NotServable(1)
    assert least_cost(replace(hours(1, 2, 1), budget_usd_per_hour=15)) == NotServable(1)
    zone = (((0,), np.array([5.0, 5.0, 0.0])),)
    assert least_cost(replace(hours(1, 2, 1), zones=zone)) == NotServable(2)
    assert best_static(hours(1, 6, 7)) == NotServable(2)


def test_two_sizes_are_mixed_where_that_is_cheaper() -> None:
    # Two small ones cost more than a large one, which does the work of three.
    loads = np.array([[1.0, 1 / 3], [4.0, 4 / 3], [3.0, 1.0]])
    question = Problem(HOUR, (10, 18), (0, 0), (9, 9), loads, loads[:, 0], (1, 2))
    assert fleet(solved(question)) == [[1, 0], [1, 1], [0, 1]]
    assert best_static(question) == (84.0, (1, 1))
    assert static_peaks(question) == ((120.0, 4), (108.0, 2))


def test_a_static_fleet_needs_nodes_at_all_times() -> None:
    question = replace(hours(1, 2, 1), zones=(((0,), np.array([5.0, 5.0, 1.0])),))
    assert best_static(question) == NotServable(1)
    assert static_peaks(question) == (None,)


def brute_force(question: Problem) -> float:
    options = range(len(question.max_groups))
    states = list(product(*(range(most + 1) for most in question.max_groups)))
    best = np.inf
    for way in product(states, repeat=question.bins):
        served = all(
            sum(state[o] / question.loads[t, o] for o in options) >= 1
            for t, state in enumerate(way)
        )
        if served:
            usd = sum(question.usd_per_hour[o] * state[o] for state in way for o in options)
            usd += sum(
                question.usd_per_hour[o] * question.start_s[o] / HOUR * max(0, b[o] - a[o])
                for a, b in pairwise(way)
                for o in options
            )
            best = min(best, usd)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_cheapest_of_all_ways(seed: int) -> None:
    draw = np.random.default_rng(seed)
    loads = draw.uniform(0.1, 2.0, (4, 1)) * draw.uniform(0.5, 1.0, (4, 2))
    question = Problem(HOUR, (10, 13), (900, 2400), (2, 2), loads, loads[:, 0], (1, 1))
    assert solved(question).usd == pytest.approx(brute_force(question))


def test_the_way_back_is_the_same_over_many_blocks() -> None:
    draw = np.random.default_rng(5)
    question = hours(*draw.uniform(0.2, 4.8, 700).tolist())
    least = solved(question)
    counts = least.fleet[:, 0]
    assert (counts >= question.loads[:, 0] - 1e-9).all()
    starts = np.maximum(np.diff(counts), 0).sum()
    assert 10 * counts.sum() + 5 * starts == pytest.approx(least.usd)
    twice = least_cost(question, memory_bytes=1000)
    assert isinstance(twice, Least)
    assert (twice.fleet == least.fleet).all()


def test_missing_a_short_peak_is_cheaper_and_stays_within_what_is_allowed() -> None:
    question = hours(*([1.0] * 30), 4.0, *([1.0] * 30))
    exact, loose = solved(question), solved(question, miss_share=0.04)
    assert exact.usd == 61 * 10 + 3 * 10 + 3 * 5
    assert loose.usd < exact.usd - 20
    assert loose.usd >= 61 * 10
    assert loose.usd_per_missed_request > 0


# From a scenario


def option(**changes: object) -> SimulatedOption:
    rates = GroupOption("od", Parallelism(1, 8, 8), 36.0, GroupRates(400), 300)
    base = SimulatedOption(rates, ENGINE, StartTime(300, 0.0), 1, Market.ON_DEMAND, 8)
    return replace(base, **changes)  # type: ignore[arg-type]


def scenario(*options: SimulatedOption) -> Scenario:
    return Scenario("s", options or (option(),), Slo(2.0, 0.05), 30)


def load(*per_second: float, bin_s: float = 600.0) -> Load:
    requests = np.array(per_second) * bin_s
    return Load(bin_s, requests, requests * 500, requests * 400)


def test_a_steady_load_needs_what_its_work_says() -> None:
    question = problem(scenario(), load(*[20.0] * 24))
    settled = question.loads[10:]
    rate = settled[:, 0] / 20
    assert rate == pytest.approx(rate[0])
    expected = 400 / 1024 * (0.01 + 1024 * (1e-5 * 2.25 + 1e-8 * 900))
    assert rate[0] == pytest.approx(expected, rel=1e-3)


def test_strict_bins_ask_for_less_and_never_for_more() -> None:
    wavy = load(*(200 + 150 * np.sin(np.arange(48) / 8)))
    for bin_s in (60.0, 600.0):
        strict = problem(scenario(), wavy, bin_s, strict=True)
        usual = problem(scenario(), wavy, bin_s)
        assert solved(strict).usd < solved(usual).usd
        assert strict.loads.sum() < usual.loads.sum()
        assert "every fleet" in strict.bound and "every" not in usual.bound


def test_bins_shorter_than_the_target_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than the TTFT target, 2 s"):
        problem(scenario(), load(1.0), 1.0)


def test_the_slowest_node_makes_the_start() -> None:
    assert mean_start_s(option()) == 300
    one = mean_start_s(option(start=StartTime(300, 0.3)))
    four = mean_start_s(option(start=StartTime(300, 0.3), nodes=4))
    draw = np.random.default_rng(1).lognormal(np.log(300), 0.3, (200_000, 4))
    assert one == pytest.approx(draw[:, 0].mean(), rel=5e-3)
    assert four == pytest.approx(draw.max(axis=1).mean(), rel=5e-3)


def test_a_zone_counts_with_the_most_nodes_of_each_bin() -> None:
    zone = Availability((0.0, 600.0, 660.0), (2, 0, 3))
    spot = option(availability=zone, market=Market.SPOT)
    question = problem(scenario(option(), spot_in("spot", spot)), load(*[1.0] * 3), 300.0)
    ((members, nodes),) = question.zones
    assert (members, nodes.tolist()) == ((1,), [2, 2, 3, 3, 3, 3])


def test_sizes_of_one_pool_share_its_nodes() -> None:
    large = option(nodes=4, max_groups=3)
    question = problem(scenario(option(), large), load(1.0), 300.0)
    ((members, nodes),) = question.zones
    assert (members, nodes.tolist()) == ((0, 1), [12, 12])


def spot_in(pool: str, base: SimulatedOption) -> SimulatedOption:
    return replace(base, option=replace(base.option, pool=pool))
