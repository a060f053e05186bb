from dataclasses import replace
from itertools import pairwise

import pytest
from tests.core.scaling.world import World, config, pool

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.core.scaling.contract import (
    ActionKind,
    Binding,
    Decision,
    Observation,
    PoolSeen,
    Timing,
)
from expertmesh.core.scaling.demand import GatewaySeen
from expertmesh.core.scaling.policy import decide

STARTING, READY, DRAINING, LOST, GONE = GroupState


def kinds(decision: Decision) -> list[tuple[str, str]]:
    return [(action.kind.value, action.group) for action in decision.actions]


def warm_world(groups: int, **changes: object) -> World:
    """`groups` ready groups, `cheap` before `dear`, and the work that keeps them."""
    pools = (pool("cheap", 0.3), pool("dear", 0.45))
    world = World(config(*pools, min_groups=groups, **changes), start_s=5)
    world.steps(7)
    world.step(queued=8 * groups)
    assert len(world.serving) == groups
    world.config = config(*pools, **changes)
    return world


# Scaling up


def test_the_minimum_is_started_at_once_in_the_cheapest_pools() -> None:
    decision = World(config(min_groups=2)).step()
    assert kinds(decision) == [("start", "em-tiny-cheap-1"), ("start", "em-tiny-dear-2")]
    spec = decision.actions[0].spec
    assert spec is not None
    assert (spec.model, spec.model_source, spec.pool) == ("tiny", "/models/tiny", "cheap")
    assert (spec.usd_per_hour, spec.max_model_len) == (0.6, 1024)
    assert "need 0 groups, 2 with min 2; 2 wanted, 0 ready and 2 on the way (" in decision.reason


def test_one_request_wakes_a_model_from_zero_at_once() -> None:
    world = World(config(up_delay_s=30))
    assert kinds(world.step()) == []
    decision = world.step(queued=1)
    assert kinds(decision) == [("start", "em-tiny-cheap-1")]
    assert "waking from zero at once" in decision.reason


def test_a_burst_on_a_sleeping_model_starts_one_group_at_once_and_the_rest_after_the_delay() -> (
    None
):
    world = World(config())
    assert len(kinds(world.step(queued=16))) == 1
    later = [kinds(decision) for decision in world.steps(4, queued=16)]
    assert later == [[], [], [("start", "em-tiny-dear-2")], []]


def test_a_higher_need_must_hold_and_the_reason_says_so() -> None:
    world = warm_world(1)
    waiting = world.step(queued=9)
    assert kinds(waiting) == []
    assert "9 queued and 0 running requests at 8 per group need 2 groups" in waiting.reason
    assert "a need of 2 must hold 3.0 s more" in waiting.reason
    assert waiting.wake_at_s == world.now_s - 1 + 3
    world.steps(2, queued=9)
    decision = world.step(queued=9)
    assert kinds(decision) == [("start", "em-tiny-dear-2")]
    assert "the higher need has held for 3.0 s" in decision.reason


def test_a_need_that_lasts_a_moment_starts_nothing() -> None:
    world = warm_world(1)
    for _ in range(10):
        assert [kinds(d) for d in (world.step(9), world.step(9), world.step(3))] == [[], [], []]


def test_of_a_varying_higher_need_the_smallest_is_followed() -> None:
    world = World(config(pool("only", nodes=20), max_groups=8, min_groups=1), start_s=5)
    world.steps(8)
    for queued in (40, 20, 40):
        assert kinds(world.step(queued)) == []
    assert len(kinds(world.step(40))) == 2
    assert world.state.wanted == 3


def test_delays_are_times_and_not_turns_of_a_loop() -> None:
    world = warm_world(1)
    world.step(queued=9, dt_s=3.0)
    assert kinds(world.step(queued=9)) == [("start", "em-tiny-dear-2")]


def test_never_more_than_max() -> None:
    world = World(config(pool("only", nodes=20), max_groups=2))
    decision = world.step(queued=500)
    world.steps(10, queued=500)
    assert len(world.state.groups) == 2
    assert "need 63 groups, 2 with max 2" in decision.reason


# Room, prices, budget


def test_without_room_the_decision_says_where() -> None:
    world = World(config(min_groups=1))
    world.live = {"cheap": 1, "dear": 0}
    decision = world.step()
    assert kinds(decision) == []
    assert decision.pending == (
        "pending: no room in pool cheap (1 of 2 workers free), "
        "no room in pool dear (0 of 2 workers free)"
    )
    assert decision.pending in decision.reason
    world.live = {"cheap": 1, "dear": 2}
    assert kinds(world.step()) == [("start", "em-tiny-dear-1")]


