"""Which option a policy with one kind of replica uses, and who starts and leaves."""

import pytest
from tests.simulator.baselines.views import drained, group, option, scenario, started, view

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import (
    moves_to,
    running_requests,
    usual_option,
    waiting_requests,
)
from expertmesh.simulator.baselines.static import Static


def test_the_usual_option_is_on_demand_and_cheapest_for_its_output() -> None:
    small = option("small", usd_per_hour=10.0, decode_tokens_per_s=1000.0)
    large = option("large", usd_per_hour=30.0, decode_tokens_per_s=4000.0)
    spot = option("spot", usd_per_hour=1.0, market=Market.SPOT, decode_tokens_per_s=4000.0)
    assert usual_option(scenario(small, large, spot)) == 1
    assert usual_option(scenario(spot)) == 0


def test_no_more_is_started_than_there_is_room_for() -> None:
    assert started(moves_to(view(room=[2]), 0, 5)) == [0, 0]


def test_starting_groups_leave_first_and_then_the_youngest() -> None:
    there = [group(1), group(2), group(3, state=GroupState.STARTING), group(4)]
    assert drained(moves_to(view(groups=there), 0, 2)) == ["g3", "g4"]


@pytest.mark.parametrize("state", [GroupState.DRAINING, GroupState.LOST, GroupState.GONE])
def test_groups_that_leave_do_not_count(state: GroupState) -> None:
    moves = moves_to(view(groups=[group(1, state=state), group(2)]), 0, 2)
    assert (started(moves), drained(moves)) == ([0], [])


def test_groups_of_other_options_are_left_alone() -> None:
    assert moves_to(view(groups=[group(1, option=1)], room=(9, 9)), 0, 0) == ()


def test_requests_before_the_engines_count_as_waiting() -> None:
    seen = view(groups=[group(1, in_flight=10, waiting=3)], queued=4)
    assert (waiting_requests(seen), running_requests(seen)) == (7, 7)


def test_recent_forgets_what_is_older_than_its_span_but_not_the_last_value() -> None:
    recent = Recent(30.0)
    for now_s, value in ((0.0, 9.0), (10.0, 1.0), (20.0, 2.0), (30.0, 3.0)):
        recent.add(now_s, value)
    assert (recent.mean(), recent.largest()) == (2.0, 3.0)
    short = Recent(0.0)
    short.add(0.0, 5.0)
    short.add(1.0, 6.0)
    assert short.mean() == 6.0


def test_static_keeps_its_number() -> None:
    policy = Static(scenario(), groups=3)
    assert started(policy.decide(view())) == [0, 0, 0]
    assert policy.decide(view(groups=[group(1), group(2), group(3)])) == ()
    lost = [group(1), group(2), group(3, state=GroupState.LOST)]
    assert started(policy.decide(view(groups=lost))) == [0]
