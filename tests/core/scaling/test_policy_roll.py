"""A changed model or engine: groups change over one after the other, and the load is carried."""

from dataclasses import replace
from typing import Any

import pytest
from tests.core.scaling.world import (
    PER_GROUP,
    Traffic,
    World,
    config,
    pool,
    size_option,
    token_config,
)

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.allocation import bid_of
from expertmesh.core.scaling.contract import ActionKind, Decision, Grant, GroupRecord

NEW = "/models/tiny-2"


def settled(world: World, seconds: float = 300.0) -> World:
    world.run(seconds)
    return world


def sources(world: World) -> list[str]:
    return sorted(record.spec.model_source for record in world.state.groups)


def changes(decisions: list[Decision]) -> list[tuple[str, str]]:
    wanted = (ActionKind.START, ActionKind.DRAIN)
    return [(a.kind.value, a.group) for d in decisions for a in d.actions if a.kind in wanted]


def steady(nodes: int, **rules: Any) -> World:
    """Two groups of two workers, with room for as many as the nodes hold."""
    return settled(World(config(pool("only", 0.5, nodes=nodes), min_groups=2, **rules)))


def test_where_there_is_room_a_new_one_comes_before_an_old_one_goes() -> None:
    world = steady(nodes=12)
    world.config = replace(world.config, source=NEW)
    decisions = world.run(600)
    assert changes(decisions) == [
        ("start", "em-tiny-only-3"),
        ("drain", "em-tiny-only-2"),
        ("start", "em-tiny-only-4"),
        ("drain", "em-tiny-only-1"),
    ]
    assert all(d.load.ready >= 2.0 for d in decisions)
    assert sources(world) == [NEW, NEW]
    reasons = " ".join(d.reason for d in decisions)
    assert "to replace em-tiny-only-2, which runs an older version of the model" in reasons


@pytest.mark.parametrize("rules", [{"nodes": 4}, {"nodes": 12, "max_groups": 2}])
def test_where_there_is_none_one_makes_way_first(rules: dict[str, Any]) -> None:
    world = steady(**rules)
    world.config = replace(world.config, source=NEW)
    decisions = world.run(600)
    assert [kind for kind, _ in changes(decisions)] == ["drain", "start", "drain", "start"]
    ready = [sum(g.state is GroupState.READY for g in d.state.groups) for d in decisions]
    assert min(ready) == 1
    assert sources(world) == [NEW, NEW]


def test_without_room_nobody_goes_whose_load_the_others_would_not_carry() -> None:
    world = World(token_config(pools=(pool("only", 0.5, nodes=6),), min_groups=1))
    world.traffic = Traffic(2.7 * PER_GROUP)
    settled(world, 900)
    assert len(world.serving) == 3
    world.config = replace(world.config, source=NEW)
    decisions = world.run(300)
    assert changes(decisions) == []
    assert "cannot be replaced: no room in pool only (0 of 2 workers free), and the others" in (
        decisions[-1].reason
    )
    world.traffic = Traffic(1.2 * PER_GROUP)
    world.run(3600)
    assert set(sources(world)) == {NEW}
    assert world.wait_s == 0.0


def test_the_only_group_of_a_model_without_room_stays_while_it_is_used() -> None:
    world = settled(World(config(pool("only", 0.5, nodes=2), min_groups=1)))
    world.in_flight = {"em-tiny-only-1": 3}
    world.config = replace(world.config, source=NEW)
    decisions = world.run(120)
    assert changes(decisions) == []
    world.in_flight = {}
    world.run(600)
    assert sources(world) == [NEW]


def test_one_that_still_starts_becomes_ready_and_is_then_replaced() -> None:
    world = World(config(pool("only", 0.5, nodes=4), min_groups=1), start_s=100.0)
    world.run(20)
    world.config = replace(world.config, source=NEW)
    assert changes(world.run(300)) == [("start", "em-tiny-only-2"), ("drain", "em-tiny-only-1")]
    assert sources(world) == [NEW]


@pytest.mark.parametrize("what", ["max_model_len", "engine"])
def test_what_makes_another_version(what: str) -> None:
    world = steady(nodes=12)
    before = {record.spec.name for record in world.state.groups}
    if what == "engine":
        options = tuple(replace(o, engine={"enforce_eager": True}) for o in world.config.options)
        world.config = replace(world.config, options=options)
    else:
        world.config = replace(world.config, max_model_len=2048)
    world.run(600)
    assert not before & {record.spec.name for record in world.state.groups}


def test_a_price_or_a_rule_is_no_other_version() -> None:
    world = steady(nodes=12)
    options = tuple(replace(o, usd_per_hour=1.1 * o.usd_per_hour) for o in world.config.options)
    world.config = replace(
        world.config, options=options, rules=replace(world.config.rules, max_groups=3)
    )
    assert changes(world.run(600)) == []