def test_a_pool_that_can_grow_has_room_up_to_its_limit() -> None:
    cloud = pool("cloud", nodes=4, market=Market.SPOT)
    world = World(config(cloud, min_groups=3))
    world.live = {"cloud": 0}
    assert len(kinds(world.step())) == 2


def test_other_models_groups_take_room() -> None:
    world = World(config(pool("only", nodes=4), min_groups=2))
    observation = replace(world.observation(0), pools=(PoolSeen("only", 4, 2, 2),))
    decision = decide(world.config, world.state, observation, 0.0)
    assert len(kinds(decision)) == 1
    assert decision.pending == "pending: no room in pool only (0 of 2 workers free)"


def test_an_external_pool_holds_no_groups() -> None:
    world = World(config(pool("api", market=Market.EXTERNAL), min_groups=1))
    assert kinds(world.step()) == []


def test_nodes_that_cannot_be_listed_are_no_room() -> None:
    world = World(config(pool("only"), min_groups=1))
    observation = replace(world.observation(0), pools=(PoolSeen("only", None, 0),))
    decision = decide(world.config, world.state, observation, 0.0)
    assert decision.pending == "pending: the nodes of pool only could not be listed"


def test_the_budget_is_never_exceeded() -> None:
    world = World(config(min_groups=2, usd_per_hour_budget=1.0))
    decision = world.step()
    assert kinds(decision) == [("start", "em-tiny-cheap-1")]
    assert decision.pending is not None
    assert "a group in pool dear at $0.90/h exceeds the budget of $1.00/h" in decision.pending


def test_a_budget_that_was_lowered_drains_the_dearest_group_even_below_min() -> None:
    world = warm_world(2)
    world.config = config(min_groups=2, usd_per_hour_budget=1.0)
    assert kinds(world.step()) == [("drain", "em-tiny-dear-2")]
    assert world.serving == ["em-tiny-cheap-1"]


# Scaling down


def test_a_lower_need_must_hold_and_then_the_dearest_group_is_drained() -> None:
    world = warm_world(2)
    assert [kinds(decision) for decision in world.steps(15)] == [[]] * 15
    decision = world.step()
    assert kinds(decision) == [("drain", "em-tiny-dear-2"), ("drain", "em-tiny-cheap-1")]
    assert "draining em-tiny-dear-2: 0 groups carry a load of 0.00" in decision.reason


def test_in_one_pool_the_newest_group_goes_first() -> None:
    world = World(config(pool("only", nodes=8), min_groups=3), start_s=5)
    world.steps(8)
    ready_s = world.state.groups[2].since_s
    world.config = config(pool("only", nodes=8), min_groups=1)
    held = world.steps(round(ready_s + 15 - world.now_s), queued=1)
    assert {tuple(kinds(decision)) for decision in held} == {()}
    drained = [kinds(decision) for decision in world.steps(10, queued=1)]
    assert drained[0] == [("drain", "em-tiny-only-3"), ("drain", "em-tiny-only-2")]
    assert world.serving == ["em-tiny-only-1"]


def test_a_replacement_that_bounds_forbid_beside_what_is_there_is_not_pursued() -> None:
    pools = (pool("cheap", 0.3, nodes=4), pool("dear", 0.45))
    world = World(config(*pools, min_groups=2, max_groups=2, usd_per_hour_budget=1.9), start_s=5)
    world.live = {"cheap": 2}
    world.steps(8)
    assert world.serving == ["em-tiny-cheap-1", "em-tiny-dear-2"]
    world.live = {}
    for decision in world.steps(30):
        assert (kinds(decision), decision.pending, decision.state.wanted) == ([], None, 2)


def test_a_group_is_removed_only_when_nothing_is_in_flight_there() -> None:
    world = warm_world(2)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 4}
    world.steps(16)
    assert world.in_state(DRAINING) == ["em-tiny-dear-2"]
    assert [kinds(decision) for decision in world.steps(10)] == [[]] * 10
    world.in_flight = {"em-tiny-cheap-1": 4}
    decision = world.step()
    assert kinds(decision) == [("remove", "em-tiny-dear-2")]
    assert "every gateway reports nothing in flight" in decision.reason
    assert "em-tiny-dear-2 is gone" in world.step().reason


