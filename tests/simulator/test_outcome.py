import json
import math
from fractions import Fraction

import numpy as np
import pytest
from tests.simulator.small import option, scenario

from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.fleet import Fleet
from expertmesh.simulator.outcome import (
    Attainment,
    Outcome,
    Recorder,
    Served,
    as_json,
    served_by_tick,
    to_text,
)
from expertmesh.simulator.scenario import Scenario


def served(requests: list[float], both: list[float], **others: list[float]) -> Served:
    columns = {"ttft_met": both, "tpot_met": both, "both_met": both, "output_tokens": requests}
    nothing = [0.0] * len(requests)
    every = {"requests": requests, "refused": nothing, "cut": nothing, **columns, **others}
    return Served(**{name: np.array(column, dtype=float) for name, column in every.items()})


def recorded(
    scenario: Scenario, result: Served, loads: list[tuple[float, ...]] | None = None
) -> Outcome:
    fleet, recorder = Fleet(scenario), Recorder(scenario)
    for tick in range(len(result.requests)):
        now_s = tick * scenario.tick_s
        fleet.advance(now_s)
        load = loads[tick] if loads else (0.0,) * len(scenario.options)
        recorder.tick(now_s, fleet, loads=load, queued=tick, in_flight=2.0, waiting=False)
    end_s = len(result.requests) * scenario.tick_s
    return recorder.outcome("p", "fluid", end_s, fleet, result)


def test_cost_is_exact_and_per_million_tokens() -> None:
    outcome = recorded(scenario(option(usd=0.1)), served([500_000.0] * 360, [500_000.0] * 360))
    assert outcome.usd_by_option == (Fraction(1, 10),)
    assert outcome.usd_per_mtok_out == pytest.approx(0.1 / 180)
    assert as_json(outcome)["usd_exact"] == "1/10"


def test_states_cost_what_their_groups_cost() -> None:
    two = scenario(option(), option("big", 72.0), initial_groups=(1, 1))
    fleet, recorder = Fleet(two), Recorder(two)
    for tick in range(36):
        fleet.advance(tick * 10.0)
        if tick == 6:
            fleet.start(1, 60.0)
        if tick == 18:
            fleet.drain("em-s-od-1", 180.0)
        recorder.tick(tick * 10.0, fleet, loads=(1.0, 1.0), queued=0, in_flight=0, waiting=False)
    outcome = recorder.outcome("p", "fluid", 360.0, fleet, served([1.0] * 36, [1.0] * 36))
    starting, ready, draining = as_json(outcome)["usd_by_state"].values()
    assert starting == pytest.approx(72 * 100 / 3600)
    assert draining == pytest.approx(36 * 180 / 3600)
    assert starting + ready + draining == pytest.approx(outcome.usd)


def test_the_worst_ten_minutes_are_found_wherever_they_lie() -> None:
    requests, both = np.full(360, 10.0), np.full(360, 10.0)
    both[130:160] = 4.0
    outcome = recorded(scenario(), served(requests.tolist(), both.tolist()))
    assert outcome.worst_10min.both == pytest.approx(1 - 30 * 6 / 600)
    assert outcome.attainment.both == pytest.approx(1 - 30 * 6 / 3600)


def test_each_kind_has_its_own_worst_window() -> None:
    requests = [10.0] * 200
    early = [0.0] * 60 + [10.0] * 140
    late = [10.0] * 140 + [0.0] * 60
    neither = [0.0] * 60 + [10.0] * 80 + [0.0] * 60
    outcome = recorded(scenario(), served(requests, neither, ttft_met=early, tpot_met=late))
    assert outcome.worst_10min == Attainment(0.0, 0.0, 0.0)
    assert outcome.attainment == Attainment(0.7, 0.7, 0.4)


def test_a_nearly_silent_window_is_not_the_worst_one() -> None:
    requests = [10.0] * 100 + [0.0] * 60 + [1.0] + [0.0] * 60 + [10.0] * 100
    both = [10.0] * 100 + [0.0] * 121 + [10.0] * 100
    assert recorded(scenario(), served(requests, both)).worst_10min.both > 0.99
    few = recorded(scenario(), served([1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]))
    assert few.worst_10min.both == 0.6
    silent = recorded(scenario(), served([0.0] * 5, [0.0] * 5))
    assert (silent.attainment.both, silent.usd_per_mtok_out) == (1.0, math.inf)


