import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.core.domain.fleet import GroupState, Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.errors import ManifestError
from expertmesh.simulator.fleet import Change, Fleet, Measured
from expertmesh.simulator.policy import Drain, Recall, Start
from expertmesh.simulator.scenario import (
    Availability,
    Scenario,
    SimulatedOption,
    StartTime,
    Victims,
)
from expertmesh.simulator.service_time import ServiceTime

ENGINE = ServiceTime(0.01, 1e-5, 1e-8, 2_000_000, 1024, 8192)
STARTING, READY, DRAINING, LOST, GONE = GroupState


def option(pool: str = "od", usd: float = 36.0, **changes: object) -> SimulatedOption:
    told = GroupOption(pool, Parallelism(1, 8, 8), usd, GroupRates(400), 100)
    base = SimulatedOption(told, ENGINE, StartTime(100, 0.0), 1, Market.ON_DEMAND, 4)
    return replace(base, **changes)  # type: ignore[arg-type]


def scenario(*options: SimulatedOption, **changes: object) -> Scenario:
    base = Scenario("s", options or (option(),), Slo(2.0, 0.05), 30)
    return replace(base, **changes)  # type: ignore[arg-type]


def spot(at_s: tuple[float, ...], there: tuple[int, ...], **changes: object) -> SimulatedOption:
    zone = Availability(at_s, there, notice_s=120, victims=Victims.OLDEST)
    return option("spot", 12.0, **{"availability": zone, "market": Market.SPOT, **changes})


def states(fleet: Fleet) -> dict[str, GroupState]:
    return {group.name: group.state for group in fleet.groups}


def seen(fleet: Fleet, until_s: float) -> list[tuple[float, str, str]]:
    return [(e.at_s, e.change.value, e.group) for e in fleet.advance(until_s)]


# Starts


def test_a_start_is_ready_after_its_time_and_costs_from_the_asking() -> None:
    fleet = Fleet(scenario())
    assert fleet.apply([Start(0)], 10.0) == 0
    assert states(fleet) == {"em-s-od-1": STARTING}
    assert fleet.next_event_s() == 110.0
    assert fleet.advance(109.9) == ()
    assert seen(fleet, 200.0) == [(110.0, "ready", "em-s-od-1")]
    assert states(fleet) == {"em-s-od-1": READY}
    assert fleet.next_event_s() == math.inf
    assert (fleet.billed_s(210.0), fleet.usd(210.0)) == ((200,), (Fraction(2),))
    assert fleet.usd_per_hour == 36.0


def test_a_start_takes_as_long_as_its_slowest_node() -> None:
    def times(nodes: int) -> np.ndarray:
        wide = option(nodes=nodes, max_groups=3000, start=StartTime(100, 0.3))
        fleet = Fleet(scenario(wide))
        for _ in range(2000):
            fleet.start(0, 0.0)
        return np.array([event.at_s for event in fleet.advance(1e6)])

    draws = np.random.default_rng(1).lognormal(np.log(100), 0.3, (100_000, 4))
    assert times(1).mean() == pytest.approx(draws[:, 0].mean(), rel=0.03)
    assert times(4).mean() == pytest.approx(draws.max(axis=1).mean(), rel=0.03)


def test_the_nth_start_of_an_option_is_as_slow_whatever_happens_elsewhere() -> None:
    mixed = scenario(option(start=StartTime(100, 0.4)), option("b", start=StartTime(50, 0.4)))
    alone, busy = Fleet(mixed), Fleet(mixed)
    alone.apply([Start(0), Start(0)], 0.0)
    busy.apply([Start(1), Start(0), Start(1), Start(0)], 0.0)
    own = [event.at_s for event in alone.advance(1e6)]
    option_of = {group.name: group.option for group in busy.groups}
    assert own == [event.at_s for event in busy.advance(1e6) if option_of[event.group] == 0]
    other_seed = Fleet(replace(mixed, seed=2))
    other_seed.apply([Start(0), Start(0)], 0.0)
    assert own != [event.at_s for event in other_seed.advance(1e6)]


def test_a_failed_start_is_noticed_when_it_should_be_ready_and_has_cost_till_then() -> None:
    fleet = Fleet(scenario(option(start=StartTime(100, 0.0, 1.0))))
    fleet.start(0, 0.0)
    assert seen(fleet, 105.0) == [(100.0, "failed", "em-s-od-1")]
    (view,) = fleet.views(105.0, {})
    assert (view.state, view.since_s) == (LOST, 100.0)
    assert fleet.views(121.0, {}) == ()
    assert fleet.billed_s(500.0) == (100,)
    counts = fleet.counts(500.0)
    assert (counts.starts, counts.failed_starts, counts.wasted_starts, counts.lost) == (1, 1, 0, 0)