@pytest.mark.parametrize("flag", ["serve_answers", "journal_writes", "settled"])
def test_a_drained_group_is_not_removed_while_anything_is_unknown(flag: str) -> None:
    world = warm_world(2)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 4}
    world.steps(16)
    world.in_flight = {"em-tiny-cheap-1": 4}
    setattr(world, flag, False)
    assert [kinds(decision) for decision in world.steps(90)] == [[]] * 90
    setattr(world, flag, True)
    assert kinds(world.step()) == [("remove", "em-tiny-dear-2")]


def test_the_deadline_ends_a_drain() -> None:
    world = warm_world(2, drain_deadline_s=30)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 4}
    world.steps(16)
    assert [kinds(decision) for decision in world.steps(29)] == [[]] * 29
    decision = world.step()
    assert kinds(decision) == [("remove", "em-tiny-dear-2")]
    assert "1 in flight at the deadline of 30 s" in decision.reason


def test_a_draining_group_is_recalled_before_another_is_started() -> None:
    world = warm_world(2)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 4}
    world.steps(16)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 8}
    decisions = world.steps(4)
    assert kinds(decisions[-1]) == [("recall", "em-tiny-dear-2")]
    assert len(world.serving) == 2


def test_a_group_that_still_starts_is_cancelled_rather_than_a_ready_one_that_is_needed() -> None:
    world = World(config(pool("only", nodes=4), min_groups=1), start_s=5)
    world.steps(8)
    world.start_s = 100
    world.steps(4, queued=16)
    assert world.in_state(STARTING) == ["em-tiny-only-2"]
    decisions = world.steps(16, queued=0)
    assert kinds(decisions[15]) == [("remove", "em-tiny-only-2")]
    assert world.serving == ["em-tiny-only-1"]


def test_a_dear_group_makes_way_for_a_cheaper_one_once_that_is_ready() -> None:
    world = World(config(pool("cheap", 0.3), pool("dear", 0.9), min_groups=1), start_s=5)
    world.live = {"cheap": 0}
    world.steps(8)
    assert world.serving == ["em-tiny-dear-1"]
    world.live = {}
    world.start_s = 20
    decision = world.step()
    assert kinds(decision) == [("start", "em-tiny-cheap-2")]
    assert "cheaper than what there is" in decision.reason
    assert [kinds(decision) for decision in world.steps(19)] == [[]] * 19
    assert kinds(world.step()) == [("drain", "em-tiny-dear-1")]


def test_a_group_that_is_hardly_dearer_stays() -> None:
    world = World(config(pool("cheap", 0.3), pool("dear", 0.31), min_groups=1), start_s=5)
    world.live = {"cheap": 0}
    world.steps(8)
    world.live = {}
    assert [kinds(decision) for decision in world.steps(60)] == [[]] * 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"serve_answers": False}, "Serve does not answer", id="Serve is silent"),
        pytest.param({"journal_writes": False}, "the journal cannot be written", id="no journal"),
        pytest.param({"settled": False}, "the controller has just started", id="just started"),
        pytest.param({"gateways": ()}, "no gateway reports", id="no gateway"),
    ],
)
def test_what_forbids_scaling_down(change: dict[str, object], words: str) -> None:
    world = warm_world(2)
    for name, value in change.items():
        setattr(world, name, value)
    decisions = world.steps(40)
    assert all(kinds(decision) == [] for decision in decisions)
    assert len(world.serving) == 2
    assert f"not scaling down: {words}" in decisions[-1].reason


def test_a_silent_gateway_forbids_scaling_down_until_it_is_forgotten() -> None:
    world = warm_world(2)
    world.gateways = ("g1", "g2")
    world.step()
    world.silence("g2")
    decisions = world.steps(69)
    assert len(world.serving) == 2
    assert "1 gateway workers are silent" in decisions[30].reason
    # The time from 5 to 60 s, in which it is silent, does not count for the 15 s of a lower need.
    assert kinds(world.step()) == [("drain", "em-tiny-dear-2"), ("drain", "em-tiny-cheap-1")]


def test_the_queue_of_a_silent_gateway_still_counts() -> None:
    world = warm_world(1)
    world.gateways = ("g1", "g2")
    world.silence("g2", queued=12)
    world.steps(5)
    assert len(world.state.groups) == 2


