"""The policy measured by tokens: whole courses in a world whose groups really do what they do."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.scaling.world import (
    OUTPUT,
    PER_GROUP,
    Traffic,
    Truth,
    World,
    pool,
    size_option,
    token_config,
)

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import ActionKind, Binding, Decision

ONLY = "only/t1d2e2"
START_S = 20.0
HOLD_S = 120.0
"""Twice the planned start of 60 s."""


def of(decisions: list[Decision], kind: ActionKind) -> list[str]:
    return [a.group for decision in decisions for a in decision.actions if a.kind is kind]


def starts(decisions: list[Decision]) -> int:
    return len(of(decisions, ActionKind.START))


def settled(per_s: float, world: World | None = None, seconds: int = 1800) -> World:
    world = world or World(token_config(min_groups=1))
    world.run(60)
    world.traffic = Traffic(per_s)
    world.run(seconds)
    return world


def carried(groups: float, truth: Truth | None = None) -> float:
    """Requests a second that so many groups carry at a TPOT of 50 ms."""
    truth = truth or Truth()
    batch = (0.05 - truth.lone_tpot_s) / truth.per_request_s
    return groups * batch / 0.05 / OUTPUT


def test_the_worlds_groups_carry_what_is_said() -> None:
    assert carried(1.0) == pytest.approx(PER_GROUP)
    world = World(token_config(min_groups=1), start_s=5)
    world.run(30)
    world.traffic = Traffic(PER_GROUP)
    world.step()
    doing = world.observation(0).groups[0].doing
    assert doing is not None
    assert doing.running == 64
    assert doing.tpot_s == pytest.approx(0.05)


@pytest.mark.parametrize("load", [0.4, 1.0, 2.5, 4.0, 7.0])
def test_a_steady_load_has_the_groups_that_it_needs_and_the_stated_spare(load: float) -> None:
    world = settled(load * PER_GROUP)
    decision = world.step(dt_s=5.0)
    seen = decision.load
    assert seen.by_tokens
    assert seen.now == pytest.approx(load, rel=0.1)
    assert seen.needed == pytest.approx(seen.expected + seen.spare)
    assert 0 <= seen.spare <= 1.5 * math.sqrt(load)
    short_of_a_group = 0.1
    assert len(world.serving) in (
        math.ceil(seen.needed - short_of_a_group),
        math.ceil(seen.needed),
    )
    assert world.wait_s == 0.0
    before = world.state.groups
    assert {d.actions for d in world.run(1200)} == {()}
    assert world.state.groups == before


@pytest.mark.parametrize("slower", [0.6, 2.0])
def test_groups_that_are_not_as_planned_are_counted_as_what_they_do(slower: float) -> None:
    truth = Truth(slower * 0.03 / 64, places=96.0 / slower)
    world = World(token_config(min_groups=1), truths={ONLY: truth})
    settled(carried(4.0, truth), world)
    decision = world.step(dt_s=5.0)
    assert decision.load.now == pytest.approx(4.0, rel=0.15)
    assert 4 <= len(world.serving) <= 6
    assert world.state.learned[ONLY].seconds_ratio == pytest.approx(slower, rel=0.15)


def test_contexts_that_grow_are_followed_before_requests_wait() -> None:
    world = settled(carried(3.0))
    before = len(world.serving)
    slow = [1.0 + 0.02 * n for n in range(51)]
    for factor in slow:
        world.truths = {ONLY: Truth(factor * 0.03 / 64, places=96.0 / factor)}
        world.run(30)
        assert world.wait_s < 2.0
    world.run(600)
    assert len(world.serving) >= 2 * 3.0
    assert len(world.serving) > before


def test_rates_that_were_never_planned_are_learned() -> None:
    only = pool("only", 0.5, nodes=40)
    option = size_option(only, known=False)
    config = token_config(option, pools=(only,), min_groups=1)
    world = World(config)
    world.run(60)
    world.traffic = Traffic(0.3)
    first = world.run(300)
    assert not first[-1].load.by_tokens
    world.traffic = Traffic(carried(3.0))
    world.run(3000)
    decision = world.step(dt_s=5.0)
    assert decision.load.by_tokens
    assert decision.load.now == pytest.approx(3.0, rel=0.2)
    assert 3 <= len(world.serving) <= 5


def test_a_step_up_is_followed_within_a_moment_and_at_once_by_as_much_as_is_seen() -> None:
    world = settled(2.0 * PER_GROUP)
    there = len(world.serving)
    world.traffic = Traffic(6.0 * PER_GROUP)
    assert starts(world.run(10)) >= 1
    world.run(90)
    assert len(world.serving) >= 6 > there
    world.run(120)
    assert world.wait_s == 0.0


def test_a_queue_that_waits_too_long_means_overload_though_tokens_say_otherwise() -> None:
    world = settled(1.5 * PER_GROUP)
    decision = world.step(queued=0, dt_s=5.0)
    assert decision.load.now < decision.load.ready
    traffic = world.traffic
    assert traffic is not None
    world.backlog = 4.0 * traffic.per_s
    world.truths = {ONLY: Truth(places=30.0)}
    decision = world.step(dt_s=5.0)
    assert world.wait_s > 2.0
    assert decision.load.now > decision.load.ready
    assert starts([decision]) >= 1


@pytest.mark.parametrize("flag", ["serve_answers", "journal_writes", "settled", "gateways"])
def test_never_down_on_what_cannot_be_seen(flag: str) -> None:
    world = settled(5.0 * PER_GROUP)
    there = world.serving
    world.traffic = Traffic(0.2 * PER_GROUP)
    setattr(world, flag, () if flag == "gateways" else False)
    decisions = world.run(3600)
    assert world.serving == there
    assert of(decisions, ActionKind.DRAIN) == []
    assert decisions[-1].binding in (Binding.UNSEEN, Binding.LOAD)
    assert len(there) == decisions[-1].state.wanted
    setattr(world, flag, ("g1",) if flag == "gateways" else True)
    seen_again = world.run(round(2 * START_S) - 5)
    assert of(seen_again, ActionKind.DRAIN) == [], "blind time is no time of a lower need"
    world.run(1800)
    assert len(world.serving) < len(there)


def test_a_lower_need_is_followed_after_two_starts_and_not_before() -> None:
    world = settled(6.0 * PER_GROUP)
    hold_s = 2 * world.state.start_s[ONLY]
    assert hold_s == pytest.approx(2 * START_S, rel=0.3)
    there = len(world.serving)
    world.traffic = Traffic(2.0 * PER_GROUP)
    assert of(world.run(round(hold_s) - 5), ActionKind.DRAIN) == []
    assert len(world.serving) == there
    world.run(1200)
    assert len(world.serving) <= 4


def test_the_hold_is_as_the_manifest_says_where_it_says_so() -> None:
    world = settled(6.0 * PER_GROUP, World(token_config(min_groups=1, down_delay_s=400.0)))
    world.traffic = Traffic(2.0 * PER_GROUP)
    assert of(world.run(390), ActionKind.DRAIN) == []
    assert of(world.run(400), ActionKind.DRAIN) != []


@pytest.mark.parametrize("period_s", [20, 40, 60])
def test_a_load_that_swings_faster_than_the_hold_never_makes_it_alternate(period_s: int) -> None:
    world = settled(4.0 * PER_GROUP, World(token_config(min_groups=1, down_delay_s=120.0)))
    decisions: list[Decision] = []
    for n in range(round(4 * 3600 / period_s)):
        world.traffic = Traffic((1.0 if n % 2 else 5.0) * PER_GROUP)
        decisions += world.run(period_s)
    late = decisions[len(decisions) // 4 :]
    assert [d.actions for d in late if d.actions] == []


loads = st.lists(
    st.tuples(st.floats(0.0, 8.0), st.sampled_from([10, 30, 60, 120, 300])),
    min_size=1,
    max_size=12,
)


def lives(course: list[tuple[float, int]], world: World) -> list[tuple[float, Decision]]:
    seen = []
    for load, seconds in course:
        world.traffic = Traffic(load * PER_GROUP)
        for _ in range(seconds // 5):
            seen.append((world.now_s, world.step(dt_s=5.0)))
    return seen


@settings(max_examples=40, deadline=None)
@given(loads, st.integers(0, 2))
def test_a_group_that_was_started_is_not_released_within_the_hold(
    course: list[tuple[float, int]], low: int
) -> None:
    world = World(token_config(min_groups=low, down_delay_s=100.0))
    ready_s: dict[str, float] = {}
    idle_since_s: float | None = None
    for now_s, decision in lives([*course, (0.5, 600)], world):
        idle_since_s = decision.state.idle_since_s
        for step in decision.transitions:
            if step.after is GroupState.READY and step.before is GroupState.STARTING:
                ready_s[step.group] = now_s
        for group in of([decision], ActionKind.DRAIN):
            idle = idle_since_s is not None and now_s - idle_since_s >= 100.0
            assert now_s - ready_s[group] >= 100.0 or idle


@settings(max_examples=40, deadline=None)
@given(loads)
def test_starts_are_bounded_by_the_rises_of_the_need(course: list[tuple[float, int]]) -> None:
    """No group is started but for a need that is above what there is and is coming."""
    world = World(token_config(min_groups=1, down_delay_s=100.0))
    rises, need, started = 1.0, 1.0, 0
    for _, decision in lives(course, world):
        if decision.load.held > need:
            rises += math.ceil(decision.load.held) - math.floor(need)
        need = decision.load.held
        started += starts([decision])
        assert started <= rises + 1
        assert len({a.kind for a in decision.actions} & {ActionKind.START, ActionKind.DRAIN}) <= 1


# Zero


def test_it_goes_to_zero_only_after_having_been_idle() -> None:
    world = settled(0.5 * PER_GROUP, World(token_config()), seconds=600)
    world.traffic = Traffic(0.0)
    idle_s = world.now_s
    while world.serving:
        world.step(dt_s=5.0)
        assert world.now_s - idle_s < 3600
    assert world.now_s - idle_s >= 2 * START_S
    assert world.run(600)[-1].target == {}


def test_a_model_that_is_asked_all_the_time_is_held_longer_than_one_that_is_not() -> None:
    def released_s(work_s: int) -> float:
        world = World(token_config())
        world.run(3600)
        world.traffic = Traffic(1.0)
        world.run(work_s)
        world.traffic = Traffic(0.0)
        at_s = world.now_s
        while world.serving and world.now_s < at_s + 3600:
            world.step(dt_s=5.0)
        return world.now_s - at_s

    once, always = released_s(40), released_s(3600)
    assert 2 * START_S <= once < always < 600


def test_the_wake_from_zero_is_quick_and_cheap() -> None:
    cheap, quick = pool("cheap", 0.5, nodes=9), pool("quick", 0.6, nodes=9)
    slow = size_option(cheap, start_s=600.0)
    fast = size_option(quick, start_s=30.0)
    world = World(token_config(slow, fast, pools=(cheap, quick)))
    woken = world.step(queued=1)
    assert [a.spec.pool for a in woken.actions if a.spec] == ["quick"]
    both = token_config(replace(slow, start_s=30.0), fast, pools=(cheap, quick))
    woken = World(both).step(queued=1)
    assert [a.spec.pool for a in woken.actions if a.spec] == ["cheap"]


def woken(queued: int, max_wait_s: float) -> World:
    """A model whose rates are known, at zero, and then as many requests at once."""
    config = replace(token_config(), max_wait_s=max_wait_s)
    first = replace(token_config(min_groups=1), max_wait_s=max_wait_s)
    world = settled(0.3 * PER_GROUP, World(first), 600)
    world.config = config
    world.traffic = Traffic(0.0)
    world.run(3600)
    assert world.state.groups == ()
    world.backlog, world.all_came_at_s = float(queued), world.now_s
    return world


def test_a_long_queue_that_the_first_group_works_off_in_time_needs_no_other() -> None:
    """A group works off 500 requests in 100 s; a start takes 20 s."""
    world = woken(queued=500, max_wait_s=300.0)
    decisions = world.run(300)
    assert starts(decisions) == 1
    assert world.backlog == 0.0
    assert decisions[-1].load.by_tokens


def test_a_queue_that_one_group_cannot_work_off_in_time_has_more() -> None:
    world = woken(queued=4000, max_wait_s=300.0)
    assert 3 <= starts(world.run(20)) <= 5
    hurried = woken(queued=500, max_wait_s=30.0)
    assert starts(hurried.run(20)) >= 2


def test_a_load_that_came_with_the_wake_has_the_groups_that_it_needs() -> None:
    world = woken(queued=500, max_wait_s=300.0)
    world.all_came_at_s = None
    world.traffic = Traffic(2.5 * PER_GROUP)
    world.run(300)
    assert world.backlog == 0.0
    assert 3 <= len(world.serving) <= 6


def test_it_does_not_go_to_zero_while_its_first_group_is_still_loading() -> None:
    world = World(token_config(), start_s=600.0)
    world.step(queued=1)
    decisions = [world.step(queued=1, dt_s=5.0) for _ in range(110)]
    assert of(decisions, ActionKind.REMOVE) == []


# Sizes


P = pool("p", 1.0, nodes=100)


def sized(small_usd: float, large_usd: float, **changes: object) -> World:
    small = replace(size_option(P, 1), usd_per_hour=small_usd)
    large = replace(size_option(P, 4), usd_per_hour=large_usd)
    return World(token_config(small, large, pools=(P,), **changes))


def running(world: World) -> dict[int, int]:
    sizes = [r.spec.parallelism.data for r in world.state.groups if r.state is GroupState.READY]
    return {size: sizes.count(size) for size in sorted(set(sizes))}


def test_the_size_that_is_cheapest_for_the_load_is_chosen() -> None:
    low, high = sized(10.0, 30.0, min_groups=1), sized(10.0, 30.0, min_groups=1)
    assert running(settled(0.3 * PER_GROUP, low)) == {2: 1}
    assert 8 in running(settled(10.0 * PER_GROUP, high))
    dear = sized(10.0, 45.0, min_groups=1)
    assert set(running(settled(7.0 * PER_GROUP, dear))) == {2}


def test_a_mix_is_cheaper_than_one_size() -> None:
    world = settled(7.6 * PER_GROUP, sized(10.0, 36.0, min_groups=1), seconds=5400)
    decision = world.step(dt_s=5.0)
    capacity = decision.load.ready
    cost = sum(r.spec.usd_per_hour for r in world.state.groups)
    assert decision.load.needed - 0.1 <= capacity <= decision.load.held + 2.0
    assert cost < 10.0 * math.ceil(decision.load.held)


def test_of_a_mix_of_sizes_no_number_of_groups_is_said_to_be_needed() -> None:
    world = settled(7.6 * PER_GROUP, sized(10.0, 36.0, min_groups=1, max_groups=2), seconds=1800)
    decision = world.step(dt_s=5.0)
    assert "as much as 1" in decision.reason
    assert "groups of p/t1d2e2" in decision.reason
    assert "with max" not in decision.reason
    assert "groups needed" not in decision.reason
    short = settled(20 * PER_GROUP, sized(10.0, 36.0, min_groups=1, max_groups=2), seconds=1800)
    decision = short.step(dt_s=5.0)
    assert decision.binding is Binding.MAX_GROUPS
    assert "and max 2 allows 2 groups" in decision.reason


def test_what_serves_is_replaced_only_when_that_is_worth_it() -> None:
    world = settled(3.2 * PER_GROUP, sized(10.0, 100.0, min_groups=1))
    small = running(world)
    assert set(small) == {2}
    hardly = (
        replace(o, usd_per_hour=p) for o, p in zip(world.config.options, (10, 38), strict=True)
    )
    world.config = replace(world.config, options=tuple(hardly))
    assert starts(world.run(1200)) == 0
    far = (replace(o, usd_per_hour=p) for o, p in zip(world.config.options, (10, 15), strict=True))
    world.config = replace(world.config, options=tuple(far))
    decisions = world.run(1800)
    assert starts(decisions) >= 1
    assert running(world)[8] == 1
    assert running(world).get(2, 0) <= 2
    served = min(d.load.ready for d in decisions)
    assert served >= 3.2, "the old ones stay until the new one is ready"


# Disturbances


@pytest.mark.parametrize("jump_s", [-7200.0, -90.0, 90.0, 7200.0, 86_400.0])
def test_a_clock_that_jumps_moves_nothing(jump_s: float) -> None:
    world = settled(4.0 * PER_GROUP, World(token_config(min_groups=1), now_s=1e6))
    there = world.serving
    world.now_s += jump_s
    for run in world.running.values():
        run.ready_at_s = -math.inf
    decisions = world.run(900)
    assert world.serving == there
    assert [d.actions for d in decisions if d.actions] == []
    for decision in decisions:
        assert math.isfinite(decision.load.needed)
        assert decision.wake_at_s >= (decision.state.seen_at_s or 0.0)


def test_after_a_clock_was_set_back_a_lower_need_is_still_followed() -> None:
    world = settled(6.0 * PER_GROUP, World(token_config(min_groups=1), now_s=1e6))
    world.now_s -= 7200.0
    for run in world.running.values():
        run.ready_at_s = -math.inf
    world.traffic = Traffic(1.0 * PER_GROUP)
    world.run(9000)
    assert len(world.serving) <= 3


def test_options_that_vanish_are_drained_without_a_shortage() -> None:
    old, new = pool("old", 0.5, nodes=40), pool("new", 0.5, nodes=40)
    before = token_config(size_option(old), pools=(old,), min_groups=1)
    world = settled(3.0 * PER_GROUP, World(before))
    count = len(world.serving)
    world.config = token_config(size_option(new), pools=(old, new), min_groups=1)
    decisions = world.run(1800)
    assert all(d.load.ready >= 3.0 - 1e-6 for d in decisions)
    assert world.wait_s == 0.0
    assert {r.spec.pool for r in world.state.groups} == {"new"}
    assert count - 1 <= len(world.serving) <= count + 1


def test_an_option_that_vanishes_while_its_groups_start_is_given_up() -> None:
    old, new = pool("old", 0.5, nodes=40), pool("new", 0.5, nodes=40)
    world = World(token_config(size_option(old), pools=(old,), min_groups=2), start_s=300.0)
    world.run(20)
    world.config = token_config(size_option(new), pools=(new,), min_groups=2)
    world.start_s = 20.0
    world.run(900)
    assert {r.spec.pool for r in world.state.groups} == {"new"}
    assert len(world.serving) == 2


def test_the_reason_says_the_numbers() -> None:
    world = settled(3.0 * PER_GROUP)
    reason = world.step(dt_s=5.0).reason
    assert "15 requests/s of 100 + 256 tokens and 0 queued are a load of 3.0" in reason
    assert "needed; " in reason