def test_what_has_been_through_json_is_the_same() -> None:
    told = replace(
        config().options[0], engine={"compilation_config": {"sizes": (1, 2)}, "block_size": 16}
    )
    known = replace(config(), options=(told,))
    world = settled(World(replace(known, rules=replace(known.rules, min_groups=1))))
    (record,) = world.state.groups
    spec = replace(record.spec, engine={"block_size": 16, "compilation_config": {"sizes": [1, 2]}})
    assert known.is_current(spec)


def test_a_second_change_is_rolled_as_well() -> None:
    world = steady(nodes=12)
    world.config = replace(world.config, source=NEW)
    world.run(30)
    world.config = replace(world.config, source="/models/tiny-3")
    world.run(900)
    assert sources(world) == ["/models/tiny-3"] * 2


def test_nothing_is_rolled_while_the_fleet_cannot_be_seen() -> None:
    world = steady(nodes=12)
    world.config = replace(world.config, source=NEW)
    world.settled = False
    assert changes(world.run(120)) == []


def test_a_version_that_fails_to_start_ends_none_of_the_old_ones() -> None:
    world = settled(World(config(pool("only", 0.5, nodes=12), min_groups=3, max_groups=5)))
    before = sources(world)
    world.config = replace(world.config, source=NEW)
    world.failing_pools = {"only"}
    decisions = world.run(1800)
    assert all(len(_ready(d)) == 3 for d in decisions)
    assert sorted(r.spec.model_source for r in _ready(decisions[-1])) == before
    assert "pool only is left alone for" in " ".join(d.reason for d in decisions)


def test_nodes_that_cannot_be_listed_are_no_reason_to_make_way() -> None:
    world = steady(nodes=4)
    world.config = replace(world.config, source=NEW)
    seen = world.observation

    def without_nodes(queued: int) -> Any:
        looked = seen(queued)
        unlisted = tuple(replace(each, live_workers=None) for each in looked.pools)
        return replace(looked, pools=unlisted)

    world.observation = without_nodes  # type: ignore[method-assign]
    assert changes(world.run(120)) == []


def test_one_quiet_look_does_not_end_the_only_group() -> None:
    world = settled(World(config(pool("only", 0.5, nodes=2), min_groups=1)))
    world.in_flight = {"em-tiny-only-1": 3}
    world.run(60)
    world.config = replace(world.config, source=NEW)
    world.in_flight = {}
    decisions = [world.step()]
    world.in_flight = {"em-tiny-only-1": 3}
    assert changes([*decisions, *world.run(60)]) == []


@pytest.mark.parametrize("down_delay_s", [15.0, None])
def test_a_dearer_place_for_the_new_one_is_taken_once(down_delay_s: float | None) -> None:
    pools = (pool("cheap", 0.3, nodes=2), pool("dear", 0.45, nodes=4))
    world = World(config(*pools, min_groups=1, down_delay_s=down_delay_s), start_s=60.0)
    world.run(200)
    world.config = replace(world.config, source=NEW)
    decisions = []
    for _ in range(400):
        world.in_flight = {name: 3 for name in world.serving[:1]}
        decisions.append(world.step(dt_s=5.0))
    starts = [group for kind, group in changes(decisions) if kind == "start"]
    assert len(starts) <= 2
    assert set(sources(world)) == {NEW}
    assert all(_ready(d) for d in decisions)


def test_another_size_of_another_model_is_rolled_in_a_full_pool() -> None:
    only = pool("only", 0.5, nodes=4)
    world = settled(World(token_config(size_option(only), pools=(only,), min_groups=2)))
    wide = size_option(only, 2)
    after = token_config(wide, pools=(only,), min_groups=1)
    world.config = replace(after, source=NEW)
    world.run(7200)
    assert {r.spec.parallelism for r in world.state.groups} == {wide.parallelism}


def test_a_lost_group_of_an_older_version_can_be_bid_for() -> None:
    world = steady(nodes=4)
    world.config = replace(world.config, source=NEW)
    world.running["em-tiny-only-1"].dead = True
    for _ in range(60):
        decision = world.step(dt_s=5.0)
        bid_of(world.config, decision, world.observation(0), world.now_s)


def test_it_takes_nothing_from_other_models() -> None:
    world = steady(nodes=12)
    world.config = replace(world.config, source=NEW)
    world.grant = Grant(workers={}, usd_per_hour=2.0, why="others have the rest of the budget")
    world.in_flight = {"em-tiny-only-1": 7, "em-tiny-only-2": 7}
    decisions = world.run(120)
    assert changes(decisions) == []
    assert "cannot be replaced: others have the rest of the budget" in decisions[-1].reason


def test_fewer_groups_are_allowed_while_it_rolls_and_the_one_that_serves_stays() -> None:
    world = settled(World(config(pool("only", 0.5, nodes=12), min_groups=1, max_groups=2)))
    world.in_flight = {"em-tiny-only-1": 3}
    world.config = replace(world.config, source=NEW)
    world.step()
    world.config = replace(world.config, rules=replace(world.config.rules, max_groups=1))
    assert all(_ready(d) for d in world.run(120))


def _ready(decision: Decision) -> list[GroupRecord]:
    return [g for g in decision.state.groups if g.state is GroupState.READY]
