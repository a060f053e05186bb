from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.event_world import SERVICE, Scripted, at, option, scenario

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.events import EventRun, run_events, simulate_events
from expertmesh.simulator.outcome import to_text
from expertmesh.simulator.policy import Drain, Move, Recall, ScalingPolicy, Start, View
from expertmesh.simulator.scenario import Availability, Scenario
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.synthetic import poisson
from expertmesh.simulator.workload import Requests

ONE_AT_ONCE = replace(SERVICE, max_seqs=1)


def drain_first(view: View) -> tuple[Move, ...]:
    return (Drain(view.groups[0].name),)


def start(view: View) -> tuple[Move, ...]:
    return (Start(0),)


def test_a_request_to_an_idle_group_takes_the_time_of_its_engine() -> None:
    run = run_events(scenario(), at([1.0], prompt=1000, output=101, span_s=60.0), Scripted())
    times = run.times
    assert times.wait_s.tolist() == [0.0]
    assert times.ttft_s[0] == pytest.approx(0.02 + 1000e-5)
    assert times.tpot_s[0] == pytest.approx(0.02 + 1e-5 + 1e-8 * 1050.5)
    assert times.end_s[0] == pytest.approx(1.0 + times.ttft_s[0] + 100 * times.tpot_s[0])
    assert run.outcome.attainment.both == 1.0
    assert run.outcome.usd == 0.6
    assert run.outcome.output_tokens == 101


def test_what_finds_no_room_waits_in_the_gateway_and_the_wait_counts() -> None:
    tight = scenario(option(ONE_AT_ONCE))
    run = run_events(tight, at([0.0, 0.0, 0.0], output=40, span_s=60.0), Scripted())
    # One is in the batch, and one may wait in the engine so that the batch is filled at once.
    assert run.times.wait_s[:2].tolist() == [0.0, 0.0]
    assert run.times.wait_s[2] == pytest.approx(run.times.end_s[0])
    assert run.times.ttft_s[2] == pytest.approx(2 * 40 * 0.02, rel=0.1)
    assert run.outcome.attainment.ttft == pytest.approx(2 / 3)
    assert run.outcome.attainment.tpot == 1.0
    assert run.outcome.attainment.both == pytest.approx(2 / 3)


def test_who_waits_too_long_is_refused_and_has_missed_everything() -> None:
    run = run_events(scenario(initial=()), at([3.0, 14.5], span_s=40.0), Scripted())
    assert run.times.refused.tolist() == [True, True]
    assert np.isnan(run.times.ttft_s).all()
    assert run.outcome.refused == 2
    assert run.outcome.attainment.ttft == run.outcome.attainment.tpot == 0.0
    assert run.outcome.usd == 0.0


def test_a_start_serves_those_that_still_wait() -> None:
    policy = Scripted({0.0: start})
    run = run_events(scenario(initial=(), max_wait_s=30.0), at([1.0, 60.0], span_s=120.0), policy)
    ready_s = 60.0 + run.times.wait_s[1]
    assert run.times.refused.tolist() == [True, False]
    assert 60.0 < ready_s < 85.0
    assert run.outcome.usd == pytest.approx(120.0 * 0.01)


def test_longer_than_any_cache_is_refused() -> None:
    run = run_events(scenario(), at([1.0, 2.0], prompt=200_000, output=1, span_s=10.0), Scripted())
    assert run.times.refused.all()


def test_a_planned_drain_lets_streams_finish() -> None:
    long = at([1.0], output=5000, span_s=300.0)
    run = run_events(scenario(), long, Scripted({10.0: drain_first}))
    assert run.cut_by_drains == 0
    assert run.outcome.cut == 0
    end_s = run.times.end_s[0]
    assert end_s > 100.0
    assert run.outcome.usd == pytest.approx(end_s * 0.01, abs=0.011)


def test_a_draining_group_gets_nothing_new_and_a_recalled_one_does() -> None:
    requests = at([1.0, 25.0, 45.0], output=5000, span_s=60.0)
    policy = Scripted({20.0: drain_first, 40.0: lambda view: (Recall(view.groups[0].name),)})
    run = run_events(scenario(max_wait_s=30.0), requests, policy)
    assert run.times.wait_s == pytest.approx([0.0, 15.0, 0.0])


def test_a_drain_past_its_deadline_cuts_and_says_so() -> None:
    run = run_events(
        scenario(drain_deadline_s=30.0),
        at([1.0], output=5000, span_s=100.0),
        Scripted({10.0: drain_first}),
    )
    assert run.cut_by_drains == 1
    assert run.outcome.cut == 1
    assert run.times.end_s[0] == pytest.approx(40.0)
    assert run.times.output_tokens[0] == pytest.approx(39.0 / 0.0202, rel=0.03)
    assert run.outcome.attainment.both == 0.0


