"""Dynamo's planner: forecasts, the floor and the correction."""

import random

import pytest
from tests.simulator.baselines.views import (
    drained,
    group,
    groups,
    option,
    scenario,
    started,
    view,
)

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.baselines.dynamo import Dynamo, Iterations, Predictor
from expertmesh.simulator.baselines.forecast import Constant, DampedTrend, Forecast, Kalman


@pytest.mark.parametrize("forecast", [Constant(), DampedTrend(), Kalman()])
def test_without_values_nothing_is_expected(forecast: Forecast) -> None:
    assert forecast.next() == 0.0
    forecast.add(7.0)
    assert forecast.next() == 7.0


def test_a_trend_is_carried_on_after_five_values() -> None:
    for forecast in (DampedTrend(), Kalman()):
        for value in range(10, 60, 5):
            forecast.add(float(value))
        assert forecast.next() == pytest.approx(60.0, abs=4.0)
    assert Constant().next() == 0.0


def test_noise_is_smoothed() -> None:
    draw = random.Random(1)
    forecast = DampedTrend()
    for _ in range(200):
        forecast.add(100.0 + draw.gauss(0.0, 20.0))
    assert forecast.next() == pytest.approx(100.0, abs=8.0)


def test_a_fall_does_not_end_below_zero() -> None:
    for forecast in (DampedTrend(), Kalman()):
        for value in (50.0, 40.0, 30.0, 20.0, 10.0, 0.0):
            forecast.add(value)
        assert forecast.next() >= 0.0


def feed(policy: Dynamo, until_s: int, count: int, **seen: float) -> list[int]:
    """Views every 10 s with the same engines; how many were started at each."""
    counts = []
    for now_s in range(0, until_s + 1, 10):
        there = groups(count, in_flight=1.0)
        counts.append(len(started(policy.decide(view(now_s, groups=there, **seen)))))  # type: ignore[arg-type]
    return counts


def test_the_floor_is_the_predicted_rate_over_an_engine_s_rate() -> None:
    """A request takes 1000 / 10,000 + 400 / 1000 = 0.5 s of an engine, so 7 a second need 4."""
    policy = Dynamo(scenario(), load_scaling=False)
    counts = feed(policy, 180, 1, arrivals_per_s=7.0, prompt_tokens=1000, output_tokens=400)
    assert counts == [0] * 18 + [3]


def test_without_load_scaling_engines_leave_when_the_forecast_falls() -> None:
    policy = Dynamo(scenario(), load_scaling=False, predictor=Predictor.CONSTANT)
    there = groups(4, in_flight=1.0)
    for now_s in range(0, 180, 10):
        policy.decide(view(now_s, there, arrivals_per_s=3.0, prompt_tokens=1000, output_tokens=400))
    seen = view(180.0, there, arrivals_per_s=3.0, prompt_tokens=1000, output_tokens=400)
    assert len(drained(policy.decide(seen))) == 2


def test_the_regression_finds_the_parts_of_an_iteration() -> None:
    iterations = Iterations()
    draw = random.Random(2)
    for _ in range(64):
        running, kv, prompts = draw.uniform(20, 90), draw.uniform(0.1, 0.9), draw.uniform(0, 500)
        iteration_s = 0.02 + 1e-5 * prompts + 2e-7 * kv * 100_000
        iterations.learn(
            group(
                1,
                in_flight=running,
                kv_usage=kv,
                prompt_tokens_per_s=prompts / iteration_s,
                output_tokens_per_s=running / iteration_s,
            ),
            100_000,
        )
    assert iterations.fit() == pytest.approx((0.02, 1e-5, 2e-7))


def taught(policy: Dynamo) -> Dynamo:
    """An iteration takes 0.02 s and 5e-7 s for each token of context."""
    for usage in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        seen = group(
            1,
            in_flight=50,
            kv_usage=usage,
            output_tokens_per_s=50 / (0.02 + 5e-7 * usage * 100_000),
        )
        policy._iterations.learn(seen, 100_000)
    return policy


def test_one_engine_more_when_all_are_too_slow() -> None:
    """0.02 + 5e-7 · 70,000 = 0.055 s a token."""
    policy = taught(Dynamo(scenario()))
    slow = groups(2, kv_usage=0.7)
    assert len(started(policy.decide(view(0.0, groups=slow)))) == 1
    one_fast = (group(1, kv_usage=0.7), group(2, kv_usage=0.3))
    assert started(taught(Dynamo(scenario())).decide(view(0.0, groups=one_fast))) == []


def test_one_engine_more_when_all_would_answer_too_late() -> None:
    policy = taught(Dynamo(scenario(option(max_batched_tokens=1000))))
    seen = view(groups=groups(2, kv_usage=0.3), queued=200, prompt_tokens=1000, output_tokens=10)
    assert len(started(policy.decide(seen))) == 1


def test_one_engine_fewer_only_when_the_others_stay_well_below_the_target() -> None:
    """Of 3: 0.3 · 3 / 2 are 0.0425 s, above 0.8 of 0.05 s; 0.1 · 3 / 2 are 0.0275 s."""
    assert taught(Dynamo(scenario())).decide(view(groups=groups(3, kv_usage=0.3))) == ()
    moves = taught(Dynamo(scenario())).decide(view(groups=groups(3, kv_usage=0.1)))
    assert drained(moves) == ["g3"]


def test_nothing_is_decided_while_an_engine_starts() -> None:
    policy = taught(Dynamo(scenario()))
    there = (*groups(2, kv_usage=0.9), group(3, state=GroupState.STARTING))
    assert policy.decide(view(groups=there)) == ()


def test_the_load_loop_does_not_go_below_the_floor() -> None:
    policy = taught(Dynamo(scenario(), predictor=Predictor.CONSTANT))
    there = groups(4, kv_usage=0.05)
    policy._floor = 4
    assert policy.decide(view(groups=there)) == ()
