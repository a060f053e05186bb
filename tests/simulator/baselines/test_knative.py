"""Knative's stable and panic windows."""

from tests.simulator.baselines.views import drained, group, groups, scenario, started, view

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.baselines.knative import Knative


def test_a_hundred_requests_at_ten_each_and_seventy_percent_are_fifteen_replicas() -> None:
    """The documentation's example."""
    policy = Knative(scenario(), concurrency=10.0)
    assert len(started(policy.decide(view(groups=groups(5, in_flight=20))))) == 10


def test_the_stable_window_is_the_mean_of_a_minute() -> None:
    policy = Knative(scenario(), concurrency=10.0, utilization=1.0)
    ten = groups(10, in_flight=10)
    for now_s in range(0, 60, 10):
        assert policy.decide(view(now_s, groups=ten)) == ()
    # 160 for one of six samples is 110 in the mean, and no panic.
    assert len(started(policy.decide(view(60.0, groups=groups(10, in_flight=16))))) == 1


def test_twice_the_ready_replicas_is_a_panic_and_nothing_goes_in_it() -> None:
    policy = Knative(scenario(), concurrency=10.0, utilization=1.0)
    for now_s in range(0, 60, 10):
        policy.decide(view(now_s, groups=groups(2, in_flight=10)))
    assert len(started(policy.decide(view(60.0, groups=groups(2, in_flight=20))))) == 2
    four = groups(4, in_flight=1)
    for now_s in range(70, 121, 10):
        assert policy.decide(view(now_s, groups=four)) == ()
    assert len(drained(policy.decide(view(130.0, groups=four)))) == 2


def test_at_most_half_of_the_replicas_go_at_once() -> None:
    policy = Knative(scenario(), concurrency=10.0)
    assert len(drained(policy.decide(view(groups=groups(9, in_flight=0.1))))) == 5


def test_starting_replicas_are_wanted_but_not_ready() -> None:
    policy = Knative(scenario(), concurrency=10.0, utilization=1.0)
    there = [group(1, in_flight=20), group(2, state=GroupState.STARTING)]
    assert policy.decide(view(groups=there)) == ()


def test_the_last_replica_goes_after_a_minute_without_requests() -> None:
    policy = Knative(scenario(), concurrency=10.0)
    policy.decide(view(0.0, groups=groups(1, in_flight=1)))
    for now_s in range(10, 60, 10):
        assert policy.decide(view(now_s, groups=groups(1))) == ()
    assert drained(policy.decide(view(60.0, groups=groups(1)))) == ["g1"]
    assert started(policy.decide(view(70.0, queued=1))) == [0]


def test_a_delay_keeps_the_highest_wish() -> None:
    policy = Knative(scenario(), concurrency=10.0, scale_down_delay_s=300.0)
    policy.decide(view(0.0, groups=groups(4, in_flight=7)))
    for now_s in range(10, 300, 10):
        assert policy.decide(view(now_s, groups=groups(4, in_flight=0.5))) == ()
    assert drained(policy.decide(view(310.0, groups=groups(4, in_flight=0.5)))) != []
