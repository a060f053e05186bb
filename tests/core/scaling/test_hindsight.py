"""The least cost of the past: against a search by hand, and against the simulator's oracle."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.scaling.world import config, pool, size_option

from expertmesh.core.scaling.contract import ModelState
from expertmesh.core.scaling.hindsight import (
    Least,
    Served,
    Way,
    hindsight,
    least_usd,
    spread_out,
)
from expertmesh.core.scaling.learning import Learned
from expertmesh.core.scaling.mix import Bounds
from expertmesh.core.scaling.work import Work
from expertmesh.simulator.oracle import Least as OracleLeast
from expertmesh.simulator.oracle import Problem, least_cost

ONE = Way(usd_per_hour=60.0, start_s=120.0, pool="a", workers=1)
"""A dollar a minute, and two for a start."""
ROOM = Bounds(0, 10, {"a": 10})


def least(
    loads: list[float], way: Way = ONE, bounds: Bounds = ROOM, bin_s: float = 60.0
) -> float | None:
    return least_usd([way], bounds, [[load] for load in loads], bin_s)


def test_nothing_to_do_costs_nothing() -> None:
    assert least([0.0] * 5) == 0.0
    assert least([]) == 0.0


def test_a_group_is_kept_over_a_gap_that_is_shorter_than_a_start() -> None:
    # It is there at the beginning, and one minute of waiting is cheaper than a start.
    assert least([1.0, 0.0, 1.0]) == pytest.approx(3.0)
    # Three minutes are dearer than a start, which costs two.
    assert least([1.0, 0.0, 0.0, 0.0, 1.0]) == pytest.approx(4.0)


def test_a_part_of_a_group_costs_a_whole_one() -> None:
    assert least([0.1]) == pytest.approx(1.0)
    assert least([1.1]) == pytest.approx(2.0)
    assert least([2.0 + 1e-12]) == pytest.approx(2.0), "no further group for an error of rounding"


def test_the_manifests_minimum_is_paid() -> None:
    assert least([0.0] * 4, bounds=replace(ROOM, min_groups=2)) == pytest.approx(8.0)


def test_what_the_bounds_do_not_let_through_waits_and_is_done_later() -> None:
    bounds = replace(ROOM, max_groups=1)
    assert least([3.0, 0.0, 0.0, 0.0], bounds=bounds) == pytest.approx(3.0)
    assert least([3.0, 0.0, 0.0, 0.0], bounds=Bounds(0, 10, {"a": 1})) == pytest.approx(3.0)
    budget = replace(ROOM, usd_per_hour=60.0)
    assert least([3.0, 0.0, 0.0, 0.0], bounds=budget) == pytest.approx(3.0)


def test_bounds_that_no_fleet_meets_and_too_many_states_have_no_answer() -> None:
    assert least([1.0], bounds=Bounds(2, 10, {"a": 1})) is None
    ways = [replace(ONE, pool=name) for name in "abcdef"]
    bounds = Bounds(0, 60, dict.fromkeys("abcdef", 60))
    assert least_usd(ways, bounds, [[50.0] * 6] * 10, 60.0) is None


def test_the_cheaper_pool_is_filled_first_and_pools_are_shared() -> None:
    small, large = ONE, replace(ONE, usd_per_hour=90.0, workers=2)
    # The large one does twice as much.
    loads = [[2.0, 1.0]] * 3
    assert least_usd([small, large], ROOM, loads, 60.0) == pytest.approx(4.5)
    one_worker = replace(ROOM, workers={"a": 1})
    # Only a small one fits: half of the work waits, at the end for ever.
    assert least_usd([small, large], one_worker, loads, 60.0) == pytest.approx(3.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 3.0).map(lambda value: round(value, 2)), min_size=1, max_size=5),
    st.sampled_from((0.4, 0.7, 1.0, 1.3)),
    st.floats(0.0, 300.0),
    st.integers(0, 1),
)
def test_it_is_what_trying_all_fleets_finds(
    work: list[float], of_the_other: float, start_s: float, min_groups: int
) -> None:
    loads = [(each, each * of_the_other) for each in work]
    ways = [replace(ONE, start_s=start_s), Way(100.0, 60.0, "b", 1)]
    found = least_usd(ways, Bounds(min_groups, 4, {"a": 4, "b": 4}), loads, 60.0)
    fleets = [f for f in itertools.product(range(5), repeat=2) if min_groups <= sum(f) <= 4]

    def serves(fleet: tuple[int, ...], load: tuple[float, float]) -> bool:
        if max(load) <= 0:
            return True
        return sum(n / max(each, 1e-12) for n, each in zip(fleet, load, strict=True)) >= 1 - 1e-9

    best = {fleet: 0.0 for fleet in fleets}
    for number, load in enumerate(loads):
        best = {
            fleet: min(
                usd
                + (
                    sum(
                        max(0, n - was) * way.usd_per_hour * way.start_s / 3600
                        for n, was, way in zip(fleet, before, ways, strict=True)
                    )
                    if number
                    else 0.0
                )
                for before, usd in best.items()
            )
            + sum(n * way.usd_per_hour for n, way in zip(fleet, ways, strict=True)) / 60
            if serves(fleet, load)
            else math.inf
            for fleet in fleets
        }
    assert found == pytest.approx(min(best.values()))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_the_simulators_oracle_says(seed: int) -> None:
    chance = np.random.default_rng(seed)
    base = 2.0 + 1.5 * np.sin(np.arange(200) / 12.0) + chance.normal(0, 0.3, 200)
    loads = np.maximum(0.0, np.stack([base, base / 1.7], axis=1))
    ways = [Way(3.0, 200.0, "a", 1), Way(4.5, 500.0, "b", 1)]
    oracle = least_cost(
        Problem(
            bin_s=60.0,
            usd_per_hour=(3.0, 4.5),
            start_s=(200.0, 500.0),
            max_groups=(6, 6),
            loads=loads,
            requests=np.ones(200),
            nodes=(1, 1),
            min_groups=1,
        )
    )
    assert isinstance(oracle, OracleLeast)
    found = least_usd(ways, Bounds(1, 12, {"a": 6, "b": 6}), loads.tolist(), 60.0)
    assert found == pytest.approx(oracle.usd)


def test_work_is_spread_over_the_time_that_requests_stay() -> None:
    short = [Served(10, 100, 1000, at_groups_s=10.0)] + [Served()] * 9
    spread = spread_out(short, 60.0)
    assert spread[0].output_tokens == pytest.approx(1000 * (1 - 1 / 60), rel=1e-6)
    long = [Served(10, 100, 1000, at_groups_s=10 * 120.0)] + [Served()] * 99
    spread = spread_out(long, 60.0)
    assert spread[0].output_tokens < 250 < 1000 * (1 - math.exp(-0.5)) < 400
    assert spread[1].output_tokens > spread[2].output_tokens > 0
    assert sum(each.output_tokens for each in spread) == pytest.approx(1000)
    assert sum(each.requests for each in spread) == pytest.approx(10)
    assert spread_out([Served()], 60.0) == [Served()]


def hours(requests: float, output_tokens: float, minutes: int = 60) -> list[Served]:
    each = Served(requests, 0.0, requests * output_tokens, at_groups_s=requests * 0.001)
    return [each] * minutes


def test_planned_rates_are_corrected_by_what_groups_have_shown() -> None:
    cheap = pool("cheap", 0.5, nodes=20)
    made = replace(config(cheap, max_groups=10), options=(size_option(cheap),))
    known = Work(finished=100.0, finished_per_s=1.0, output_tokens_per_s=256.0)
    # 1280 tokens a second: 2.5 groups' worth, every minute.
    served = hours(750, 256.0)
    planned = hindsight(made, ModelState(work=known), served, 60.0)
    assert planned == Least(3 * 1.0, 60.0, by_tokens=True)
    learned = {made.options[0].name: Learned(seconds_ratio=2.0, measured_s=600.0)}
    slower = hindsight(made, ModelState(work=known, learned=learned), served, 60.0)
    assert slower is not None and slower.usd == pytest.approx(5 * 1.0)


def test_without_rates_it_counts_requests_at_once() -> None:
    made = config(pool("cheap", 0.3), pool("dear", 0.45))
    # 12 at once, of 8 for each group.
    served = [Served(720.0, 0.0, 0.0, at_groups_s=720.0)] * 60
    found = hindsight(made, ModelState(), served, 60.0)
    # The cheap pool has room for one group of two workers.
    assert found is not None and not found.by_tokens
    assert found.usd == pytest.approx(0.6 + 0.9, rel=0.02)


def test_a_model_without_options_has_no_hindsight() -> None:
    made = replace(config(), options=())
    assert hindsight(made, ModelState(), hours(1, 1), 60.0) is None


def test_where_there_are_too_many_fleets_bins_become_longer() -> None:
    pools = [pool(name, 1.0, nodes=200) for name in ("a", "b")]
    made = config(*pools, max_groups=100)
    # 60 groups of either kind: 3,721 states.
    served = [Served(1.0, 0.0, 0.0, at_groups_s=60.0 * 8 * 60)] * 1440
    found = hindsight(made, ModelState(), served, 1.0)
    assert found is not None and found.bin_s > 1.0