def spot(nodes: tuple[int, ...], at_s: tuple[float, ...]) -> Availability:
    return Availability(at_s, nodes, notice_s=30.0)


def test_a_lost_group_cuts_its_streams_and_gives_back_what_it_had_not_begun() -> None:
    taken = option(ONE_AT_ONCE, availability=spot((1, 0), (0.0, 50.0)), pool="spot")
    stays = option(pool="od")
    policy = Scripted()
    # Both go to the spot group: the first is decoded there, the second waits behind it.
    run = run_events(
        scenario(taken, stays, initial=(1, 0), max_wait_s=100.0),
        at([45.0, 46.0], output=5000, span_s=200.0),
        Scripted({0.0: lambda view: (Start(1),)}, views=policy.views),
    )
    assert run.cut_by_losses == 1
    assert run.requeued == 1
    assert run.times.cut.tolist() == [True, False]
    assert run.times.end_s[0] == pytest.approx(50.0)
    assert run.times.wait_s[1] > 4.0
    notices = {view.now_s: tuple(view.notices) for view in policy.views}
    assert notices[10.0] == ()
    assert notices[30.0] == (policy.views[0].groups[0].name,)
    assert notices[60.0] == ()


def test_policies_see_what_was_when_metrics_were_read() -> None:
    policy = Scripted()
    requests = at([2.0, 3.0, 7.0, 8.0, 9.0, 21.0], prompt=200, output=10, span_s=60.0)
    run_events(scenario(metric_delay_s=4.0), requests, policy)
    seen = {view.now_s: view for view in policy.views}
    assert list(seen) == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert seen[0.0].arrivals_per_s == 0.0
    # Read at 6 s, the first time.
    assert seen[10.0].arrivals_per_s == pytest.approx(2 / 6)
    assert seen[20.0].arrivals_per_s == pytest.approx(3 / 10)
    assert seen[20.0].arrived_prompt_tokens_per_s == pytest.approx(60.0)
    assert seen[20.0].finished_per_s == pytest.approx(3 / 10)
    assert seen[20.0].finished_prompt_tokens == 200.0
    assert seen[20.0].finished_output_tokens == 10.0
    group = seen[20.0].groups[0]
    assert group.prompt_tokens_per_s == pytest.approx(60.0)
    assert group.output_tokens_per_s == pytest.approx(3.0)
    assert group.ttft_s == pytest.approx(0.022)
    assert group.tpot_s == pytest.approx(0.02, rel=0.01)
    assert seen[50.0].groups[0].ttft_s is None


def test_policies_see_what_waits() -> None:
    policy = Scripted()
    requests = at([12.0, 13.0, 13.5], prompt=70, output=2000, span_s=30.0)
    run_events(scenario(option(ONE_AT_ONCE), metric_delay_s=5.0), requests, policy)
    view = policy.views[2]
    assert (view.queued, view.queued_prompt_tokens) == (1, 70)
    assert view.oldest_wait_s == pytest.approx(1.5)
    assert (view.groups[0].in_flight, view.groups[0].waiting) == (2, 1)
    assert view.groups[0].kv_usage == pytest.approx((70 + 3.0 / 0.02) / 200_000, rel=0.02)


@pytest.mark.parametrize("delay_s", [0.0, 10.0, 25.0])
def test_any_delay_is_kept(delay_s: float) -> None:
    policy = Scripted()
    requests = at([float(second) for second in range(100)], span_s=100.0)
    run_events(scenario(metric_delay_s=delay_s), requests, policy)
    first = next(view.now_s for view in policy.views if view.arrivals_per_s > 0)
    assert first == {0.0: 10.0, 10.0: 20.0, 25.0: 30.0}[delay_s]
    assert policy.views[-1].arrivals_per_s == pytest.approx(1.0)


@pytest.mark.parametrize("max_seqs", [256, 4096])
def test_a_full_group_does_what_its_rates_say(max_seqs: int) -> None:
    """The engine and the closed form of its rates are two ways to the same number."""
    service = ServiceTime(0.02, 1e-5, 1e-8, 2_000_000, max_seqs, 100_000)
    rates = slo_rates(service, 0.05, 500.0, 400.0)
    per_s = 1.0 / float(rates.seconds(500.0, 400.0))
    asked = poisson(1.5 * per_s, 400.0, prompt_tokens=500, output_tokens=400)
    run = run_events(
        scenario(option(service, float(rates.batch)), max_wait_s=30.0),
        asked,
        Scripted(),
    )
    ends = run.times.end_s[~run.times.refused]
    rate = np.sum((ends > 100.0) & (ends <= 400.0)) / 300.0
    assert rate == pytest.approx(per_s, rel=0.05)
    steady = run.times.tpot_s[(run.times.end_s > 100.0) & (run.times.end_s < 400.0)]
    assert np.mean(steady) == pytest.approx(float(rates.iteration_s), rel=0.05)


