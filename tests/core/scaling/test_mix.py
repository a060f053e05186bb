"""The integer program against all mixes counted one by one."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.core.scaling.mix import Bounds, Mix, Need, Offer, cheapest, fits, priced

CLOSE = 0.002
ALIKE = 0.01


def churn(offers: list[Offer], counts: tuple[int, ...]) -> float:
    pairs = zip(offers, counts, strict=True)
    return sum(ALIKE * abs(n - offer.kept) * offer.usd for offer, n in pairs)


def all_within(offers: list[Offer], bounds: Bounds) -> list[tuple[int, ...]]:
    free = Bounds(0, bounds.max_groups, bounds.workers, bounds.usd_per_hour)
    most = [range(bounds.max_groups + 1)] * len(offers)
    return [counts for counts in itertools.product(*most) if fits(offers, free, counts)]


def best(offers: list[Offer], need: Need, bounds: Bounds) -> tuple[int, float]:
    return min(
        (
            max(0, bounds.min_groups - sum(counts)),
            priced(offers, need, counts).usd + churn(offers, counts),
        )
        for counts in all_within(offers, bounds)
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Offer], Need, Bounds]:
    share = st.floats(0.2, 1.5)
    offers = []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([1, 2, 4]))
        usd = size * draw(share)
        offers.append(
            Offer(
                option=f"o{index}",
                pool=f"p{index % 3}",
                capacity=size * draw(st.floats(0.7, 1.3)),
                usd=usd,
                start_usd=usd * draw(st.floats(0.0, 0.6)),
                usd_per_hour=usd * draw(st.sampled_from([0.0, 2.0, 3.0])),
                workers=size,
                kept=draw(st.integers(0, 3)),
                limit=draw(st.sampled_from([None, None, 0, 1, 3])),
                spot_zone=draw(st.sampled_from([None, None, "a", "b"])),
            )
        )
    need = Need(
        load=draw(st.one_of(st.just(0.0), st.floats(0.01, 8.0))),
        cover=draw(st.one_of(st.just(0.0), st.floats(0.1, 8.0))),
        short_usd=draw(st.sampled_from([0.4, 1.2, 50.0, 1e4])),
        uncovered_usd=draw(st.sampled_from([0.0, 0.3, 5.0])),
    )
    workers = {f"p{index}": draw(st.sampled_from([0, 3, 4, 8])) for index in range(3)}
    low = draw(st.integers(0, 3))
    budget = draw(st.sampled_from([None, None, 2.0, 9.0]))
    return offers, need, Bounds(low, draw(st.integers(max(1, low), 5)), workers, budget)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_it_is_as_cheap_as_the_best_of_all_mixes(problem: tuple[list[Offer], Need, Bounds]) -> None:
    offers, need, bounds = problem
    found = cheapest(offers, need, bounds)
    missing, usd = best(offers, need, bounds)
    assert max(0, bounds.min_groups - found.groups) == missing
    assert found.usd + churn(offers, found.counts) <= usd / (1 - CLOSE) + 1e-6


@settings(max_examples=200, deadline=None)
@given(problems())
def test_bounds_are_kept_and_the_price_is_that_of_the_counts(
    problem: tuple[list[Offer], Need, Bounds],
) -> None:
    offers, need, bounds = problem
    found = cheapest(offers, need, bounds)
    least = min(bounds.min_groups, found.groups)
    kept = Bounds(least, bounds.max_groups, bounds.workers, bounds.usd_per_hour)
    assert fits(offers, kept, found.counts)
    assert found == priced(offers, need, found.counts)
    assert found == cheapest(offers, need, bounds)


@settings(max_examples=200, deadline=None)
@given(problems(), st.permutations(range(4)))
def test_the_order_of_the_offers_does_not_change_the_price(
    problem: tuple[list[Offer], Need, Bounds], order: list[int]
) -> None:
    offers, need, bounds = problem
    turned = [offers[index] for index in order if index < len(offers)]

    def cost(asked: list[Offer]) -> float:
        found = cheapest(asked, need, bounds)
        return found.usd + churn(asked, found.counts)

    assert cost(turned) == pytest.approx(cost(offers), rel=2 * CLOSE, abs=1e-6)


SMALL = Offer("small", "p", 1.0, usd=1.0, start_usd=0.3, usd_per_hour=2.0, workers=2)
LARGE = Offer("large", "p", 4.0, usd=3.0, start_usd=0.9, usd_per_hour=6.0, workers=8)
DEAR = Need(3.0, short_usd=1e3)


def bounds(low: int = 0, high: int = 9, workers: int = 99, usd: float | None = None) -> Bounds:
    return Bounds(low, high, {"p": workers}, usd)


def counts(need: Need, within: Bounds, *offers: Offer) -> tuple[int, ...]:
    return cheapest(offers, need, within).counts


def test_a_mixed_load_takes_both_sizes() -> None:
    assert counts(Need(9.0, short_usd=1e3), bounds(), SMALL, LARGE) == (1, 2)


def test_nothing_to_have_is_all_of_the_load_short() -> None:
    assert cheapest([], DEAR, bounds()) == Mix((), 0.0, 3.0, 0.0, 3e3, 0.0)
    assert cheapest([SMALL], DEAR, Bounds(2, 4, {})).short == 3.0


def test_nothing_to_carry_is_no_group_but_the_minimum() -> None:
    assert counts(Need(0.0, short_usd=math.inf), bounds(), SMALL, LARGE) == (0, 0)
    assert counts(Need(0.0, short_usd=math.inf), bounds(low=2), SMALL, LARGE) == (2, 0)


def test_the_minimum_is_undercut_only_for_want_of_room_or_money() -> None:
    assert counts(Need(0.0, short_usd=math.inf), bounds(low=3, workers=5), SMALL) == (2,)
    assert counts(Need(0.0, short_usd=math.inf), bounds(low=3, usd=3.9), SMALL) == (1,)
    assert counts(Need(0.0, short_usd=math.inf), bounds(low=2, workers=8), SMALL, LARGE) == (2, 0)


def test_room_money_number_and_limit_each_bind() -> None:
    need = Need(8.0, short_usd=1e3)
    assert counts(need, bounds(workers=7), SMALL) == (3,)
    assert counts(need, bounds(usd=5.9), SMALL) == (2,)
    assert counts(need, bounds(usd=6.0), SMALL) == (3,)
    assert counts(need, bounds(high=1), SMALL, LARGE) == (0, 1)
    limited = Offer("x", "p", 1.0, 1.0, 0.0, 2.0, 2, limit=1)
    assert counts(need, bounds(), limited) == (1,)


def test_a_shortage_that_costs_less_than_a_group_is_borne() -> None:
    assert counts(Need(1.2, short_usd=4.0), bounds(), SMALL) == (1,)
    assert counts(Need(1.5, short_usd=4.0), bounds(), SMALL) == (2,)


def test_what_is_there_needs_no_start() -> None:
    kept = Offer("kept", "p", 1.0, usd=1.2, start_usd=0.5, usd_per_hour=2.4, workers=2, kept=2)
    other = Offer("other", "p", 1.0, usd=1.0, start_usd=0.5, usd_per_hour=2.0, workers=2)
    assert counts(Need(3.0, short_usd=1e3), bounds(), kept, other) == (2, 1)


def test_of_two_alike_the_one_that_is_there_stays() -> None:
    same = {"pool": "p", "capacity": 1.0, "start_usd": 0.0, "usd_per_hour": 2.0, "workers": 2}
    first = Offer("first", usd=1.0, **same)  # type: ignore[arg-type]
    there = Offer("there", usd=1.005, kept=1, **same)  # type: ignore[arg-type]
    assert counts(Need(1.0, short_usd=1e3), bounds(), first, there) == (0, 1)


def test_only_those_that_are_there_can_be_had_and_need_no_start() -> None:
    there = replace(spot("a"), start_usd=0.4, kept=3).only(2)
    assert there == replace(spot("a"), start_usd=0.4, kept=2, limit=2)
    found = cheapest([there], Need(5.0, short_usd=1e3), bounds())
    assert (found.counts, found.usd) == ((2,), 2.0 + 3e3)


@pytest.mark.parametrize("load", [0.0, 0.4, 1.0, 3.5, 3.500001, 7.2])
def test_bounds_far_beyond_the_need_change_nothing(load: float) -> None:
    need = Need(load, short_usd=1e3, cover=load, uncovered_usd=2.0)
    offers = [spot("a"), spot("b", 1.1), spot(None, 1.7)]
    assert cheapest(offers, need, bounds(high=20)) == cheapest(
        offers, need, bounds(high=1 << 30, workers=1 << 30, usd=1e9)
    )


def spot(zone: str | None, usd: float = 1.0) -> Offer:
    return Offer(f"s{zone}", "p", 1.0, usd, 0.0, 2 * usd, 2, spot_zone=zone)


def test_spot_groups_are_spread_or_covered_when_a_loss_costs_more() -> None:
    one_zone = Need(2.0, cover=2.0, short_usd=1e3, uncovered_usd=0.1)
    assert counts(one_zone, bounds(), spot("a"), spot("b"), spot(None, 3.0))[2] == 0
    dear = Need(2.0, cover=2.0, short_usd=1e3, uncovered_usd=100.0)
    found = cheapest([spot("a"), spot("b"), spot(None, 3.0)], dear, bounds())
    assert found.uncovered == 0.0
    assert found.counts == (2, 2, 0)


def test_the_worst_zone_counts_over_pools_and_sizes() -> None:
    offers = [spot("a"), spot("a", 2.0), spot("b"), spot(None)]
    mix = priced(offers, Need(4.0, short_usd=math.inf, cover=4.0, uncovered_usd=1.0), (1, 1, 1, 1))
    assert (mix.short, mix.uncovered) == (0.0, 2.0)
    assert mix.usd == pytest.approx(5.0 + 2.0)
    assert mix.usd_per_hour == 10.0


@pytest.mark.parametrize(
    ("within", "good"),
    [
        pytest.param(bounds(), True, id="nothing binds"),
        pytest.param(bounds(low=4), False, id="too few"),
        pytest.param(bounds(high=2), False, id="too many"),
        pytest.param(bounds(workers=11), False, id="no room"),
        pytest.param(bounds(workers=12), True, id="just enough room"),
        pytest.param(bounds(usd=9.9), False, id="too dear"),
        pytest.param(bounds(usd=10.0), True, id="just enough money"),
        pytest.param(Bounds(0, 9, {"q": 99}), False, id="a pool that is missing has no room"),
    ],
)
def test_what_fits(within: Bounds, good: bool) -> None:
    assert fits([SMALL, LARGE], within, (2, 1)) is good


def test_a_limit_does_not_fit_beyond() -> None:
    limited = Offer("x", "p", 1.0, 1.0, 0.0, 2.0, 2, limit=1)
    assert fits([limited], bounds(), (1,))
    assert not fits([limited], bounds(), (2,))


def test_many_offers_end_quickly_with_a_mix_that_carries_the_load() -> None:
    offers = [
        Offer(f"{p}/{size}", f"p{p}", size * (1 + 0.07 * p), size * (1 + 0.05 * p), 0.2, size, size)
        for p in range(6)
        for size in (1, 2, 4)
    ]
    roomy = Bounds(0, 60, {f"p{p}": 64 for p in range(6)})
    found = cheapest(offers, Need(37.3, short_usd=1e3), roomy)
    assert found.short == 0.0
    least = min(offer.usd / offer.capacity for offer in offers) * 37.3
    assert least <= found.usd <= 1.25 * least
    assert not math.isinf(found.usd)
