"""SkyServe's rate, delays, fallback and zones."""

from tests.simulator.baselines.views import drained, group, groups, option, scenario, started, view

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.baselines.skyserve import SkyServe

ON_DEMAND, ZONE_A, ZONE_B, ZONE_C = range(4)
ROOM = (9, 9, 9, 9)


def with_spot() -> SkyServe:
    options = (
        option("od", usd_per_hour=10.0),
        option("a", usd_per_hour=3.0, market=Market.SPOT),
        option("b", usd_per_hour=4.0, market=Market.SPOT),
        option("c", usd_per_hour=5.0, market=Market.SPOT),
    )
    return SkyServe(scenario(*options, min_groups=3), 2.5, base_on_demand=1)


def test_seven_requests_a_second_at_two_and_a_half_each_are_three_replicas() -> None:
    policy = SkyServe(scenario(), 2.5)
    assert len(started(policy.decide(view(0.0, arrivals_per_s=7.0)))) == 3


def test_up_after_five_minutes_of_a_higher_rate() -> None:
    policy = SkyServe(scenario(min_groups=1), 2.5)
    counts = [
        len(started(policy.decide(view(now_s, groups=groups(1), arrivals_per_s=7.0))))
        for now_s in range(0, 301, 20)
    ]
    assert counts == [0] * 14 + [2, 2]


def test_down_after_twenty_minutes_of_a_lower_rate() -> None:
    policy = SkyServe(scenario(), 2.5, downscale_delay_s=1200.0)
    policy.decide(view(0.0, groups=groups(3), arrivals_per_s=7.0))
    gone = [
        len(drained(policy.decide(view(now_s, groups=groups(3), arrivals_per_s=0.1))))
        for now_s in range(80, 80 + 1200, 20)
    ]
    assert gone[-1] == 2
    assert sum(gone[:-1]) == 0


def test_a_rate_in_between_begins_the_wait_anew() -> None:
    policy = SkyServe(scenario(min_groups=1), 2.5, rate_window_s=0.0)
    for now_s in range(0, 260, 20):
        policy.decide(view(now_s, groups=groups(1), arrivals_per_s=7.0))
    policy.decide(view(260.0, groups=groups(1), arrivals_per_s=2.0))
    assert policy.decide(view(280.0, groups=groups(1), arrivals_per_s=7.0)) == ()


def test_one_on_demand_and_the_rest_spot_with_on_demand_until_they_are_ready() -> None:
    """The documentation's example of a base, and the dynamic fallback."""
    moves = with_spot().decide(view(room=ROOM))
    assert sorted(started(moves)) == [ON_DEMAND, ON_DEMAND, ON_DEMAND, ZONE_A, ZONE_B]


def test_the_stand_ins_leave_when_spot_is_ready() -> None:
    policy = with_spot()
    policy.decide(view(room=ROOM))
    there = [group(n, ON_DEMAND) for n in (1, 2, 3)] + [group(4, ZONE_A), group(5, ZONE_B)]
    assert drained(policy.decide(view(20.0, groups=there, room=ROOM))) == ["g3", "g2"]


def test_a_service_that_runs_keeps_its_replicas_at_first() -> None:
    policy = SkyServe(scenario(min_groups=1), 2.5)
    assert policy.decide(view(0.0, groups=groups(4), arrivals_per_s=9.0)) == ()


def test_a_zone_that_lost_a_group_is_left_out() -> None:
    policy = with_spot()
    lost = group(4, ZONE_A, state=GroupState.LOST)
    there = [group(1, ON_DEMAND), lost, group(5, ZONE_B)]
    moves = policy.decide(view(groups=there, room=ROOM))
    assert started(moves) == [ZONE_C, ON_DEMAND]


def test_zones_are_open_again_when_fewer_than_two_are_left() -> None:
    policy = with_spot()
    there = [
        group(1, ON_DEMAND),
        group(4, ZONE_A, state=GroupState.LOST),
        group(5, ZONE_B, state=GroupState.LOST),
    ]
    moves = policy.decide(view(groups=there, room=ROOM))
    assert started(moves) == [ZONE_A, ZONE_B, ON_DEMAND, ON_DEMAND]


def test_without_room_in_any_zone_on_demand_stands_in() -> None:
    moves = with_spot().decide(view(room=(9, 0, 0, 0)))
    assert started(moves) == [ON_DEMAND] * 3
