"""The HPA's rules and KEDA's, with the numbers of their documentation."""

import pytest
from tests.simulator.baselines.views import drained, groups, scenario, started, view

from expertmesh.simulator.baselines.hpa import HorizontalPodAutoscaler
from expertmesh.simulator.baselines.keda import Keda


@pytest.mark.parametrize(
    ("total", "expected"),
    [(400.0, 4), (100.0, 1), (219.0, 2), (181.0, 2), (221.0, 3)],
)
def test_replicas_follow_the_ratio_outside_the_tolerance(total: float, expected: int) -> None:
    """200m for 100m doubles them, 50m halves them, and 10 % more or less is nothing."""
    assert HorizontalPodAutoscaler().recommend(2, total, 100.0) == expected


def test_up_by_four_or_double_in_fifteen_seconds() -> None:
    hpa = HorizontalPodAutoscaler()
    assert hpa.replicas(0.0, 1, 100) == 5
    assert hpa.replicas(5.0, 5, 100) == 5
    assert hpa.replicas(20.0, 5, 100) == 10
    assert hpa.replicas(40.0, 10, 12) == 12


def test_down_to_the_highest_recommendation_of_five_minutes() -> None:
    hpa = HorizontalPodAutoscaler()
    assert hpa.replicas(0.0, 10, 10) == 10
    assert hpa.replicas(60.0, 10, 6) == 10
    assert hpa.replicas(299.0, 10, 2) == 10
    assert hpa.replicas(301.0, 10, 2) == 6
    assert hpa.replicas(362.0, 6, 2) == 2


def test_six_running_requests_at_two_each_are_three_replicas() -> None:
    """KServe's example."""
    policy = Keda(scenario(), threshold=2.0, count_running=True)
    assert started(policy.decide(view(groups=groups(1, in_flight=6)))) == [0, 0]


def test_running_requests_do_not_count_where_only_waiting_ones_do() -> None:
    policy = Keda(scenario())
    busy = view(groups=groups(2, in_flight=50, waiting=0))
    assert policy.decide(busy) == ()
    waiting = view(30.0, groups=groups(2, in_flight=50, waiting=10))
    assert started(policy.decide(waiting)) == [0, 0]


def test_from_zero_at_the_next_poll() -> None:
    policy = Keda(scenario())
    assert policy.decide(view(0.0)) == ()
    assert policy.decide(view(10.0, queued=3)) == ()
    assert started(policy.decide(view(30.0, queued=3))) == [0]


def test_the_last_replica_goes_after_the_cooldown_without_requests() -> None:
    policy = Keda(scenario())
    last = groups(1)
    policy.decide(view(0.0, groups=groups(1, in_flight=1, waiting=1)))
    assert policy.decide(view(270.0, groups=last)) == ()
    assert drained(policy.decide(view(300.0, groups=last))) == ["g1"]


def test_the_last_replica_stays_while_it_works_or_where_one_is_wanted() -> None:
    busy = Keda(scenario())
    always = Keda(scenario(min_groups=1))
    for now_s in (0.0, 300.0, 600.0, 900.0):
        assert busy.decide(view(now_s, groups=groups(1, in_flight=1))) == ()
        assert always.decide(view(now_s, groups=groups(1))) == ()
