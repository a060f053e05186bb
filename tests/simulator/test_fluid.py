import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.small import ENGINE, Script, load, option, scenario

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.outcome import Outcome, to_text
from expertmesh.simulator.policy import Drain, Move, Recall, Start, View
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption, StartTime
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.workload import Load


def run(
    scenario: Scenario, work: Load, moves: dict[float, tuple[Move, ...]] | None = None
) -> tuple[Outcome, list[View]]:
    scripts: list[Script] = []

    def make(scenario: Scenario) -> Script:
        scripts.append(Script(scenario, moves or {}))
        return scripts[0]

    outcome = simulate_fluid(scenario, work, make)
    return outcome, scripts[0].views


def capacity(prompt: float = 500, output: float = 400, tpot_s: float = 0.05) -> float:
    """Requests a second of one full group."""
    return 1 / float(slo_rates(ENGINE, tpot_s, prompt, output).seconds(prompt, output))


def limited_to_target(prompt: float, output: float) -> SimulatedOption:
    """The gateway lets in as many requests as meet the target."""
    batch = float(slo_rates(ENGINE, 0.05, prompt, output).batch)
    told = option().option
    return option(option=replace(told, rates=replace(told.rates, in_flight=batch)))


# Steady


def test_no_more_than_was_told_are_in_a_group_at_once() -> None:
    told = option().option
    few = option(option=replace(told, rates=replace(told.rates, in_flight=40)))
    outcome, _ = run(scenario(few, max_wait_s=1e9), load(*[50.0] * 60))
    assert outcome.series.in_flight.max() == pytest.approx(40)
    assert outcome.series.queued[-1] > 1000
    assert outcome.attainment.tpot > 0.999


def test_more_at_once_than_the_target_allows_miss_it() -> None:
    slow = option(service=replace(ENGINE, gamma_s=1e-7))
    batch = float(slo_rates(slow.service, 0.05, 500, 400).batch)
    assert batch < 512
    outcome, _ = run(scenario(slow, max_wait_s=1e9), load(*[60.0] * 60))
    assert outcome.series.in_flight.max() > 2 * batch
    assert outcome.attainment.tpot < 0.3


def test_a_burst_does_not_fill_a_group_beyond_its_limit() -> None:
    told = option().option
    few = option(option=replace(told, rates=replace(told.rates, in_flight=100)))
    burst = load(*[0.0] * 5, 500.0, *[0.0] * 20, prompt=2000.0, output=150.0)
    outcome, _ = run(scenario(few, max_wait_s=1e9), burst)
    assert 99 < outcome.series.in_flight.max() <= 100.001


def test_the_cache_limits_how_many_are_in_a_group() -> None:
    tight = option(service=replace(ENGINE, kv_tokens=90_000))
    outcome, _ = run(scenario(tight, max_wait_s=1e9), load(*[50.0] * 60))
    assert outcome.series.in_flight.max() == pytest.approx(0.9 * 90_000 / 900)


def test_long_answers_fill_groups_with_context() -> None:
    even, wide = (
        run(scenario(output_cv2=cv2), load(*[45.0] * 60))[0].series.in_flight[-1]
        for cv2 in (1.0, 4.0)
    )
    assert wide > 1.2 * even


def test_a_group_with_spare_time_is_as_fast_as_its_batch_allows() -> None:
    outcome, views = run(scenario(), load(*[40.0] * 100))
    batch = views[-1].groups[0].in_flight
    iteration_s = outcome.series.in_flight[-1] / (40 * 400)
    assert batch == pytest.approx(40 * 400 * iteration_s)
    assert ENGINE.iteration_s(batch, batch * 900, batch * 1.25) == pytest.approx(iteration_s)
    (group,) = views[-1].groups
    assert outcome.attainment.both > 0.9999
    assert group.tpot_s == pytest.approx(iteration_s)
    assert group.kv_usage == pytest.approx(batch * 900 / 2e6)
    assert group.output_tokens_per_s == pytest.approx(40 * 400)
    assert group.prompt_tokens_per_s == pytest.approx(40 * 500)
    assert (views[-1].arrivals_per_s, views[-1].finished_per_s) == pytest.approx((40, 40))
    assert views[-1].finished_output_tokens == pytest.approx(400)
    assert views[-1].finished_prompt_tokens == pytest.approx(500)
    assert outcome.series.queued.max() == 0


