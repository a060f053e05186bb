"""Bounds on what is started: money by the hour and by the day, numbers, room, and what others
have; and which of them is said to bind."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from expertmesh.core.scaling.contract import ActionKind, Binding, Grant, workers_of
from expertmesh.core.scaling.spending import DAY_S

NOON_S = 20_000 * DAY_S + DAY_S / 2
P = pool("p", 1.0, nodes=24)


def world_of(now_s: float = NOON_S, **changes: object) -> World:
    """Groups at $2 an hour, in a pool that holds twelve."""
    return World(token_config(size_option(P), pools=(P,), **changes), now_s=now_s)


def cost(world: World) -> float:
    return sum(record.spec.usd_per_hour for record in world.state.groups)


def test_the_hours_budget_binds() -> None:
    world = world_of(usd_per_hour_budget=7.0)
    world.traffic = Traffic(9 * PER_GROUP)
    decisions = world.run(600)
    assert len(world.serving) == 3
    assert decisions[-1].binding is Binding.BUDGET
    assert decisions[-1].pending is not None
    assert "exceeds the budget of $7.00/h" in decisions[-1].pending


def test_a_days_budget_is_spread_over_the_rest_of_the_day() -> None:
    world = world_of(usd_per_day_budget=12 * 5.0)
    world.traffic = Traffic(9 * PER_GROUP)
    decisions = world.run(600)
    assert len(world.serving) == 2
    assert decisions[-1].binding is Binding.BUDGET


@pytest.mark.parametrize("budget_usd", [3.0, 30.0, 60.0])
def test_a_days_budget_is_kept_over_midnight(budget_usd: float) -> None:
    world = world_of(NOON_S, usd_per_day_budget=budget_usd, drain_deadline_s=120.0)
    world.traffic = Traffic(6 * PER_GROUP)
    spent: dict[int, float] = {}
    for _ in range(round(1.9 * DAY_S / 60)):
        day = int(world.now_s // DAY_S)
        world.step(dt_s=60.0)
        spent[day] = spent.get(day, 0.0) + cost(world) / 60
        if world.state.spending.day == day:
            assert world.state.spending.usd == pytest.approx(spent[day] - cost(world) / 60, abs=0.2)
    assert all(usd <= budget_usd + 1e-6 for usd in spent.values()), spent
    assert spent[20_001] > 0.5 * min(budget_usd, 6 * 2 * 24)


def test_a_days_budget_that_is_spent_drains_what_there_is() -> None:
    world = world_of(usd_per_day_budget=200.0, min_groups=2)
    world.run(300)
    assert len(world.serving) == 2
    lower = replace(world.config.rules, usd_per_day_budget=0.1)
    world.config = replace(world.config, rules=lower)
    world.run(120)
    assert world.state.groups == ()
    assert world.step().binding is Binding.BUDGET


def test_the_number_binds() -> None:
    world = world_of(max_groups=3)
    world.traffic = Traffic(9 * PER_GROUP)
    assert world.run(600)[-1].binding is Binding.MAX_GROUPS
    assert len(world.serving) == 3


def test_room_binds() -> None:
    world = world_of()
    world.live = {"p": 9}
    world.traffic = Traffic(9 * PER_GROUP)
    decision = world.run(600)[-1]
    assert decision.binding is Binding.ROOM
    assert decision.pending == "pending: no room in pool p (1 of 2 workers free)"
    assert len(world.serving) == 4


def test_what_others_have_binds() -> None:
    world = world_of()
    world.grant = Grant({"p": 6}, None, "model big has 18 workers of pool p by its priority")
    world.traffic = Traffic(9 * PER_GROUP)
    decision = world.run(600)[-1]
    assert decision.binding is Binding.GRANT
    assert decision.pending is not None
    assert "model big has 18 workers" in decision.pending
    assert len(world.serving) == 3


def test_a_grant_of_money_binds() -> None:
    world = world_of()
    world.grant = Grant({}, 5.0, "the platform's budget is shared")
    world.traffic = Traffic(9 * PER_GROUP)
    decision = world.run(600)[-1]
    assert decision.binding is Binding.GRANT
    assert len(world.serving) == 2


@pytest.mark.parametrize("grant", [Grant({"p": 4}), Grant({}, 4.0)])
def test_a_grant_that_shrinks_is_followed_at_once(grant: Grant) -> None:
    world = world_of(min_groups=4)
    world.run(300)
    world.traffic = Traffic(4 * PER_GROUP)
    world.run(300)
    assert len(world.serving) >= 4
    world.grant = grant
    world.run(120)
    assert len(world.state.groups) == 2


def test_nothing_binds_where_the_load_is_carried() -> None:
    world = world_of(min_groups=1, usd_per_hour_budget=100.0)
    world.traffic = Traffic(3 * PER_GROUP)
    assert world.run(1800)[-1].binding in (Binding.LOAD, Binding.HOLD)
    world = world_of(min_groups=2)
    world.traffic = Traffic(0.1 * PER_GROUP)
    assert world.run(1800)[-1].binding is Binding.MIN_GROUPS


def test_a_need_that_must_still_hold_is_named() -> None:
    world = world_of(min_groups=1, up_delay_s=60.0)
    world.run(300)
    world.traffic = Traffic(4 * PER_GROUP)
    assert world.run(30)[-1].binding is Binding.DELAY
    world.run(60)
    assert len(world.state.groups) > 1


def test_a_need_of_the_last_while_is_named_as_held() -> None:
    world = world_of(min_groups=1, down_delay_s=600.0)
    world.traffic = Traffic(5 * PER_GROUP)
    world.run(1800)
    world.traffic = Traffic(2 * PER_GROUP)
    assert world.run(540)[-1].binding is Binding.HOLD


def test_a_pool_where_starts_fail_is_named() -> None:
    world = world_of(min_groups=1)
    world.failing_pools = {"p"}
    decisions = world.run(200)
    assert Binding.BACKOFF in {d.binding for d in decisions}


def test_what_costs_nothing_is_started_for_a_load_and_not_without_one() -> None:
    free, dear = pool("free", 0.0, nodes=8), pool("dear", 1.0, nodes=8)
    options = (size_option(free), size_option(dear))
    world = World(token_config(*options, pools=(free, dear), usd_per_hour_budget=0.5))
    world.traffic = Traffic(2 * PER_GROUP)
    world.run(900)
    assert {r.spec.pool for r in world.state.groups} == {"free"}
    assert 2 <= len(world.serving) <= 4
    world.traffic = Traffic(0.0)
    world.run(1800)
    assert world.state.groups == ()


course = st.lists(
    st.tuples(
        st.floats(0.0, 14.0),
        st.sampled_from([30, 120, 600]),
        st.sampled_from([None, None, 4, 10]),
        st.sampled_from([None, None, 3.0, 9.0]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    course,
    st.sampled_from([None, 5.0, 11.0]),
    st.sampled_from([None, 20.0, 90.0]),
    st.integers(1, 6),
    st.integers(4, 24),
)
def test_no_start_is_ever_beyond_a_bound(
    course: list[tuple[float, int, int | None, float | None]],
    hourly: float | None,
    daily: float | None,
    high: int,
    live: int,
) -> None:
    world = world_of(NOON_S, usd_per_hour_budget=hourly, usd_per_day_budget=daily, max_groups=high)
    world.live = {"p": live}
    for load, seconds, workers, usd in course:
        world.traffic = Traffic(load * PER_GROUP)
        world.grant = Grant({} if workers is None else {"p": workers}, usd, "others have it")
        for _ in range(seconds // 10):
            decision = world.step(dt_s=10.0)
            if not any(action.spec for action in decision.actions):
                continue
            groups = [r for r in decision.state.groups if r.state is not GroupState.GONE]
            money = sum(r.spec.usd_per_hour for r in groups)
            held = sum(workers_of(r.spec.parallelism) for r in groups)
            assert len([r for r in groups if r.removed_at_s is None]) <= high
            assert money <= (hourly or 1e9) + 1e-3
            assert held <= live
            staying = [
                r for r in groups if r.removed_at_s is None and r.state is not GroupState.DRAINING
            ]
            assert sum(r.spec.usd_per_hour for r in staying) <= (usd or 1e9) + 1e-3
            assert sum(workers_of(r.spec.parallelism) for r in staying) <= (workers or 1e9)
    assert daily is None or world.state.spending.usd <= daily + 1e-6


def test_of_many_pools_without_room_the_cheapest_are_named() -> None:
    pools = [pool(f"p{usd}", float(usd), nodes=1) for usd in (5, 1, 4, 2, 3)]
    decision = World(config(*pools, min_groups=1)).step()
    assert decision.pending == (
        "pending: no room in pool p1 (1 of 2 workers free), "
        "no room in pool p2 (1 of 2 workers free), "
        "no room in pool p3 (1 of 2 workers free) and 2 more"
    )


def test_a_day_s_budget_that_just_suffices_starts_a_group_once() -> None:
    world = World(
        config(
            pool("only", 0.5, nodes=12),
            min_groups=1,
            drain_deadline_s=600.0,
            usd_per_day_budget=24.5,
        ),
        start_s=300.0,
        now_s=86_400.0 * 100 + 43_200.0,
    )
    world.run(600)
    decisions = []
    for _ in range(400):
        world.in_flight = {name: 12 for name in world.serving[:1]}
        decisions.append(world.step(dt_s=5.0))
    starts = [a for d in decisions for a in d.actions if a.kind is ActionKind.START]
    assert len(starts) <= 1