@pytest.mark.parametrize("flag", ["serve_answers", "journal_writes"])
def test_nothing_is_started_blindly(flag: str) -> None:
    world = World(config(min_groups=1))
    setattr(world, flag, False)
    decision = world.step()
    assert kinds(decision) == []
    assert "holding: " in decision.reason
    setattr(world, flag, True)
    assert kinds(world.step()) == [("start", "em-tiny-cheap-1")]


# Losses


def test_a_lost_group_is_waited_for_while_its_pool_has_room() -> None:
    world = warm_world(1)
    world.config = config(min_groups=1)
    world.running["em-tiny-cheap-1"].mute = True
    decision = world.step()
    assert world.in_state(LOST) == ["em-tiny-cheap-1"]
    assert "em-tiny-cheap-1 is lost: rank 0 at http://em-tiny-cheap-1:0" in decision.reason
    assert all(kinds(decision) == [] for decision in world.steps(59))
    given_up = world.step()
    assert kinds(given_up) == [("remove", "em-tiny-cheap-1"), ("start", "em-tiny-dear-2")]


def test_a_group_whose_host_died_is_replaced_in_a_pool_with_room() -> None:
    world = warm_world(1)
    world.config = config(min_groups=1)
    world.running["em-tiny-cheap-1"].mute = True
    world.live = {"cheap": 1}
    assert kinds(world.step()) == [("start", "em-tiny-dear-2"), ("remove", "em-tiny-cheap-1")]
    assert "em-tiny-cheap-1 is gone" in world.step().reason


def test_without_room_for_the_replacement_it_is_pending() -> None:
    world = warm_world(1)
    world.config = config(min_groups=1)
    world.running["em-tiny-cheap-1"].mute = True
    world.live = {"cheap": 1, "dear": 0}
    world.steps(2)
    decision = world.step()
    assert world.state.groups == ()
    assert decision.pending is not None
    assert decision.pending.startswith("pending: no room in pool cheap (1 of 2 workers free)")


def test_a_lost_group_that_is_not_wanted_is_removed_at_once() -> None:
    world = warm_world(2)
    world.in_flight = {"em-tiny-dear-2": 1, "em-tiny-cheap-1": 4}
    world.steps(16)
    world.running["em-tiny-dear-2"].mute = True
    decision = world.step()
    assert kinds(decision) == [("remove", "em-tiny-dear-2")]
    assert "is lost" in decision.reason


def test_when_a_pool_shrinks_the_newest_starting_group_gives_way_and_no_other() -> None:
    world = World(config(pool("only", nodes=4), min_groups=2), start_s=100)
    world.step()
    world.live = {"only": 2}
    world.steps(3)
    assert [record.spec.name for record in world.state.groups] == ["em-tiny-only-1"]
    assert world.in_state(STARTING) == ["em-tiny-only-1"]


def test_a_failed_start_leaves_its_pool_alone_ever_longer_and_tries_another() -> None:
    world = World(config(min_groups=1), start_s=5)
    world.failing_pools = {"cheap"}
    world.steps(6)
    assert world.in_state(LOST) == ["em-tiny-cheap-1"]
    assert world.state.backoff["cheap"].failures == 1
    assert kinds(world.step()) == [("remove", "em-tiny-cheap-1"), ("start", "em-tiny-dear-2")]
    world.steps(8)
    assert world.serving == ["em-tiny-dear-2"]


def test_back_off_grows_and_ends_with_a_success() -> None:
    timing = Timing(backoff_first_s=10, backoff_max_s=25)
    world = World(config(pool("only"), min_groups=1, timing=timing), start_s=1)
    world.failing_pools = {"only"}
    starts: list[float] = []
    for _ in range(90):
        decision = world.step()
        starts += [world.now_s for kind, _ in kinds(decision) if kind == "start"]
    gaps = [later - sooner for sooner, later in pairwise(starts)]
    assert gaps == [11, 21, 26, 26]
    assert any("left alone for" in record.decision.reason for record in world.records)
    world.failing_pools = set()
    world.steps(60)
    assert world.serving
    assert world.state.backoff == {}


# Bookkeeping


def test_numbers_of_names_are_never_used_again() -> None:
    world = World(config(pool("only"), min_groups=0, down_delay_s=2), start_s=1)
    names = set()
    for _ in range(5):
        names |= {group for _, group in kinds(world.step(queued=1))}
        world.steps(3, queued=1)
        world.steps(12)
        assert world.state.groups == ()
    assert names == {f"em-tiny-only-{n}" for n in range(1, 6)}