@pytest.mark.parametrize("tick_s", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("output", [13.0, 400.0, 3000.0])
def test_an_overloaded_group_does_what_it_can_whatever_the_tick(
    tick_s: float, output: float
) -> None:
    most = capacity(500, output)
    work = load(*[2 * most] * 240, output=output)
    patient = scenario(limited_to_target(500, output), tick_s=tick_s, max_wait_s=1e9)
    outcome, _ = run(patient, work)
    assert outcome.output_tokens / outcome.duration_s / output == pytest.approx(most, rel=0.05)
    half = outcome.series.queued[len(outcome.series.queued) // 2 :]
    growth = (half[-1] - half[0]) / (tick_s * (len(half) - 1))
    assert growth == pytest.approx(most, rel=0.01)
    # At 13 tokens the target limits the batch, so that a full group is at it, and half are above.
    assert outcome.attainment.tpot == pytest.approx(0.5 if output < 20 else 1, abs=0.01)


def test_nothing_is_lost_on_the_way() -> None:
    draw = np.random.default_rng(1)
    bursts = load(*draw.gamma(0.5, 2 * capacity(), 300))
    outcome, views = run(scenario(max_wait_s=60), bursts)
    end = outcome.series.queued[-1] + outcome.series.in_flight[-1]
    finished = sum(view.finished_per_s for view in views[1:]) * 10
    # The views end a tick and the delay of the metrics before the run does.
    assert finished + end + outcome.refused == pytest.approx(outcome.requests, rel=0.01)
    assert outcome.refused > 0
    left = outcome.series.in_flight[-1] * 400
    served = outcome.requests - outcome.refused - outcome.series.queued[-1]
    assert outcome.output_tokens + left == pytest.approx(served * 400, rel=1e-6)


# Waiting


def test_who_waits_too_long_is_refused_and_meets_no_target() -> None:
    most = capacity()
    outcome, _ = run(scenario(max_wait_s=20), load(*[3 * most] * 360))
    # Two thirds are too many; those that come in wait for nearly 20 s.
    assert outcome.refused / outcome.requests == pytest.approx(2 / 3, rel=0.03)
    assert outcome.series.queued.max() <= 3 * most * 30
    assert outcome.attainment.ttft < 0.02
    assert outcome.attainment.tpot == pytest.approx(1 / 3, rel=0.05)


def test_without_a_group_everything_waits_and_is_refused() -> None:
    outcome, views = run(scenario(initial_groups=()), load(*[1.0] * 60))
    assert outcome.refused == pytest.approx(600 - 30, abs=1)
    assert outcome.attainment.both == 0
    assert outcome.output_tokens == 0
    assert outcome.usd_per_mtok_out == math.inf
    assert views[30].oldest_wait_s == pytest.approx(30)
    assert views[30].queued == pytest.approx(30)
    assert views[30].queued_prompt_tokens == pytest.approx(30 * 500)


def test_waits_are_followed_to_the_second() -> None:
    """A queue of known length in front of a full group, against the formula."""
    most = capacity(500, 40)
    # One tick brings 30 s of work; afterwards the group is just full.
    per_second = [0.99 * most] * 60 + [0.99 * most + 3 * most] + [0.5 * most] * 60
    patient = scenario(limited_to_target(500, 40), max_wait_s=1e9, slo=Slo(12.0, 0.05))
    outcome, _ = run(patient, load(*per_second, output=40.0))
    # The tick's own wait grows evenly from 0; then the queue shrinks by half of the rate.
    queue = outcome.series.queued[60]
    longest_s = queue / most
    assert 27 < longest_s < 31
    waiting_after = (longest_s - 12) * 2 * 0.5 * most
    in_tick = (longest_s - 12) / longest_s * 3.99 * most * 10
    missed = outcome.requests * (1 - outcome.attainment.ttft)
    assert missed == pytest.approx(waiting_after + in_tick, rel=0.03)


# Groups that come and go


def test_a_start_serves_once_it_is_ready() -> None:
    most = capacity()
    outcome, views = run(scenario(max_wait_s=1e9), load(*[1.8 * most] * 120), {100.0: (Start(0),)})
    ready = outcome.series.groups[:, 0, 1]
    assert ready[:20].tolist() == [1] * 20
    assert ready[20:].tolist() == [2] * 100
    assert outcome.series.queued[19] == pytest.approx(outcome.series.queued[:30].max(), rel=0.1)
    assert outcome.series.queued[-1] == 0
    one, two = views[-1].groups
    assert one.in_flight == pytest.approx(two.in_flight, rel=1e-3)
    assert outcome.counts.wasted_starts == 0
    assert outcome.usd == pytest.approx(36 * (1200 + 1100) / 3600)


def test_a_drain_lasts_as_long_as_what_is_in_the_group() -> None:
    most = capacity()
    two = scenario(initial_groups=(2,))
    outcome, views = run(two, load(*[most] * 100), {500.0: (Drain("em-s-od-1"),)})
    draining = outcome.series.groups[:, 0, 2].sum() * 10
    held = views[50].groups[0].in_flight
    # It runs faster and faster: between the time of an empty group and that of a full one.
    empty_s, full_s = 400 * 0.01, 400 * 0.05
    assert empty_s * math.log(held / 0.5) - 10 <= draining <= full_s * math.log(held / 0.5) + 10
    assert outcome.cut == 0
    assert [group.name for group in views[-1].groups] == ["em-s-od-2"]
    assert all(v.groups[0].in_flight > 0 for v in views[52:54])


def test_a_recalled_group_serves_again() -> None:
    most = capacity()
    outcome, views = run(
        scenario(initial_groups=(2,)),
        load(*[1.5 * most] * 60),
        {100.0: (Drain("em-s-od-1"),), 120.0: (Recall("em-s-od-1"),)},
    )
    assert outcome.series.groups[-1, 0].tolist() == [0, 2, 0]
    one, two = views[-1].groups
    assert one.in_flight == pytest.approx(two.in_flight, rel=0.01)


def test_a_drain_past_its_deadline_cuts_what_is_left() -> None:
    most = capacity(500, 3000)
    hasty = scenario(initial_groups=(2,), drain_deadline_s=30)
    outcome, views = run(hasty, load(*[most] * 100, output=3000.0), {500.0: (Drain("em-s-od-1"),)})
    assert outcome.counts.deadlines == 1
    held = views[50].groups[0].in_flight
    assert 0.3 * held < outcome.cut < held
    assert outcome.attainment.tpot == pytest.approx(1 - outcome.cut / outcome.requests, abs=1e-4)


def test_a_lost_zone_cuts_what_its_groups_served() -> None:
    zone = Availability((0.0, 500.0), (1, 0), notice_s=60)
    spot = option("spot", 12.0, market=Market.SPOT, availability=zone)
    most = capacity()
    outcome, views = run(scenario(option(), spot, initial_groups=(1, 1)), load(*[most] * 100))
    assert [tuple(view.notices) for view in views[43:51]] == [(), *[("em-s-spot-2",)] * 6, ()]
    assert outcome.cut == pytest.approx(views[49].groups[-1].in_flight, rel=0.01)
    assert outcome.counts.lost == 1
    assert [group.state for group in views[50].groups] == [GroupState.READY, GroupState.LOST]
    assert outcome.attainment.both <= 1 - outcome.cut / outcome.requests + 1e-9


def test_a_failed_start_serves_nothing() -> None:
    broken = option(start=StartTime(100, 0.0, 1.0))
    outcome, _ = run(scenario(broken), load(*[10.0] * 60), {0.0: (Start(0),)})
    assert outcome.series.groups[:, 0, 1].max() == 1
    assert outcome.counts.failed_starts == 1


def test_a_faster_option_takes_more() -> None:
    quick = option("quick", service=replace(ENGINE, beta_s=5e-6, gamma_s=5e-9, alpha_s=0.005))
    _, views = run(scenario(option(), quick, initial_groups=(1, 1)), load(*[90.0] * 100))
    one, two = views[-1].groups
    assert two.output_tokens_per_s > one.output_tokens_per_s
    assert two.tpot_s is not None and one.tpot_s is not None
    assert two.tpot_s < one.tpot_s


# What is seen


def test_figures_are_as_old_as_the_metrics_and_states_are_not() -> None:
    steps = load(*[10.0] * 10, *[30.0] * 20)
    seen = {}
    for delay_s in (0.0, 5.0, 10.0, 25.0):
        _, views = run(scenario(metric_delay_s=delay_s), steps, {100.0: (Start(0),)})
        seen[delay_s] = [view.arrivals_per_s for view in views[10:15]]
        assert [len(view.groups) for view in views[9:12]] == [1, 1, 2]
    assert seen[0.0] == pytest.approx([10, 30, 30, 30, 30])
    assert seen[5.0] == pytest.approx([10, 20, 30, 30, 30])
    assert seen[10.0] == pytest.approx([10, 10, 30, 30, 30])
    assert seen[25.0] == pytest.approx([10, 10, 10, 20, 30])


def test_figures_of_groups_are_as_old_too() -> None:
    rising = load(*range(10, 70))
    seen = [
        [view.groups[0].in_flight for view in run(scenario(metric_delay_s=delay_s), rising)[1]]
        for delay_s in (0.0, 4.0, 10.0)
    ]
    now, late, later = (np.array(values[20:]) for values in seen)
    assert later[1:] == pytest.approx(now[:-1])
    assert late == pytest.approx(0.6 * now + 0.4 * later)


def test_a_long_silence_leaves_the_sizes_as_they_were() -> None:
    quiet = load(*[10.0] * 10, *[0.0] * 900, *[10.0] * 10, bin_s=60.0)
    outcome, views = run(scenario(tick_s=60.0), quiet)
    assert outcome.attainment.both > 0.99
    assert views[-1].finished_output_tokens == pytest.approx(400)


def test_before_anything_is_measured_a_policy_sees_nothing() -> None:
    _, views = run(scenario(metric_delay_s=15.0), load(*[10.0] * 5))
    assert [view.groups[0].in_flight > 0 for view in views] == [False, False, False, True, True]
    assert views[0].groups[0].tpot_s is None


def test_the_same_run_gives_the_same_bytes() -> None:
    flaky = option(start=StartTime(60, 0.5, 0.2), nodes=2)
    work = load(*np.random.default_rng(1).gamma(1, 60, 100))
    moves = {float(at): (Start(0),) for at in range(0, 600, 100)}
    first, second = (to_text(run(scenario(flaky), work, moves)[0], series=True) for _ in range(2))
    assert first == second
    assert first != to_text(run(scenario(flaky, seed=2), work, moves)[0], series=True)


def test_bins_need_not_be_ticks() -> None:
    coarse = load(*[20.0, 60.0] * 5, bin_s=600.0)
    fine = load(*[20.0] * 600, *[60.0] * 600, bin_s=1.0)
    one, _ = run(scenario(), coarse)
    two, _ = run(scenario(), fine)
    assert one.series.in_flight[:120] == pytest.approx(two.series.in_flight[:120], rel=1e-2)
    odd, _ = run(scenario(tick_s=7.0), fine)
    assert odd.requests == pytest.approx(two.requests)
    assert odd.duration_s == 172 * 7


def test_progress_is_told() -> None:
    told: list[float] = []
    simulate_fluid(scenario(), load(*[1.0] * 600), Script, progress=told.append)
    assert told == sorted(told) and told[0] == 0 and told[-1] < 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 300), min_size=5, max_size=80),
    st.floats(5, 3000),
    st.floats(0, 5000),
    st.sampled_from([2.0, 10.0, 30.0]),
    st.integers(0, 5),
)
def test_shares_and_amounts_make_sense_for_any_load(
    per_second: list[float], output: float, prompt: float, tick_s: float, groups: int
) -> None:
    work = load(*per_second, output=output, prompt=prompt)
    settings = scenario(tick_s=tick_s, initial_groups=(groups,))
    outcome, views = run(settings, work, {tick_s * 3: (Start(0), Drain("em-s-od-1"))})
    assert outcome.requests == pytest.approx(sum(per_second) * 10, abs=1e-6)
    for attained in (outcome.attainment, outcome.worst_10min):
        assert 0 <= attained.both <= min(attained.ttft, attained.tpot) + 1e-9
        assert max(attained.ttft, attained.tpot) <= 1 + 1e-9
    assert (outcome.series.in_flight >= -1e-6).all()
    assert (outcome.series.queued >= 0).all()
    assert -1e-6 <= outcome.refused <= outcome.requests + 1e-6
    assert outcome.output_tokens <= outcome.requests * output * (1 + 1e-9) + 1e-6
    assert all(g.in_flight <= 1024.1 for v in views for g in v.groups)
    assert all(g.kv_usage <= 1 for v in views for g in v.groups)