def test_too_many_and_too_few_groups_are_counted_apart() -> None:
    two = scenario(option(), option("big"), initial_groups=(1, 1))
    # A big group is worth two: 3 small ones are there.
    loads = [(2.0, 1.0)] * 180 + [(4.0, 2.0)] * 180
    outcome = recorded(two, served([1.0] * 360, [1.0] * 360), loads)
    assert outcome.over_group_hours == pytest.approx(0.5)
    assert outcome.under_group_hours == pytest.approx(0.5)


def test_groups_without_load_are_too_many() -> None:
    two = scenario(option(), option("big"), initial_groups=(1, 1))
    idle = recorded(two, served([1.0] * 360, [1.0] * 360), [(0.0, 0.0)] * 360)
    assert idle.over_group_hours == pytest.approx(2.0)
    half = recorded(two, served([1.0] * 360, [1.0] * 360), [(0.0, 0.0), (4.0, 2.0)] * 180)
    assert half.over_group_hours == pytest.approx(1.5)


def test_series_have_one_value_a_tick() -> None:
    outcome = recorded(scenario(), served([1.0, 0.0], [1.0, 0.0]), [(0.5,), (0.0,)])
    plain = json.loads(to_text(outcome, series=True))
    assert plain["series"] == {
        "at_s": [0.0, 10.0],
        "load_groups": {"od/t1d8e8": [0.5, 0.0]},
        "queued": [0.0, 1.0],
        "in_flight": [2.0, 2.0],
        "groups": {
            "starting": {"od/t1d8e8": [0.0, 0.0]},
            "ready": {"od/t1d8e8": [1.0, 1.0]},
            "draining": {"od/t1d8e8": [0.0, 0.0]},
        },
        "usd_per_hour": [36.0, 36.0],
        "both_met": [1.0, None],
    }


def test_json_has_no_infinity() -> None:
    outcome = recorded(scenario(), served([1.0], [0.0], output_tokens=[0.0]))
    assert json.loads(to_text(outcome))["usd_per_mtok_out"] is None
    assert "series" not in json.loads(to_text(outcome))


# From single requests


def by_tick(**changes: list[float]) -> Served:
    columns: dict[str, list[float]] = {
        "arrived_at_s": [0.0, 1.0, 12.0, 29.9],
        "ttft_s": [1.0, 2.0, 1.0, 1.0],
        "tpot_s": [0.04, 0.04, 0.04, 0.04],
        "refused": [0, 0, 0, 0],
        "cut": [0, 0, 0, 0],
        "output_tokens": [10, 20, 30, 40],
    }
    return served_by_tick(**{**columns, **changes}, slo=Slo(2.0, 0.05), tick_s=10.0, ticks=3)


def test_requests_count_in_the_tick_of_their_arrival() -> None:
    result = by_tick()
    assert result.requests.tolist() == [2, 1, 1]
    assert result.both_met.tolist() == [2, 1, 1]
    assert result.output_tokens.tolist() == [30, 30, 40]
    assert by_tick(arrived_at_s=[0.0, 1.0, 12.0, 99.0]).requests.tolist() == [2, 1, 1]


def test_a_target_is_missed_by_being_late_slow_refused_or_cut() -> None:
    late = by_tick(ttft_s=[2.1, 2.0, 1.0, 1.0])
    assert (late.ttft_met[0], late.tpot_met[0], late.both_met[0]) == (1, 2, 1)
    slow = by_tick(tpot_s=[0.051, 0.05, 0.04, 0.04])
    assert (slow.ttft_met[0], slow.tpot_met[0], slow.both_met[0]) == (2, 1, 1)
    refused = by_tick(refused=[1, 0, 0, 0], ttft_s=[math.nan, 1, 1, 1])
    assert (refused.ttft_met[0], refused.tpot_met[0], refused.refused[0]) == (1, 1, 1)
    cut = by_tick(cut=[1, 0, 0, 0])
    assert (cut.ttft_met[0], cut.tpot_met[0], cut.both_met[0], cut.cut[0]) == (1, 1, 1, 1)


def test_an_answer_of_one_token_has_no_pace_to_miss() -> None:
    assert by_tick(tpot_s=[math.nan, 0.04, 0.04, 0.04]).both_met[0] == 2
    assert by_tick(ttft_s=[math.nan, 1, 1, 1]).both_met[0] == 1