def test_a_start_without_room_is_refused() -> None:
    fleet = Fleet(scenario(option(max_groups=1)))
    assert fleet.apply([Start(0), Start(0), Start(7), Drain("no"), Recall("no")], 0.0) == 4
    assert fleet.counts(0.0).refused_moves == 4
    assert fleet.room(0.0) == (0,)


def test_initial_groups_are_ready_and_are_no_starts() -> None:
    fleet = Fleet(scenario(initial_groups=(2,)))
    assert set(states(fleet).values()) == {READY}
    assert fleet.counts(9999.0).starts == 0
    with pytest.raises(ManifestError, match="no room for 5 initial groups of od/t1d8e8"):
        Fleet(scenario(initial_groups=(5,)))


# Drains


def test_a_drained_group_costs_until_it_is_released() -> None:
    fleet = Fleet(scenario(initial_groups=(1,)))
    fleet.apply([Drain("em-s-od-1")], 100.0)
    assert states(fleet) == {"em-s-od-1": DRAINING}
    fleet.release("em-s-od-1", 150.5)
    assert states(fleet) == {}
    assert fleet.billed_s(1000.0) == (151,)
    assert fleet.usd_per_hour == 0
    assert fleet.views(151.0, {}) == ()


def test_a_ready_group_cannot_be_released() -> None:
    fleet = Fleet(scenario(initial_groups=(1,)))
    with pytest.raises(ValueError, match="em-s-od-1 is ready: only a draining group"):
        fleet.release("em-s-od-1", 1.0)


def test_a_drain_that_takes_too_long_ends_at_its_deadline() -> None:
    fleet = Fleet(scenario(initial_groups=(1,), drain_deadline_s=60))
    fleet.drain("em-s-od-1", 10.0)
    assert not fleet.drain("em-s-od-1", 20.0)
    assert seen(fleet, 100.0) == [(70.0, "deadline", "em-s-od-1")]
    assert (fleet.counts(100.0).deadlines, fleet.billed_s(100.0)) == (1, (70,))


def test_a_recalled_group_has_no_deadline_until_it_drains_again() -> None:
    fleet = Fleet(scenario(initial_groups=(1,), drain_deadline_s=60))
    fleet.drain("em-s-od-1", 0.0)
    assert fleet.recall("em-s-od-1", 30.0)
    assert not fleet.recall("em-s-od-1", 31.0)
    assert seen(fleet, 65.0) == []
    fleet.drain("em-s-od-1", 66.0)
    fleet.recall("em-s-od-1", 70.0)
    fleet.drain("em-s-od-1", 80.0)
    assert seen(fleet, 200.0) == [(140.0, "deadline", "em-s-od-1")]


def test_draining_a_start_ends_it_at_once() -> None:
    fleet = Fleet(scenario())
    fleet.start(0, 0.0)
    fleet.drain("em-s-od-1", 40.0)
    assert seen(fleet, 200.0) == []
    counts = fleet.counts(200.0)
    assert (counts.cancelled, counts.wasted_starts, fleet.billed_s(200.0)) == (1, 1, (40,))


# Wasted starts


def noted(fleet: Fleet, *loads: float, waiting: bool = False, every_s: float = 100.0) -> Fleet:
    """The loads follow one another in groups of the first option."""
    for step, load in enumerate(loads):
        fleet.advance(step * every_s)
        fleet.note_need(step * every_s, [load, load / 2], waiting=waiting)
    return fleet


def test_a_start_that_older_groups_could_do_without_is_wasted() -> None:
    def wasted(*loads: float, count: int = 1, waiting: bool = False, minimum: int = 0) -> int:
        fleet = Fleet(scenario(initial_groups=(1,), min_groups=minimum))
        fleet.apply([Start(0)] * count, 0.0)
        noted(fleet, *loads, waiting=waiting)
        return fleet.counts((len(loads) - 1) * 100.0).wasted_starts

    assert wasted(*[0.9] * 9) == 1
    assert wasted(*[0.9] * 4, 1.1, *[0.9] * 4) == 0
    # Of two that come together for one, the second is too many.
    assert wasted(*[0.9] * 4, 1.1, *[0.9] * 4, count=2) == 1
    assert wasted(*[0.9] * 4, 2.1, *[0.9] * 4, count=2) == 0
    assert wasted(*[0.9] * 9, waiting=True) == 0
    assert wasted(*[0.9] * 9, minimum=2) == 0
    assert wasted(*[0.0] * 9) == 1
    # Too late to speak for it, and too young to speak against it.
    assert wasted(*[0.9] * 9, 1.1) == 1
    assert wasted(*[0.9] * 7) == 0