def test_the_expected_time_to_ready_follows_the_measured_starts_of_the_pool() -> None:
    world = World(config(pool("only", nodes=6), min_groups=1), start_s=20)
    world.step()
    assert world.state.groups[0].expected_ready_at_s == 1000 + 60
    world.steps(21)
    assert world.state.start_s == {"only/t1d2e2": 20.0}
    assert world.state.groups[0].expected_ready_at_s is None
    world.start_s = 40
    world.config = config(pool("only", nodes=6), min_groups=2)
    asked_s = world.now_s
    world.step()
    assert world.state.groups[1].expected_ready_at_s == asked_s + 20
    world.steps(41)
    assert world.state.start_s == {"only/t1d2e2": pytest.approx(26.0)}


def test_running_groups_that_the_state_does_not_know_are_adopted_as_they_are() -> None:
    old = warm_world(2)
    fresh = World(config(), start_s=5, now_s=old.now_s, running=old.running, settled=False)
    observation = fresh.observation(0)
    seen = tuple(
        replace(group, spec=fresh.running[group.name].spec, held_since_s=123.0)
        for group in observation.groups
    )
    decision = decide(fresh.config, fresh.state, replace(observation, groups=seen), fresh.now_s)
    assert kinds(decision) == []
    assert [record.state for record in decision.state.groups] == [READY, READY]
    assert [record.requested_at_s for record in decision.state.groups] == [123.0, 123.0]
    assert decision.state.next_n == 3
    assert decision.state.start_s == {}


def test_what_serve_runs_counts_and_not_what_was_recorded() -> None:
    world = warm_world(1)
    observation = world.observation(8)
    running = replace(world.running["em-tiny-cheap-1"].spec, max_model_len=99)
    seen = tuple(replace(group, spec=running) for group in observation.groups)
    decision = decide(world.config, world.state, replace(observation, groups=seen), world.now_s)
    assert decision.state.groups[0].spec == running
    assert decision.state.groups[0].state is READY


def test_decisions_do_not_change_what_they_were_given() -> None:
    world = warm_world(1)
    before = world.state
    backoff, start_s = dict(before.backoff), dict(before.start_s)
    world.failing_pools = {"dear"}
    world.steps(20, queued=16)
    assert (before.backoff, before.start_s) == (backoff, start_s)


def test_an_action_kind_has_one_word() -> None:
    assert [kind.value for kind in ActionKind] == ["start", "drain", "recall", "remove"]


def test_without_anything_to_see_the_decision_still_says_what_is_missing() -> None:
    world = World(config(min_groups=1))
    decision = decide(world.config, world.state, Observation(serve_answers=False), 5.0)
    assert decision.actions == ()
    assert "holding: Serve does not answer" in decision.reason
    assert decision.wake_at_s > 5.0


def test_gateways_clocks_do_not_matter() -> None:
    """Only the controller's own times of arrival count."""
    world = warm_world(2)
    observation = replace(
        world.observation(0), gateways=(GatewaySeen("g1", world.now_s, world.now_s - 1),)
    )
    decision = decide(world.config, world.state, observation, world.now_s)
    assert decision.demand.live_gateways == 1


def test_a_need_that_cannot_be_met_is_told_the_same_way_for_as_long_as_it_lasts() -> None:
    """Otherwise each delay would begin anew, and `pending` would come and go."""
    world = warm_world(2)
    decisions = world.steps(30, queued=40)
    told = {(d.pending, d.binding) for d in decisions[4:]}
    assert len(told) == 1
    (pending, binding) = told.pop()
    assert binding is Binding.ROOM and pending is not None
    assert pending.startswith("pending: no room in pool cheap")


def test_a_need_that_grows_is_followed_while_its_delays_pass() -> None:
    world = World(config(pool("only", nodes=20), max_groups=8, min_groups=1), start_s=5)
    world.steps(8)
    started = [len(kinds(world.step(queued))) for queued in (12, 12, 12, 12, 30, 30, 30, 30)]
    assert started == [0, 0, 0, 1, 0, 0, 0, 2]


def test_starts_that_take_long_by_plan_are_given_the_time() -> None:
    slow = config(pool("only", nodes=4), min_groups=1)
    options = tuple(replace(option, start_s=600.0) for option in slow.options)
    world = World(replace(slow, options=options), start_s=5000.0)
    world.step()
    assert all(world.step(dt_s=30.0).state.groups[0].state is STARTING for _ in range(79))
    world.step(dt_s=30.0)
    assert "start failed: not ready after 2400 s" in world.step(dt_s=30.0).reason
