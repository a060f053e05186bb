from dataclasses import replace

import pytest
from tests.core.scaling.market import NOW_S, record
from tests.core.scaling.world import World, config, pool

from expertmesh.core.scaling.calibration import calibrate, quantiles
from expertmesh.core.scaling.contract import Load
from expertmesh.core.scaling.replay import DecisionRecord


def said(at_s: float, *, wait_s: float = 0.0, **load: float) -> DecisionRecord:
    """A decision that saw and expected this much."""
    of = record(groups={0: 1}, arrivals_per_s=5.0)
    decision = of.decision
    demand = replace(decision.demand, oldest_wait_s=wait_s)
    told = replace(Load(by_tokens=True), **load)  # type: ignore[arg-type]
    return replace(of, now_s=NOW_S + at_s, decision=replace(decision, load=told, demand=demand))


def test_starts_are_compared_with_what_was_expected_of_them() -> None:
    world = World(config(pool("cheap", 0.3), up_delay_s=0.0, down_delay_s=5.0), start_s=20)
    for _ in range(3):
        world.steps(40, queued=3)
        world.steps(120)
    (told,) = calibrate(world.records)
    (starts,) = told.starts
    assert starts.option == "cheap/t1d2e2"
    assert starts.took_s is not None
    assert (starts.took_s.count, starts.took_s.p50, starts.failed) == (3, 20.0, 0)
    # 60 s at first, then an average that leans to the 20 s that it took.
    assert 20.0 < starts.expected_s < 60.0
    assert (told.decisions, told.span_s) == (480, 479.0)
    assert told.load_error is None, "nothing is forecast by requests"


def test_failed_starts_are_counted_apart() -> None:
    world = World(config(pool("cheap", 0.3), up_delay_s=0.0), start_s=20)
    world.failing_pools = {"cheap"}
    world.steps(100, queued=3)
    (starts,) = calibrate(world.records)[0].starts
    assert starts.took_s is None
    assert starts.failed >= 2


def test_the_load_is_compared_with_the_forecast_when_the_horizon_has_passed() -> None:
    horizon_s = 500.0  # the quickest start of the market's options
    records = [
        said(60.0 * n, now=1.0 + 0.1 * n, expected=1.0 + 0.1 * n, spare=0.5) for n in range(20)
    ]
    (told,) = calibrate(records)
    assert told.load_error is not None
    # The last record at or before 500 s is that of 480 s, 8 records later.
    assert told.load_error.p50 == pytest.approx(0.8)
    assert told.load_error.count == sum(60 * n + horizon_s <= 60 * 19 for n in range(20))
    assert told.within_spare == 0.0
    (roomy,) = calibrate([said(60.0 * n, now=1.0, expected=1.0, spare=0.5) for n in range(20)])
    assert roomy.within_spare == 1.0
    assert roomy.attainment == 0.99


def test_a_gap_in_the_journal_is_no_outcome() -> None:
    records = [said(0.0, now=1.0, expected=1.0), said(3000.0, now=9.0, expected=9.0)]
    (told,) = calibrate(records)
    assert (told.load_error, told.within_spare, told.wait_error_s) == (None, None, None)


def test_waits_are_compared_at_the_time_that_they_would_end() -> None:
    waiting = {"now": 1.0, "ready": 2.0, "backlog_s": 30.0, "expected": 1.0}
    records = [said(0.0, **waiting), said(30.0, wait_s=42.0), said(60.0)]
    (told,) = calibrate(records)
    assert told.wait_error_s is not None
    assert (told.wait_error_s.count, told.wait_error_s.p50) == (1, 12.0)


def test_models_are_told_apart_and_nothing_is_nothing() -> None:
    one, other = said(0.0), said(1.0)
    other = replace(other, decision=replace(other.decision, model="other"))
    assert [told.model for told in calibrate([one, other])] == ["moe", "other"]
    assert calibrate([]) == ()
    assert quantiles([]) is None


def test_quantiles_are_values_that_were_seen() -> None:
    told = quantiles([float(n) for n in range(100, 0, -1)])
    assert told is not None
    assert (told.count, told.p10, told.p50, told.p90) == (100, 11.0, 51.0, 91.0)