def test_a_start_that_is_drained_early_is_judged_by_what_came_before() -> None:
    fleet = Fleet(scenario(initial_groups=(1,)))
    fleet.start(0, 0.0)
    noted(fleet, 0.9, 0.9, 0.9)
    fleet.drain("em-s-od-2", 200.0)
    fleet.note_need(210.0, [1.5], waiting=False)
    assert fleet.counts(210.0).wasted_starts == 1


def test_larger_groups_carry_more() -> None:
    two_sizes = scenario(option(), option("big"), initial_groups=(0, 1))
    fleet = Fleet(two_sizes)
    fleet.start(0, 0.0)
    # 1.8 small ones are 0.9 of the large one that is there.
    assert noted(fleet, *[1.8] * 9).counts(800.0).wasted_starts == 1


# Spot


def test_lost_nodes_take_the_oldest_groups_after_a_notice() -> None:
    fleet = Fleet(scenario(spot((0.0, 1000.0), (3, 1)), initial_groups=(3,)))
    assert seen(fleet, 879.0) == []
    assert fleet.notices() == {}
    assert seen(fleet, 880.0) == [(880.0, "notice", f"em-s-spot-{n}") for n in (1, 2)]
    assert fleet.notices() == {"em-s-spot-1": 1000.0, "em-s-spot-2": 1000.0}
    assert seen(fleet, 1000.0) == [(1000.0, "lost", f"em-s-spot-{n}") for n in (1, 2)]
    assert list(states(fleet)) == ["em-s-spot-3"]
    assert [v.state for v in fleet.views(1001.0, {})] == [READY, LOST, LOST]
    assert fleet.counts(1001.0).lost == 2
    assert fleet.billed_s(2000.0) == (4000,)


def test_the_same_seed_loses_the_same_groups() -> None:
    def lost(seed: int) -> list[str]:
        zone = Availability((0.0, 500.0), (8, 3))
        eight = spot((), (), availability=zone, max_groups=8)
        fleet = Fleet(scenario(eight, initial_groups=(8,), seed=seed))
        return [event.group for event in fleet.advance(500.0) if event.change is Change.LOST]

    assert lost(1) == lost(1)
    assert len(lost(1)) == 5
    assert len({tuple(lost(seed)) for seed in range(5)}) > 1


def test_nodes_that_will_be_taken_are_not_offered() -> None:
    fleet = Fleet(scenario(spot((0.0, 1000.0, 2000.0), (3, 1, 4)), initial_groups=(1,)))
    rooms = {at_s: fleet.room(at_s)[0] for at_s in (0.0, 879.0, 880.0, 1000.0, 1999.0, 2000.0)}
    assert rooms == {0.0: 2, 879.0: 2, 880.0: 0, 1000.0: 0, 1999.0: 0, 2000.0: 3}


def test_what_a_zone_lost_before_the_run_is_over() -> None:
    fleet = Fleet(scenario(spot((-500.0, -50.0, -10.0, 90.0), (4, 0, 4, 4)), initial_groups=(4,)))
    assert seen(fleet, 1000.0) == []


def test_a_group_that_drains_in_time_is_not_lost() -> None:
    fleet = Fleet(scenario(spot((0.0, 1000.0), (2, 1)), initial_groups=(2,)))
    fleet.advance(880.0)
    fleet.drain("em-s-spot-1", 890.0)
    fleet.release("em-s-spot-1", 950.0)
    assert seen(fleet, 1000.0) == []
    assert list(states(fleet)) == ["em-s-spot-2"]


def test_a_start_is_lost_with_its_nodes_and_is_no_failed_start() -> None:
    slow = spot((0.0, 200.0), (1, 0), start=StartTime(500, 0.0, 1.0))
    fleet = Fleet(scenario(slow))
    fleet.start(0, 0.0)
    assert [event.change for event in fleet.advance(1000.0)] == [Change.NOTICE, Change.LOST]
    counts = fleet.counts(1000.0)
    assert (counts.lost, counts.failed_starts, counts.cancelled) == (1, 0, 0)


def test_a_group_of_several_nodes_goes_as_a_whole() -> None:
    fleet = Fleet(scenario(spot((0.0, 500.0), (8, 7), nodes=4, max_groups=2), initial_groups=(2,)))
    fleet.advance(500.0)
    assert list(states(fleet)) == ["em-s-spot-2"]
    assert fleet.room(500.0) == (0,)


def test_overlapping_notices_take_what_each_of_them_must() -> None:
    fleet = Fleet(scenario(spot((0.0, 500.0, 560.0), (4, 3, 1)), initial_groups=(4,)))
    assert [e.group for e in fleet.advance(440.0)] == [f"em-s-spot-{n}" for n in (1, 2, 3)]
    assert seen(fleet, 500.0) == [(500.0, "lost", "em-s-spot-1")]
    assert [g for _, _, g in seen(fleet, 560.0)] == ["em-s-spot-2", "em-s-spot-3"]


