"""Spot groups: cheaper, unless their zone is likely to be lost."""

from dataclasses import replace

import pytest
from tests.core.scaling.world import PER_GROUP, Traffic, World, pool, size_option, token_config

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.contract import ActionKind, Binding, Decision
from expertmesh.core.scaling.spot import ADMITTED_AFTER_S, Zone

PLAIN = pool("plain", 5.0, nodes=40, market=Market.ON_DEMAND)


def spot(name: str, usd: float, zone: str) -> Pool:
    return replace(pool(name, usd, nodes=40, market=Market.SPOT), zone=zone)


A, B = spot("spota", 2.0, "a"), spot("spotb", 2.2, "b")
DEAR = spot("spota", 4.9, "a")


def world_of(*pools: Pool, start_s: float = 300.0, **changes: object) -> World:
    options = tuple(size_option(each, start_s=start_s) for each in pools)
    config = token_config(*options, pools=pools, **changes)
    return World(config, start_s=30.0, now_s=1e6)


def by_pool(world: World, *states: GroupState) -> dict[str, int]:
    wanted = states or (GroupState.READY,)
    names = [r.spec.pool for r in world.state.groups if r.state in wanted]
    return {name: names.count(name) for name in sorted(set(names))}


def actions(decision: Decision) -> list[tuple[str, str]]:
    return [(action.kind.value, action.group) for action in decision.actions]


def aged(world: World, *zones: str, losses: float = 0.0) -> World:
    old = Zone(world.now_s - 1e5, (50.0, 50.0, 50.0), (losses, losses, losses))
    world.state = replace(world.state, zones=dict.fromkeys(zones, old))
    return world


def test_spot_is_cheaper_unless_it_is_risky() -> None:
    safe = aged(world_of(PLAIN, A, min_groups=1), "a")
    assert [a.spec.pool for a in safe.step().actions if a.spec] == ["spota"]
    risky = aged(world_of(PLAIN, DEAR, min_groups=1), "a", losses=500.0)
    assert [a.spec.pool for a in risky.step().actions if a.spec] == ["plain"]
    calm = aged(world_of(PLAIN, DEAR, min_groups=1), "a")
    assert [a.spec.pool for a in calm.step().actions if a.spec] == ["spota"]


def test_a_group_whose_node_will_be_taken_drains_once_its_replacement_is_ready() -> None:
    world = aged(world_of(PLAIN, A, min_groups=1, drain_deadline_s=20.0), "a")
    world.run(60)
    assert by_pool(world) == {"spota": 1}
    world.running["em-tiny-spota-1"].leaving_at_s = world.now_s + 100
    world.in_flight = {"em-tiny-spota-1": 3}
    decision = world.step()
    assert actions(decision) == [("start", "em-tiny-plain-2")]
    assert "em-tiny-spota-1 serves on until others carry its load" in decision.reason
    assert "a node of it will be taken away in 100 s" in decision.reason
    later = world.steps(29)
    assert {d.actions for d in later} == {()}
    assert by_pool(world) == {"spota": 1}
    assert actions(world.step()) == [("drain", "em-tiny-spota-1")]
    assert by_pool(world) == {"plain": 1}


def test_without_a_replacement_it_drains_when_its_requests_can_just_be_finished() -> None:
    world = aged(world_of(A, min_groups=1, drain_deadline_s=20.0), "a")
    world.run(60)
    taken_at_s = world.now_s + 100
    world.running["em-tiny-spota-1"].leaving_at_s = taken_at_s
    world.in_flight = {"em-tiny-spota-1": 3}
    while world.now_s < taken_at_s - 20:
        decision = world.step()
        assert actions(decision) == []
        assert decision.wake_at_s <= taken_at_s - 20
    assert actions(world.step()) == [("drain", "em-tiny-spota-1")]
    while world.now_s < taken_at_s:
        assert actions(world.step()) == []
    last = world.step()
    assert actions(last) == [("remove", "em-tiny-spota-1")]
    assert "3 in flight at the deadline of 20 s" in last.reason