def test_a_flooding_client_does_not_keep_others_waiting() -> None:
    flood = Requests.of(
        np.concatenate((np.linspace(0.0, 5.0, 400), [5.0])),
        np.full(401, 100),
        np.full(401, 200),
        client=np.array([1] * 400 + [2]),
        span_s=30.0,
    )
    run = run_events(scenario(option(in_flight=8.0), max_wait_s=300.0), flood, Scripted())
    assert run.times.wait_s[400] < 5.0
    assert run.times.wait_s[399] > 50.0


@dataclass
class Restless:
    """Asks for anything."""

    seed: int
    name: str = "restless"

    def __call__(self, scenario: Scenario) -> ScalingPolicy:
        self.chance = Random(self.seed)
        return self

    def decide(self, view: View) -> tuple[Move, ...]:
        chance, names = self.chance, [group.name for group in view.groups] or ["none"]
        choices: list[Callable[[], Move]] = [
            lambda: Start(chance.randrange(3)),
            lambda: Drain(chance.choice(names)),
            lambda: Recall(chance.choice(names)),
        ]
        return tuple(chance.choice(choices)() for _ in range(chance.randrange(3)))


def wild(seed: int, rate: float, kv_tokens: int) -> EventRun:
    service = ServiceTime(0.02, 1e-5, 1e-8, kv_tokens, 64, 8192)
    zone = spot((2, 0, 1, 2, 0, 2), (0.0, 60.0, 100.0, 150.0, 210.0, 260.0))
    return run_events(
        scenario(
            option(service, failure_probability=0.3),
            option(service, pool="spot", availability=zone),
            initial=(1, 1),
            seed=seed,
            drain_deadline_s=40.0,
        ),
        poisson(rate, 300.0, seed, 400, 150, sigma=1.0),
        Restless(seed),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 3.0, 30.0]), st.sampled_from([8000, 200_000]))
def test_every_request_ends_once_whatever_happens(seed: int, rate: float, kv_tokens: int) -> None:
    run = wild(seed, rate, kv_tokens)
    times = run.times
    done = ~times.refused & ~times.cut
    assert not (times.refused & times.cut).any()
    assert not np.isnan(times.end_s[done]).any()
    assert not np.isnan(times.ttft_s[done]).any()
    assert np.isnan(times.end_s[times.refused]).all()
    assert run.cut_by_drains + run.cut_by_losses == times.cut.sum()
    assert (times.output_tokens[done] >= 1).all()
    assert (times.ttft_s[done] >= 0.02 - 1e-9).all()
    assert (times.wait_s[done] <= 10.0 + 1.0).all()
    outcome = run.outcome
    assert outcome.requests == len(times.end_s)
    assert outcome.refused == times.refused.sum()
    assert 0.0 <= outcome.attainment.both <= min(outcome.attainment.ttft, outcome.attainment.tpot)


def test_the_same_seed_gives_the_same_run_to_the_last_byte() -> None:
    one, other = wild(7, 5.0, 8000), wild(7, 5.0, 8000)
    assert to_text(one.outcome, series=True) == to_text(other.outcome, series=True)
    assert one.times.end_s.tobytes() == other.times.end_s.tobytes()
    assert one.preemptions == other.preemptions > 0
    assert wild(8, 5.0, 8000).times.end_s.tobytes() != one.times.end_s.tobytes()


def test_progress_ends_at_one_and_nothing_is_served_by_nobody() -> None:
    told: list[float] = []
    outcome = simulate_events(
        scenario(initial=()), poisson(0.0, 50.0), Scripted(), progress=told.append
    )
    assert told[-1] == 1.0
    assert told == sorted(told)
    assert outcome.requests == 0
    assert outcome.duration_s == 50.0


def test_states_are_those_of_now() -> None:
    policy = Scripted({0.0: start, 10.0: drain_first})
    run_events(scenario(metric_delay_s=25.0), at([1.0], span_s=30.0), policy)
    states = [[group.state for group in view.groups] for view in policy.views]
    assert states[1] == [GroupState.READY, GroupState.STARTING]
    assert states[2] == [GroupState.STARTING]