def test_options_of_one_pool_share_its_nodes() -> None:
    small, large = option(max_groups=8), option(nodes=4, max_groups=2)
    fleet = Fleet(scenario(small, large))
    assert fleet.room(0.0) == (8, 2)
    fleet.start(0, 0.0)
    assert fleet.room(0.0) == (7, 1)


def test_options_of_one_pool_must_agree_on_its_nodes() -> None:
    with pytest.raises(ManifestError, match="options of pool spot differ in availability"):
        Fleet(scenario(spot((0.0,), (3,)), spot((0.0,), (4,))))


@pytest.mark.parametrize(
    ("at_s", "nodes"), [((), ()), ((0.0, 0.0), (1, 2)), ((0.0, 10.0), (1,)), ((5.0, 1.0), (1, 2))]
)
def test_a_zone_that_makes_no_sense_is_refused(
    at_s: tuple[float, ...], nodes: tuple[int, ...]
) -> None:
    with pytest.raises(ManifestError, match="availability of pool spot"):
        Fleet(scenario(spot(at_s, nodes)))


# Money, and everything at once


def test_time_over_budget_is_counted_to_the_second() -> None:
    fleet = Fleet(scenario(initial_groups=(2,), budget_usd_per_hour=72.0))
    fleet.start(0, 100.0)
    assert fleet.over_budget_s(150.0) == 50.0
    fleet.drain("em-s-od-1", 160.0)
    fleet.release("em-s-od-1", 175.0)
    assert fleet.over_budget_s(1000.0) == 75.0


def test_prices_are_taken_as_they_are_written() -> None:
    fleet = Fleet(scenario(option(usd=0.1), initial_groups=(1,)))
    assert fleet.usd(3600.0) == (Fraction(1, 10),)


def test_views_carry_what_was_measured() -> None:
    fleet = Fleet(scenario(initial_groups=(2,)))
    one, two = fleet.views(0.0, {"em-s-od-1": Measured(3.0, 1.0, 0.5, 10.0, 20.0, 0.3, 0.02)})
    assert (one.in_flight, one.waiting, one.kv_usage, one.ttft_s, one.tpot_s) == (
        3.0,
        1.0,
        0.5,
        0.3,
        0.02,
    )
    assert (two.in_flight, two.ttft_s) == (0.0, None)


MOVES = st.lists(
    st.tuples(
        st.floats(0, 200),
        st.sampled_from(["start0", "start1", "drain", "recall"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(0, 99))
def test_nodes_money_and_counts_add_up_in_any_history(
    moves: list[tuple[float, str, int]], seed: int
) -> None:
    zone = Availability((0.0, 400.0, 700.0, 1500.0, 2100.0), (4, 1, 3, 0, 4))
    flaky = StartTime(90, 0.5, 0.3)
    options = (option(start=flaky), spot((), (), availability=zone, start=flaky))
    fleet = Fleet(scenario(*options, seed=seed, drain_deadline_s=50))
    now_s = 0.0
    ever: set[str] = set()
    for step_s, what, which in moves:
        now_s += step_s
        fleet.advance(now_s)
        names = [group.name for group in fleet.groups]
        target = names[which % len(names)] if names else "none"
        match what:
            case "drain":
                fleet.apply([Drain(target)], now_s)
            case "recall":
                fleet.apply([Recall(target)], now_s)
            case _:
                fleet.apply([Start(int(what[-1]))], now_s)
        fleet.advance(now_s)
        ever |= {group.name for group in fleet.groups}
        spot_groups = [group for group in fleet.groups if group.option == 1]
        nodes = zone.nodes[int(np.searchsorted(zone.at_s, now_s, side="right")) - 1]
        assert len(spot_groups) <= nodes
        assert sum(group.option == 0 for group in fleet.groups) <= 4
        assert all(room >= 0 for room in fleet.room(now_s))
        rate = sum(options[group.option].option.usd_per_hour for group in fleet.groups)
        assert fleet.usd_per_hour == pytest.approx(rate)
    end_s = now_s + 5000
    fleet.advance(end_s)
    counts = fleet.counts(end_s)
    assert counts.starts >= len(ever)
    assert counts.cancelled + counts.failed_starts + counts.lost <= counts.starts
    assert counts.wasted_starts <= counts.starts - counts.failed_starts
    billed = fleet.billed_s(end_s)
    assert fleet.usd(end_s) == (Fraction(36) * billed[0] / 3600, Fraction(12) * billed[1] / 3600)