def test_requests_that_are_known_to_be_short_let_it_serve_on_for_longer() -> None:
    world = aged(world_of(A, min_groups=1, drain_deadline_s=600.0), "a")
    world.traffic = Traffic(0.2 * PER_GROUP)
    world.run(900)
    taken_at_s = world.now_s + 100
    for run in world.running.values():
        run.leaving_at_s = taken_at_s
    while not any(kind == "drain" for kind, _ in actions(world.step())):
        assert world.now_s < taken_at_s
    assert 30 < taken_at_s - world.now_s < 60


def test_a_group_that_the_others_can_do_without_drains_at_once() -> None:
    world = aged(world_of(PLAIN, A, min_groups=3), "a")
    world.run(90)
    first = next(name for name in sorted(world.running) if "spota" in name)
    world.in_flight = {first: 3}
    world.running[first].leaving_at_s = world.now_s + 300
    assert ("drain", first) in actions(world.step())


def test_groups_that_are_needed_serve_on_together_until_enough_others_are_ready() -> None:
    world = aged(world_of(PLAIN, A, min_groups=1, drain_deadline_s=20.0), "a")
    world.traffic = Traffic(3.5 * PER_GROUP)
    world.run(1800)
    there = [name for name in world.serving if "spota" in name]
    assert len(there) >= 3
    before = world.step(dt_s=5.0).load
    taken_at_s = world.now_s + 300
    for name in there:
        world.running[name].leaving_at_s = taken_at_s
    while any("spota" in name for name in world.serving):
        decision = world.step(dt_s=5.0)
        assert decision.load.now == pytest.approx(before.now, rel=0.1)
        assert world.wait_s == 0.0
        assert world.now_s < taken_at_s
    assert len(world.serving) >= 4


def test_the_only_group_of_a_model_in_use_serves_on_without_a_minimum_too() -> None:
    world = aged(world_of(PLAIN, A, drain_deadline_s=20.0), "a")
    world.step(queued=1)
    world.run(60)
    name = world.serving[0]
    world.running[name].leaving_at_s = world.now_s + 100
    world.in_flight = {name: 1}
    assert ("drain", name) not in actions(world.step())


def test_a_notice_that_is_given_again_moves_no_deadline() -> None:
    world = aged(world_of(A, min_groups=1, drain_deadline_s=20.0), "a")
    world.run(60)
    world.in_flight = {"em-tiny-spota-1": 3}
    taken_at_s = world.now_s + 100
    while world.now_s <= taken_at_s - 20:
        world.running["em-tiny-spota-1"].leaving_at_s = world.now_s + 100
        decision = world.step()
    assert actions(decision) == [("drain", "em-tiny-spota-1")]


def test_a_notice_that_is_withdrawn_is_forgotten() -> None:
    world = aged(world_of(A, min_groups=1, drain_deadline_s=20.0), "a")
    world.run(60)
    world.running["em-tiny-spota-1"].leaving_at_s = world.now_s + 100
    world.step()
    world.running["em-tiny-spota-1"].leaving_at_s = None
    assert {d.actions for d in world.run(300)} == {()}
    assert world.state.groups[0].leaving_at_s is None


def test_a_group_that_still_starts_there_is_not_counted_on() -> None:
    world = aged(world_of(PLAIN, A, min_groups=1), "a")
    world.step()
    world.running["em-tiny-spota-1"].leaving_at_s = world.now_s + 100
    assert ("start", "em-tiny-plain-2") in actions(world.step())


def test_a_zone_that_was_lost_is_left_alone_for_its_time() -> None:
    world = aged(world_of(PLAIN, A, min_groups=1), "a")
    world.run(60)
    world.running["em-tiny-spota-1"].dead = True
    lost_s = world.now_s
    decision = world.step()
    assert world.in_state(GroupState.LOST) == ["em-tiny-spota-1"]
    assert [a.spec.pool for a in decision.actions if a.spec] == ["plain"]
    world.run(300)
    assert "em-tiny-spota-1" not in world.running
    while world.now_s < lost_s + ADMITTED_AFTER_S:
        assert by_pool(world, GroupState.STARTING, GroupState.READY) == {"plain": 1}
        world.step(dt_s=5.0)
    world.run(1200)
    assert sum(world.state.zones["a"].losses) == 1.0


