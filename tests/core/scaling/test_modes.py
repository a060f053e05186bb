"""A model that only observes, one that advises, and one that acts."""

import pytest
from tests.core.scaling.world import PER_GROUP, Traffic, World, token_config

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import ActionKind, Binding, Decision

OBSERVE, ADVISE, ACT = ScalingMode


def busy(mode: ScalingMode, seconds: int = 300) -> tuple[World, list[Decision]]:
    """A model with one group and the load of three, in another mode from then on."""
    world = World(token_config(min_groups=1))
    world.run(120)
    world.config = token_config(min_groups=1, mode=mode)
    world.traffic = Traffic(3 * PER_GROUP)
    return world, world.run(seconds)


@pytest.mark.parametrize("mode", [OBSERVE, ADVISE])
def test_groups_are_left_as_they_are(mode: ScalingMode) -> None:
    world, decisions = busy(mode)
    assert [d.actions for d in decisions if d.actions] == []
    assert len(world.serving) == 1
    assert {d.binding for d in decisions} == {Binding.MODE}


@pytest.mark.parametrize("mode", [OBSERVE, ADVISE])
def test_it_measures_and_forecasts_all_the_same(mode: ScalingMode) -> None:
    world, decisions = busy(mode)
    _, others = busy(ACT, seconds=5)
    assert decisions[0].load.now == others[0].load.now
    assert decisions[-1].load.now > 1.0
    assert world.state.forecast.bins != ()
    assert world.state.learned != {}


def test_who_observes_says_nothing_of_what_it_would_do() -> None:
    _, decisions = busy(OBSERVE)
    assert {d.advice for d in decisions} == {()}
    assert not any("would" in d.reason for d in decisions)


def test_who_advises_says_what_the_same_model_would_do_if_it_acted() -> None:
    world, decisions = busy(ADVISE)
    advice = decisions[-1].advice
    assert {action.kind for action in advice} == {ActionKind.START}
    assert f"; would start {advice[0].group}" in decisions[-1].reason
    before = world.state
    world.config = token_config(min_groups=1)
    assert [a.group for a in world.step(dt_s=5.0).actions] == [a.group for a in advice]
    assert before.next_n == 2, "advice uses no names up"


def test_who_acts_gives_no_advice() -> None:
    world, decisions = busy(ACT)
    assert {d.advice for d in decisions} == {()}
    assert len(world.serving) >= 3


@pytest.mark.parametrize("mode", [OBSERVE, ADVISE])
def test_a_group_that_is_lost_stays_lost_and_is_advised_upon(mode: ScalingMode) -> None:
    world, _ = busy(mode, seconds=30)
    world.running[world.serving[0]].mute = True
    decisions = world.run(300)
    assert world.in_state(GroupState.LOST) == ["em-tiny-only-1"]
    assert [d.actions for d in decisions if d.actions] == []
    advised = {a.kind for d in decisions for a in d.advice}
    assert (ActionKind.REMOVE in advised) is (mode is ADVISE)


def test_a_drain_that_was_begun_waits_for_the_mode_to_act() -> None:
    world = World(token_config(min_groups=2, down_delay_s=10.0))
    world.run(120)
    world.config = token_config(max_groups=1, down_delay_s=10.0, drain_deadline_s=20.0)
    world.traffic = Traffic(0.5)
    while not world.in_state(GroupState.DRAINING):
        world.step(dt_s=5.0)
    world.config = token_config(max_groups=1, mode=OBSERVE, drain_deadline_s=20.0)
    assert [d.actions for d in world.run(120) if d.actions] == []
    world.config = token_config(max_groups=1, drain_deadline_s=20.0)
    assert ActionKind.REMOVE in {a.kind for a in world.step().actions}
