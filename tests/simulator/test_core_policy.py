"""The platform's scaling core, driving simulated fleets."""

from dataclasses import replace

import pytest
from tests.simulator.small import ENGINE, load, option, scenario

from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupRates
from expertmesh.simulator.core_policy import CorePolicy
from expertmesh.simulator.events import run_events
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.oracle import Least, least_cost, problem
from expertmesh.simulator.outcome import Outcome, to_text
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.synthetic import steps
from expertmesh.simulator.workload import Load

TRUE = slo_rates(ENGINE, 0.05, 500, 400)
ONE_GROUP = 1 / float(TRUE.seconds(500, 400))
"""Requests a second."""


def planned(wrong: float = 1.0, **changes: object) -> SimulatedOption:
    """`wrong`: the plan says that a group does so many times what it does."""
    rates = GroupRates(
        in_flight=float(TRUE.batch) * 1.25,
        prefill_tokens_per_s=float(TRUE.prefill_tokens_per_s) * wrong,
        decode_tokens_per_s=float(TRUE.decode_tokens_per_s) * wrong,
        lone_tpot_s=ENGINE.iteration_s(1, 700, 0),
    )
    told = option(**changes)
    return replace(told, option=replace(told.option, rates=rates))


def ready(outcome: Outcome, tick: int) -> int:
    return int(outcome.series.groups[tick].sum())


def steady(groups: float, ticks: int) -> Load:
    return load(*[groups * ONE_GROUP] * ticks)


@pytest.mark.parametrize("wrong", [0.5, 1.0, 2.0])
def test_a_steady_load_gets_its_groups_and_few_in_hand_even_when_the_plan_is_wrong(
    wrong: float,
) -> None:
    outcome = simulate_fluid(scenario(planned(wrong)), steady(3.6, 540), CorePolicy)
    late = [ready(outcome, tick) for tick in range(360, 540)]
    assert min(late) >= 4 and max(late) <= 6
    assert min(outcome.series.both_met[360:]) > 0.98


def test_a_rise_is_followed_and_a_fall_is_too_and_nothing_swings() -> None:
    work = load(*[ONE_GROUP * n for n in [1.5] * 180 + [4.5] * 180 + [0.8] * 240])
    outcome = simulate_fluid(scenario(planned()), work, CorePolicy)
    assert ready(outcome, 170) in (2, 3)
    assert ready(outcome, 350) in (5, 6, 7)
    assert ready(outcome, 599) in (1, 2)
    assert outcome.counts.starts <= 8, "one for each group of both rises, and some in hand"
    least = least_cost(problem(scenario(planned()), work))
    assert isinstance(least, Least) and outcome.usd < 1.6 * least.usd, (
        "of few groups one in hand is a large share"
    )


def test_the_same_seed_gives_the_same_run() -> None:
    chosen = scenario(planned(), min_groups=1)
    first, second = (
        to_text(simulate_fluid(chosen, steady(2.5, 200), CorePolicy)) for _ in range(2)
    )
    assert first == second


def test_request_by_request_no_stream_is_cut_by_a_planned_drain() -> None:
    rate = ONE_GROUP / 10
    small = planned()
    few = replace(
        small,
        service=replace(ENGINE, max_seqs=64),
        option=replace(
            small.option,
            rates=GroupRates(
                in_flight=64,
                prefill_tokens_per_s=float(TRUE.prefill_tokens_per_s) / 10,
                decode_tokens_per_s=float(TRUE.decode_tokens_per_s) / 10,
                lone_tpot_s=ENGINE.iteration_s(1, 700, 0),
            ),
        ),
    )
    requests = steps([(900, rate), (900, 4 * rate), (1800, rate / 2)], 3, 500, 400, 0.5)
    run = run_events(scenario(few), requests, CorePolicy)
    drained = run.outcome.counts
    assert drained.starts >= 2 and drained.deadlines == 0
    assert run.cut_by_drains == 0
    assert run.outcome.attainment.both > 0.9


def test_a_budget_is_never_exceeded() -> None:
    chosen = scenario(planned(), budget_usd_per_hour=80.0)
    outcome = simulate_fluid(chosen, steady(6.0, 300), CorePolicy)
    assert max(outcome.series.usd_per_hour) <= 80.0
    assert ready(outcome, 299) == 2


def spot(*zones: Availability) -> Scenario:
    cheap = [
        planned(pool=f"spot-{n}", usd=14.0, market=Market.SPOT, availability=zone)
        for n, zone in enumerate(zones)
    ]
    return scenario(planned(), *cheap, min_groups=1, initial_groups=(2, *[0] * len(zones)))


def test_cheap_spot_groups_are_spread_and_replaced_when_their_zone_is_taken() -> None:
    taken_s = 5400.0
    lasting = Availability((0.0,), (8,))
    taken = Availability((0.0, taken_s, taken_s + 600), (8, 0, 8))
    outcome = simulate_fluid(spot(taken, lasting, lasting), steady(3.5, 900), CorePolicy)
    by_option = outcome.series.groups.sum(axis=2)
    before, after = by_option[int(taken_s / 10) - 20], by_option[int(taken_s / 10) + 60]
    assert before[1:].sum() >= 3, "spot groups carry most of a steady load"
    assert max(before[1:]) <= before.sum() - 3, "one zone's loss leaves enough"
    assert after[1] == 0 and after.sum() >= 4, "what was lost is replaced elsewhere"
    assert outcome.attainment.both > 0.97
    safe = simulate_fluid(scenario(planned(), initial_groups=(4,)), steady(3.5, 900), CorePolicy)
    assert outcome.usd < 0.8 * safe.usd
