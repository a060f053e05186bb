"""External providers: cheaper than a group at a low load, and help when groups are full."""

from dataclasses import replace

import pytest
from tests.core.scaling.world import PER_GROUP, Traffic, World, pool, size_option, token_config

from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse
from expertmesh.core.scaling.contract import Binding, ScalingConfig

P = pool("p", 5.0, nodes=40)
"""A group costs $10 an hour and carries 5 requests a second of 356 tokens."""


def route(usd_per_mtok: float, use: ExternalUse = ExternalUse.FALLBACK) -> ExternalRoute:
    return ExternalRoute(
        "api", "https://api", "m", "KEY", usd_per_mtok, usd_per_mtok, usd_per_mtok, use
    )


def config(*routes: ExternalRoute, **changes: object) -> ScalingConfig:
    return replace(token_config(size_option(P), pools=(P,), **changes), external=routes)


def world_of(load: float, *routes: ExternalRoute, **changes: object) -> World:
    """It begins with a group, so that the length of requests is known."""
    world = World(config(*routes, min_groups=1), provider=True)
    world.run(60)
    world.traffic = Traffic(load * PER_GROUP)
    world.run(300)
    world.config = config(*routes, **changes)
    return world


CHEAP = 10.0 / (5.0 * 356 * 3600 / 1e6)
"""At this price per million tokens a provider takes as much as a full group costs."""


def test_at_a_low_load_a_provider_is_cheaper_than_a_group_and_there_is_none() -> None:
    world = world_of(0.1, route(CHEAP))
    decision = world.run(900)[-1]
    assert world.state.groups == ()
    assert decision.binding is Binding.EXTERNAL
    assert "a provider serves this load for less than a group" in decision.reason


def test_from_as_much_as_a_group_costs_there_is_one() -> None:
    world = world_of(0.9, route(CHEAP * 2))
    world.run(900)
    assert len(world.serving) >= 1


def test_it_comes_back_to_groups_when_the_load_grows() -> None:
    world = world_of(0.1, route(CHEAP * 1.8))
    world.run(900)
    assert world.state.groups == ()
    world.traffic = Traffic(4 * PER_GROUP)
    world.run(900)
    assert len(world.serving) >= 4


def test_who_leaves_it_all_to_a_provider_does_not_start_groups_now_and_then() -> None:
    world = world_of(0.3, route(CHEAP))
    world.run(900)
    assert {d.actions for d in world.run(4 * 3600)} == {()}
    assert world.state.groups == ()


def test_a_dear_provider_changes_nothing() -> None:
    world = world_of(0.1, route(CHEAP * 1000))
    world.run(900)
    assert len(world.serving) == 1


def test_a_minimum_is_kept_beside_a_cheap_provider() -> None:
    world = world_of(0.1, route(CHEAP / 10), min_groups=1)
    world.run(900)
    assert len(world.serving) == 1


def test_an_overflow_makes_fewer_groups_enough() -> None:
    fallback = world_of(4.2, route(CHEAP * 1.5))
    overflow = world_of(4.2, route(CHEAP * 1.5, ExternalUse.OVERFLOW))
    fallback.run(1800)
    overflow.run(1800)
    assert len(overflow.serving) < len(fallback.serving)


def test_what_overflows_is_part_of_the_load() -> None:
    """All that comes, though the groups serve less of it."""
    world = world_of(4.0, route(CHEAP * 1.5, ExternalUse.OVERFLOW), max_groups=1)
    world.run(1800)
    decision = world.step(dt_s=5.0)
    assert len(world.serving) == 1
    assert decision.load.now == pytest.approx(4.0, rel=0.05)


def test_of_several_providers_the_cheapest_counts() -> None:
    world = world_of(0.1, route(CHEAP * 1000), route(CHEAP))
    assert world.run(900)[-1].binding is Binding.EXTERNAL


def test_a_provider_that_takes_nothing_for_it_leaves_no_group() -> None:
    world = world_of(3.0, route(0.0))
    assert world.run(900)[-1].binding is Binding.EXTERNAL
    assert world.state.groups == ()


def test_a_group_more_than_the_cheapest_mix_is_let_go_though_a_provider_helps() -> None:
    world = World(config(route(0.3, ExternalUse.OVERFLOW), min_groups=1), provider=True)
    world.traffic = Traffic(1.25 * PER_GROUP)
    world.run(3600)
    assert len(world.serving) == 1
    for least, seconds in ((2, 600), (1, 3600)):
        world.config = replace(world.config, rules=replace(world.config.rules, min_groups=least))
        world.run(seconds)
    assert len(world.serving) == 1