def test_only_a_lost_zone_to_be_had_is_waited_for_and_named() -> None:
    world = aged(world_of(A, min_groups=1), "a")
    world.run(60)
    world.running["em-tiny-spota-1"].dead = True
    world.run(200)
    decision = world.step()
    assert world.serving == []
    assert decision.binding is Binding.BACKOFF
    assert decision.pending == "pending: spot zone a was lost lately"
    world.run(round(ADMITTED_AFTER_S))
    world.run(60)
    assert len(world.serving) == 1


def test_groups_of_one_zone_are_lost_together_and_that_is_one_loss() -> None:
    world = aged(world_of(PLAIN, A, min_groups=3, max_groups=8), "a")
    world.run(90)
    names = [name for name in world.running if "spota" in name]
    assert len(names) >= 2
    for name in names:
        world.running[name].dead = True
    world.step()
    assert sum(world.state.zones["a"].losses) == 1.0


def test_what_a_lost_zone_would_leave_is_covered_where_a_loss_is_likely() -> None:
    """A zone's loss leaves enough ready groups for the load that is expected."""
    world = aged(world_of(PLAIN, A, B, start_s=900.0, min_groups=1), "a", "b", losses=100.0)
    world.traffic = Traffic(4.0 * PER_GROUP)
    world.run(3600)
    decision = world.step(dt_s=5.0)
    assert decision.load.now == pytest.approx(4.0, rel=0.1)
    there = by_pool(world)
    left = sum(there.values()) - max(there.get("spota", 0), there.get("spotb", 0))
    assert left >= 4


def test_where_a_loss_is_unlikely_cover_is_not_paid_for() -> None:
    world = world_of(PLAIN, A, start_s=60.0, min_groups=1)
    world.traffic = Traffic(4.0 * PER_GROUP)
    aged(world, "a")
    world.run(3600)
    assert by_pool(world).get("plain", 0) <= 1


def test_what_is_kept_covers_too() -> None:
    """The groups that cover a zone's loss are not released as superfluous."""
    world = aged(world_of(PLAIN, A, B, start_s=900.0, min_groups=1), "a", "b", losses=100.0)
    world.traffic = Traffic(4.0 * PER_GROUP)
    world.run(7200)
    before = by_pool(world)
    decisions = world.run(3600)
    moved = [a for d in decisions for a in d.actions if a.kind is not ActionKind.REMOVE]
    assert moved == []
    assert by_pool(world) == before


def test_an_hour_of_a_zone_is_counted_once_however_many_pools_are_in_it() -> None:
    other = spot("spotc", 2.0, "a")
    world = World(
        token_config(
            *(size_option(each) for each in (A, other)),
            pools=(A, other),
            min_groups=4,
            max_groups=8,
        ),
        start_s=30.0,
        now_s=1e6,
    )
    world.config = replace(world.config, pools=tuple(replace(p, max_nodes=4) for p in (A, other)))
    world.run(60)
    assert set(by_pool(world)) == {"spota", "spotc"}
    before = sum(world.state.zones["a"].watched_h)
    world.run(360)
    assert sum(world.state.zones["a"].watched_h) - before == pytest.approx(0.1, rel=0.02)


def test_of_two_that_are_taken_the_one_with_less_time_goes_first() -> None:
    world = World(token_config(min_groups=2))
    world.traffic = Traffic(0.3 * PER_GROUP)
    world.run(600)
    late, soon = world.serving
    world.running[late].leaving_at_s = world.now_s + 1800.0
    world.running[soon].leaving_at_s = world.now_s + 60.0
    decisions = world.run(40)
    drained = [a.group for d in decisions for a in d.actions if a.kind is ActionKind.DRAIN]
    assert drained[0] == soon
    assert all(any(g.state is GroupState.READY for g in d.state.groups) for d in decisions)


@pytest.mark.parametrize("most", [1, 2])
def test_one_that_will_be_taken_is_not_in_the_way_of_the_one_that_replaces_it(most: int) -> None:
    world = World(token_config(min_groups=1, max_groups=most))
    world.traffic = Traffic(0.5 * PER_GROUP)
    world.run(600)
    (name,) = world.serving
    world.running[name].leaving_at_s = world.now_s + 120.0
    decisions = world.run(100)
    assert all(any(g.state is GroupState.READY for g in d.state.groups) for d in decisions)
