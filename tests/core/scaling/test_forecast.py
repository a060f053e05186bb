import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.core.scaling.forecast import BIN_S, Forecaster, usual_margin

HORIZON_S = 300.0
FIRST = Forecaster().margin


def after(
    loads: list[float], quantile: float = 0.9, horizon_s: float = HORIZON_S, group: float = 1.0
) -> Forecaster:
    """One load a bin."""
    forecast = Forecaster()
    for load in loads:
        forecast = forecast.seen(load, BIN_S, horizon_s, quantile, group)
    return forecast


def test_before_anything_was_seen_it_is_the_load_of_now() -> None:
    assert Forecaster().expected(HORIZON_S, 3.0) == 3.0


def test_a_steady_load_stays_as_it_is() -> None:
    assert after([3.0] * 60).expected(HORIZON_S, 3.0) == pytest.approx(3.0)


def test_the_margin_of_a_steady_load_shrinks_and_that_of_a_wild_one_grows() -> None:
    rng = random.Random(3)
    wild = [max(0.0, rng.gauss(3.0, 2.0)) for _ in range(400)]
    assert after([3.0] * 400, quantile=0.6).margin < FIRST
    assert after(wild, quantile=0.99).margin > after([3.0] * 400, quantile=0.99).margin


def test_a_rising_load_is_expected_above_now_and_a_falling_one_not_below() -> None:
    rising = [1.0 + 0.1 * n for n in range(60)]
    assert after(rising).expected(HORIZON_S, rising[-1]) > rising[-1]
    falling = rising[::-1]
    assert after(falling).expected(HORIZON_S, falling[-1]) >= falling[-1]


def test_who_forecasts_better_gets_more_weight() -> None:
    rising = after([1.0 + 0.1 * n for n in range(200)])
    fast, slow, trend = rising.weights
    assert trend > fast > slow


def test_weights_never_die_out() -> None:
    forecast = after([float(n % 2 * 8) for n in range(500)])
    assert sum(forecast.weights) == pytest.approx(1.0)
    assert min(forecast.weights) >= 0.05


def test_the_spare_grows_with_the_root_of_the_load() -> None:
    forecast = Forecaster(margin=0.5)
    one = 0.5 * usual_margin(0.99)
    assert forecast.spare(0.0, 1.0, 0.99) == 0.0
    assert forecast.spare(4.0, 1.0, 0.99) == pytest.approx(2 * one)
    assert forecast.spare(16.0, 1.0, 0.99) == pytest.approx(4 * one)


def test_who_may_miss_fewer_targets_keeps_more_in_hand() -> None:
    margins = [usual_margin(quantile) for quantile in (0.9, 0.99, 0.999)]
    assert 0 < margins[0] < margins[1] < margins[2]
    assert math.isfinite(usual_margin(1.0))
    assert usual_margin(0.0) > 0


def test_of_larger_groups_fewer_are_in_hand_but_more_load() -> None:
    forecast = Forecaster(margin=0.5)
    assert forecast.spare(16.0, 4.0, 0.99) == pytest.approx(2 * forecast.spare(16.0, 1.0, 0.99))


def test_the_margin_is_learned_in_groups_whatever_their_size() -> None:
    rng = random.Random(5)
    loads = [max(0.0, rng.gauss(3.0, 0.8)) for _ in range(400)]
    one = after(loads, 0.99)
    four = after([4.0 * load for load in loads], 0.99, group=4.0)
    assert four.margin == pytest.approx(one.margin)


def test_the_length_of_the_steps_does_not_matter() -> None:
    loads = [random.Random(n).uniform(0, 5) for n in range(50)]
    coarse, fine = after(loads), Forecaster()
    for load in loads:
        for _ in range(6):
            fine = fine.seen(load, BIN_S / 6, HORIZON_S, 0.9, 1.0)
    assert fine.bins == pytest.approx(coarse.bins)
    assert fine.margin == pytest.approx(coarse.margin)


def test_a_long_step_is_many_bins_of_its_load() -> None:
    assert Forecaster().seen(2.0, 10 * BIN_S, HORIZON_S, 0.9, 1.0).bin_number == 10
    endless = Forecaster().seen(2.0, 1e9, HORIZON_S, 0.9, 1.0)
    assert endless.bin_number <= 120


def test_a_model_that_is_hardly_used_learns_no_margin() -> None:
    tiny = [0.0 if n % 3 else 0.01 for n in range(300)]
    assert after(tiny).margin == FIRST


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 1e3), min_size=1, max_size=150),
    st.floats(0.0, 7200.0),
    st.floats(0.5, 0.999),
)
def test_whatever_comes_figures_stay_sane(
    loads: list[float], horizon_s: float, quantile: float
) -> None:
    forecast = after(loads, quantile, horizon_s)
    expected = forecast.expected(horizon_s, loads[-1])
    assert expected >= loads[-1]
    assert math.isfinite(expected)
    assert expected <= 4 * max(loads) + 1e-9
    assert 0.0 <= forecast.margin <= 1.5
    assert 0.0 <= forecast.spare(expected, 2.0, quantile) < math.inf
    assert len(forecast.bins) <= 17
    assert len(forecast.due) <= 121
