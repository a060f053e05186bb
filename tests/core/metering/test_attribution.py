from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.metering.attribution import Attribution, allocate, attribute
from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.metering.usage import UsageRecord

# At this price, a second costs a thousandth of a dollar.
_USD_PER_HOUR = 3.6
_MILLI = 1_000_000
_END_S = NOON_S + 1_000


def hold(
    start_s: float, end_s: float, group: str = "g", usd_per_hour: float = _USD_PER_HOUR
) -> CapacityHold:
    end_s += NOON_S
    return capacity_hold(group, NOON_S + start_s, end_s, end_s, usd_per_hour=usd_per_hour)


def request(request_id: str, start_s: float, end_s: float, group: str = "g") -> UsageRecord:
    return usage_record(request_id, NOON_S + start_s, group=group, duration_s=end_s - start_s)


def test_a_request_alone_pays_its_time_and_the_rest_is_idle() -> None:
    attribution = attribute([hold(0, 10)], [request("a", 2, 5)], _END_S)
    assert attribution.requests == {"a": 3 * _MILLI}
    assert (attribution.cost_nano_usd, attribution.idle_nano_usd) == (10 * _MILLI, 7 * _MILLI)


def test_requests_at_once_share_each_instant_equally() -> None:
    requests = [request("a", 0, 4), request("b", 2, 6), request("c", 2, 3)]
    attribution = attribute([hold(0, 10)], requests, _END_S)
    # a alone for 2 s, three at once for 1 s, a and b for 1 s, b alone for 2 s.
    third = 333_333
    assert attribution.requests == {
        "a": 2 * _MILLI + third + 1 + 500_000,
        "b": third + 500_000 + 2 * _MILLI,
        "c": third,
    }
    assert attribution.idle_nano_usd == 4 * _MILLI
    assert attribution.cost_nano_usd == 10 * _MILLI


@pytest.mark.parametrize(
    "served",
    [request("a", -5, 15), usage_record("a", NOON_S - 9, group="g", queue_s=9, duration_s=20)],
    ids=["before and after the hold", "queued before"],
)
def test_time_outside_the_hold_and_in_the_queue_costs_nothing(served: UsageRecord) -> None:
    attribution = attribute([hold(0, 10)], [served], _END_S)
    assert attribution.requests == {"a": 10 * _MILLI}
    assert attribution.idle_nano_usd == 0


def test_the_queue_is_not_in_flight() -> None:
    queued = usage_record("a", NOON_S, group="g", queue_s=4, duration_s=6)
    attribution = attribute([hold(0, 10)], [queued], _END_S)
    assert attribution.requests == {"a": 2 * _MILLI}


def test_a_request_that_no_hold_served_has_no_share() -> None:
    requests = [request("elsewhere", 0, 5, group="h"), request("refused at once", 3, 3)]
    attribution = attribute([hold(0, 10)], requests, _END_S)
    assert attribution.requests == {}
    assert attribution.idle_nano_usd == attribution.cost_nano_usd == 10 * _MILLI


def test_an_open_hold_costs_until_it_was_last_seen() -> None:
    still_open = capacity_hold("g", NOON_S, NOON_S + 7, None, usd_per_hour=_USD_PER_HOUR)
    assert attribute([still_open], [], _END_S).cost_nano_usd == 7 * _MILLI
    assert attribute([still_open], [], NOON_S + 4).cost_nano_usd == 4 * _MILLI
    assert attribute([still_open], [], NOON_S - 4).cost_nano_usd == 0


def test_nothing_held_costs_nothing() -> None:
    assert attribute([], [request("a", 0, 1)], _END_S) == Attribution((), {})


def test_a_name_that_came_back_is_two_holds() -> None:
    attribution = attribute([hold(0, 2), hold(5, 7)], [request("a", 1, 6)], _END_S)
    assert [held.attributed_nano_usd for held in attribution.holds] == [_MILLI, _MILLI]
    assert attribution.requests == {"a": 2 * _MILLI}


def test_a_price_means_what_was_written() -> None:
    hour = hold(0, 3600, usd_per_hour=0.3)
    assert attribute([hour], [], NOON_S + 3600).cost_nano_usd == 300_000_000


# Prices and times with many digits, so that nothing comes out even by luck.
_prices = st.floats(min_value=0, max_value=1_000)
_moments_s = st.floats(min_value=0, max_value=500)
_groups = st.sampled_from(("g", "h"))


@st.composite
def _holds(draw: st.DrawFn) -> list[CapacityHold]:
    """Up to three holds of each of two groups, side by side."""
    found = []
    for group in ("g", "h"):
        edges = sorted(draw(st.lists(_moments_s, max_size=6)))
        pairs = zip(edges[::2], edges[1::2], strict=False)
        found += [hold(start, end, group, draw(_prices)) for start, end in pairs]
    return found


