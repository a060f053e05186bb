"""What is chosen among what there is and what can be had, and what is said to stand in the way."""

from dataclasses import replace

import pytest

from expertmesh.core.scaling.contract import Binding
from expertmesh.core.scaling.mix import Bounds, Need, Offer
from expertmesh.core.scaling.target import (
    Obstacle,
    Problem,
    Target,
    find_target,
    with_offers,
    with_workers,
    without_budget,
    without_max_groups,
)


def offer(name: str, capacity: float, usd: float, kept: int = 0, **more: object) -> Offer:
    plain = Offer(name, "p", capacity, usd, 0.1 * usd, usd, round(2 * capacity), kept)
    return replace(plain, **more)  # type: ignore[arg-type]


def problem(
    *offers: Offer,
    load: float = 0.0,
    held: float | None = None,
    low: int = 0,
    high: int = 9,
    workers: int = 99,
    usd: float | None = None,
    **more: object,
) -> Problem:
    plain = Problem(
        offers=offers,
        need=Need(load, short_usd=1e3),
        held_load=load if held is None else held,
        bounds=Bounds(low, high, {"p": workers}, usd),
        active=tuple(each.kept for each in offers),
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def lifts(of: Problem, offers: tuple[Offer, ...] | None = None) -> tuple[Obstacle, ...]:
    return (
        Obstacle(Binding.BACKOFF, with_offers(offers or of.offers)),
        Obstacle(Binding.GRANT, with_workers(of.bounds.workers)),
        Obstacle(Binding.BUDGET, without_budget),
        Obstacle(Binding.MAX_GROUPS, without_max_groups),
        Obstacle(Binding.ROOM, with_workers({"p": 1 << 30})),
    )


def target(of: Problem) -> Target:
    return find_target(of, lifts(of))


SMALL = offer("small", 1.0, 1.0)


def test_there_are_as_many_as_the_load_needs() -> None:
    found = target(problem(SMALL, load=2.5))
    assert (found.counts, found.kept, found.binding) == ({"small": 3}, {"small": 0}, Binding.LOAD)


def test_what_is_there_beyond_the_load_of_the_last_while_is_not_kept() -> None:
    found = target(problem(replace(SMALL, kept=4), load=1.5, held=1.5))
    assert (found.counts, found.kept, found.binding) == ({"small": 2}, {"small": 2}, Binding.LOAD)


def test_what_the_load_of_the_last_while_needs_is_held() -> None:
    found = target(problem(replace(SMALL, kept=4), load=1.5, held=2.7))
    assert (found.counts, found.kept, found.binding) == ({"small": 3}, {"small": 3}, Binding.HOLD)


def test_held_load_starts_nothing() -> None:
    found = target(problem(replace(SMALL, kept=2), load=1.5, held=5.0))
    assert (found.counts, found.kept) == ({"small": 2}, {"small": 2})


def test_the_dearest_are_let_go_first() -> None:
    cheap, dear = offer("cheap", 1.0, 1.0, 2), offer("dear", 1.0, 1.5, 2)
    assert target(problem(cheap, dear, load=3.0)).kept == {"cheap": 2, "dear": 1}


@pytest.mark.parametrize(("usd", "replaced"), [(1.0, False), (0.84, True), (0.88, False)])
def test_a_group_that_carries_its_load_is_replaced_only_when_it_is_worth_it(
    usd: float, replaced: bool
) -> None:
    """A start costs a tenth of a group, and it must be cheaper by a twentieth."""
    there, other = offer("there", 1.0, 1.0, 1), offer("other", 1.0, usd)
    found = target(problem(there, other, load=1.0))
    assert found.replaces is replaced
    assert found.counts["other"] == int(replaced)
    assert found.kept == {"there": 1, "other": 0}


def test_what_is_missing_is_no_replacement_and_need_not_be_worth_it() -> None:
    there, other = offer("there", 1.0, 1.0, 1), offer("other", 1.0, 0.97)
    found = target(problem(there, other, load=2.0))
    assert (found.counts, found.replaces) == ({"there": 1, "other": 1}, False)


@pytest.mark.parametrize(
    ("bounds", "binding"),
    [
        ({"high": 3}, Binding.MAX_GROUPS),
        ({"usd": 3.5}, Binding.BUDGET),
        ({"workers": 7}, Binding.ROOM),
    ],
)
def test_the_bound_that_stands_in_the_way_is_named(
    bounds: dict[str, float], binding: Binding
) -> None:
    found = target(problem(SMALL, load=5.0, **bounds))  # type: ignore[arg-type]
    assert (found.counts, found.binding) == ({"small": 3}, binding)


def test_pools_that_are_left_alone_are_named() -> None:
    held_back = problem(replace(SMALL, limit=0), load=5.0)
    assert find_target(held_back, lifts(held_back, (SMALL,))).binding is Binding.BACKOFF


def test_of_two_bounds_of_which_each_is_enough_one_is_named() -> None:
    found = target(problem(SMALL, load=5.0, high=3, workers=6))
    assert found.binding is Binding.ROOM


def test_a_minimum_that_cannot_be_had_is_said_so() -> None:
    assert target(problem(SMALL, low=3, workers=4)).binding is Binding.ROOM
    assert target(problem(SMALL, low=3, usd=2.5)).binding is Binding.BUDGET
    assert target(problem(low=1)).binding is Binding.ROOM


def test_a_shortage_that_is_not_worth_a_group_is_chosen_and_nothing_binds() -> None:
    cheap_miss = problem(SMALL, load=2.01, need=Need(2.01, short_usd=20.0))
    found = target(cheap_miss)
    assert found.mix.short == pytest.approx(0.01)
    assert (found.counts, found.binding) == ({"small": 2}, Binding.LOAD)


def test_the_minimum_binds_only_where_the_load_needs_less() -> None:
    assert target(problem(SMALL, load=1.0, low=2)).binding is Binding.MIN_GROUPS
    assert target(problem(SMALL, load=2.0, low=2)).binding is Binding.LOAD
    assert target(problem(SMALL, load=3.0, low=2)).binding is Binding.LOAD
    assert target(problem(SMALL)).binding is Binding.LOAD


def test_a_provider_that_takes_all_of_the_load_for_less_than_a_group_leaves_none() -> None:
    there = replace(SMALL, kept=1)
    found = target(problem(there, load=0.1, external_usd=5.0))
    assert (found.counts, found.kept, found.binding) == (
        {"small": 0},
        {"small": 0},
        Binding.EXTERNAL,
    )
    assert target(problem(there, load=0.5, external_usd=5.0)).counts == {"small": 1}


def test_what_is_held_counts_for_the_provider_too() -> None:
    found = target(problem(replace(SMALL, kept=1), load=0.1, held=0.5, external_usd=5.0))
    assert found.kept == {"small": 1}


def test_a_minimum_forbids_to_leave_it_all_to_a_provider() -> None:
    found = target(problem(SMALL, load=0.1, low=1, external_usd=5.0, may_be_empty=False))
    assert found.counts == {"small": 1}


def test_an_overflow_makes_fewer_groups_enough_and_a_mere_fallback_does_not() -> None:
    peak = problem(SMALL, load=2.2, external_usd=2.0)
    assert target(peak).counts == {"small": 3}
    overflow = target(replace(peak, overflows=True))
    assert (overflow.counts, overflow.binding) == ({"small": 2}, Binding.LOAD)


# Groups are started before those that they replace are released.


def test_a_replacement_that_does_not_fit_beside_what_is_there_is_not_begun() -> None:
    there, cheaper = offer("there", 1.0, 1.0, 2), offer("cheaper", 1.0, 0.5)
    for bounds in ({"high": 2}, {"usd": 2.4}, {"workers": 5}):
        found = target(problem(there, cheaper, load=2.0, **bounds))
        assert (found.counts, found.replaces) == ({"there": 2, "cheaper": 0}, False)
        assert found.binding is Binding.LOAD


def test_what_is_missing_is_added_where_the_cheapest_mix_cannot_be_reached() -> None:
    """Two large groups cost less than four small ones, but not even one fits the budget too."""
    small, large = offer("small", 1.0, 28.0, 3), offer("large", 2.0, 40.0)
    found = target(problem(small, large, load=4.0, usd=120.0))
    assert found.counts == {"small": 4, "large": 0}


def test_a_larger_group_that_would_be_the_last_one_allowed_is_not_waited_for() -> None:
    small, large = offer("small", 1.0, 28.0, 3), offer("large", 2.0, 40.0)
    found = target(problem(small, large, load=4.0, high=3))
    assert (found.counts, found.binding) == ({"small": 3, "large": 0}, Binding.MAX_GROUPS)
    assert found.mix.short == 1.0


def test_a_fall_of_the_load_is_followed_where_a_replacement_cannot_be() -> None:
    there, cheaper = offer("there", 1.0, 1.0, 3), offer("cheaper", 1.0, 0.5)
    found = target(problem(there, cheaper, load=1.0, high=3))
    assert found.kept == {"there": 1, "cheaper": 0}


def test_beyond_a_bound_that_was_lowered_there_is_what_fits() -> None:
    found = target(problem(replace(SMALL, kept=4), load=4.0, high=2))
    assert (found.counts, found.kept) == ({"small": 2}, {"small": 2})