@st.composite
def _requests(draw: st.DrawFn) -> list[UsageRecord]:
    return [
        usage_record(
            f"r{number}",
            NOON_S + draw(_moments_s),
            group=draw(_groups),
            queue_s=draw(st.floats(min_value=0, max_value=20)),
            duration_s=draw(st.floats(min_value=0, max_value=200)),
        )
        for number in range(draw(st.integers(min_value=0, max_value=12)))
    ]


@given(_holds(), _requests(), _moments_s)
def test_cost_is_attributed_plus_idle_to_the_last_digit(
    holds: list[CapacityHold], requests: list[UsageRecord], now_s: float
) -> None:
    attribution = attribute(holds, requests, NOON_S + now_s)
    assert attribution.cost_nano_usd == attribution.attributed_nano_usd + attribution.idle_nano_usd
    assert min((*attribution.requests.values(), attribution.idle_nano_usd)) >= 0
    for held in attribution.holds:
        assert held.idle_nano_usd >= 0 and held.attributed_nano_usd >= 0
        assert held.cost_nano_usd == int(_exact_cost(held.hold, NOON_S + now_s))


@given(_holds(), _requests())
def test_every_share_is_the_exact_one_rounded(
    holds: list[CapacityHold], requests: list[UsageRecord]
) -> None:
    attribution = attribute(holds, requests, _END_S)
    for record in requests:
        exact = sum((_exact_share(held, record, requests) for held in holds), Fraction(0))
        # One rounding up or down for each hold, and one for the hold's own cost.
        assert abs(attribution.requests.get(record.request_id, 0) - exact) < 2 * len(holds) + 1


@given(_holds(), _requests(), st.lists(_moments_s, max_size=4))
def test_windows_side_by_side_cost_what_their_union_costs(
    holds: list[CapacityHold], requests: list[UsageRecord], cuts: list[float]
) -> None:
    edges = [NOON_S, *sorted(NOON_S + cut for cut in cuts), _END_S]
    windows = [attribute(holds, requests, until_s, since_s) for since_s, until_s in pairwise(edges)]
    whole = attribute(holds, requests, _END_S)
    assert sum(window.cost_nano_usd for window in windows) == whole.cost_nano_usd
    for index, held in enumerate(whole.holds):
        assert sum(w.holds[index].cost_nano_usd for w in windows) == held.cost_nano_usd


@given(_holds(), _requests(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_moves_at_most_the_rounding(
    holds: list[CapacityHold], requests: list[UsageRecord], random: Random
) -> None:
    shuffled = random.sample(requests, len(requests))
    one, other = attribute(holds, requests, _END_S), attribute(holds, shuffled, _END_S)
    assert one.cost_nano_usd == other.cost_nano_usd
    assert one.requests.keys() == other.requests.keys()
    for request_id, share in one.requests.items():
        assert abs(share - other.requests[request_id]) <= len(holds)


@given(
    st.integers(min_value=0, max_value=10**15),
    st.lists(st.integers(min_value=0, max_value=2**90), min_size=1),
)
def test_allocation_is_whole_and_within_one_of_proportional(total: int, weights: list[int]) -> None:
    if not any(weights):
        weights = [*weights, 1]
    parts = allocate(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(weights))) < 1


def test_nothing_is_allocated_over_nothing() -> None:
    assert allocate(0, [0, 0]) == (0, 0)
    with pytest.raises(ValueError, match="all zero"):
        allocate(1, [0, 0])


def _exact_cost(held: CapacityHold, now_s: float) -> Fraction:
    start_us, end_us = _us(held.started_at_s), min(_us(held.held_until_s), _us(now_s))
    return Fraction(repr(held.usd_per_hour)) * max(0, end_us - start_us) * 10 / 36


def _exact_share(held: CapacityHold, record: UsageRecord, requests: list[UsageRecord]) -> Fraction:
    """The definition, instant by instant, in fractions."""
    intervals = {
        other.request_id: (_us(other.at_s + other.queue_s), _us(other.at_s + other.duration_s))
        for other in requests
        if other.group == held.group
    }
    if record.request_id not in intervals:
        return Fraction(0)
    start_us, end_us = _us(held.started_at_s), _us(held.held_until_s)
    inner = (edge for interval in intervals.values() for edge in interval)
    edges = sorted({start_us, end_us, *(edge for edge in inner if start_us < edge < end_us)})
    share = Fraction(0)
    for left, right in pairwise(edges):
        at_once = [key for key, (a, b) in intervals.items() if a <= left and right <= b]
        if record.request_id in at_once:
            share += Fraction(right - left, len(at_once))
    return Fraction(repr(held.usd_per_hour)) * share * 10 / 36


def _us(at_s: float) -> int:
    return round(at_s * 1_000_000)
