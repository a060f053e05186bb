from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.metering.histories import HOUR_S, histories
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.metering.attribution import Attribution, attribute
from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
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
    # The last one to end takes what the rounding left.
    assert attribution.requests == {
        "a": 2 * _MILLI + third + 500_000,
        "b": third + 1 + 500_000 + 2 * _MILLI,
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
        assert abs(held.cost_nano_usd - _exact_cost(held.hold, NOON_S + now_s)) < 1


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


def test_work_decides_who_pays_and_not_the_time_alone() -> None:
    held = capacity_hold(
        "g", NOON_S, NOON_S + 10, usd_per_hour=_USD_PER_HOUR, tokens_per_s=(100.0, 10.0)
    )
    # 1 s and 3 s of the group's time, over 4 s each; the cached tokens took none.
    light = usage_record(
        "a", group="g", duration_s=4, prompt_tokens=900, cached_tokens=850, completion_tokens=5
    )
    heavy = usage_record(
        "b", group="g", duration_s=4, prompt_tokens=100, cached_tokens=0, completion_tokens=20
    )
    attribution = attribute([held], [light, heavy], _END_S)
    assert attribution.requests == {"a": _MILLI, "b": 3 * _MILLI}
    assert attribution.costs["a"].prefill_nano_usd == pytest.approx(_MILLI // 2, abs=1)
    assert attribution.costs["b"].decode_nano_usd == pytest.approx(2 * _MILLI, abs=1)
    assert attribution.idle_nano_usd == 6 * _MILLI


def test_work_is_spread_over_the_time_in_flight() -> None:
    held = capacity_hold("g", NOON_S, NOON_S + 10, usd_per_hour=_USD_PER_HOUR, tokens_per_s=(1, 1))
    # The same work in 8 s and in 2 s: a fifth and four fifths while both are in flight.
    slow = usage_record("slow", group="g", duration_s=8)
    quick = usage_record("quick", group="g", duration_s=2)
    attribution = attribute([held], [slow, quick], _END_S)
    assert attribution.requests == pytest.approx({"slow": 6_400_000, "quick": 1_600_000}, abs=1)


def test_a_request_without_tokens_pays_only_while_it_is_alone() -> None:
    held = capacity_hold("g", NOON_S, NOON_S + 4, usd_per_hour=_USD_PER_HOUR, tokens_per_s=(1, 1))
    nothing = usage_record(
        "nothing", group="g", duration_s=4, prompt_tokens=0, cached_tokens=0, completion_tokens=0
    )
    work = usage_record("work", NOON_S + 2, group="g", duration_s=2)
    assert attribute([held], [nothing, work], _END_S).requests == {
        "nothing": 2 * _MILLI,
        "work": 2 * _MILLI,
    }


@pytest.mark.parametrize(
    ("start_s", "draining_s", "expected"),
    [
        (0.0, None, (0, 6, 0)),
        (3.0, None, (3, 3, 0)),
        (None, None, (6, 0, 0)),
        (3.0, 8.0, (3, 1, 2)),
        (None, 1.0, (1, 0, 5)),
        (9.0, 1.0, (1, 0, 5)),
        (30.0, 40.0, (6, 0, 0)),
    ],
)
def test_with_nobody_in_flight_the_state_tells_what_it_costs_for(
    start_s: float | None, draining_s: float | None, expected: tuple[int, int, int]
) -> None:
    held = capacity_hold(
        *("g", NOON_S, NOON_S + 10),
        usd_per_hour=_USD_PER_HOUR,
        start_s=start_s,
        draining_at_s=None if draining_s is None else NOON_S + draining_s,
    )
    (cost,) = attribute([held], [request("a", 3, 7)], _END_S).holds
    parts = (cost.starting_nano_usd, cost.idle_nano_usd, cost.draining_nano_usd)
    assert tuple(part // _MILLI for part in parts) == expected
    assert (cost.attributed_nano_usd, cost.cost_nano_usd) == (4 * _MILLI, 10 * _MILLI)


@st.composite
def _served(draw: st.DrawFn) -> list[UsageRecord]:
    """Of the groups of `histories`, and of one that never was."""
    names = st.sampled_from(("cpu-0", "cpu-1", "spot-0", "gone"))
    return [
        usage_record(
            f"r{number}",
            NOON_S + draw(st.floats(min_value=-100, max_value=HOUR_S)),
            group=draw(names),
            queue_s=draw(st.floats(min_value=0, max_value=20)),
            duration_s=draw(st.floats(min_value=0, max_value=HOUR_S)),
            prompt_tokens=draw(st.integers(min_value=50, max_value=10_000)),
            cached_tokens=draw(st.integers(min_value=0, max_value=50)),
            completion_tokens=draw(st.integers(min_value=0, max_value=2000)),
        )
        for number in range(draw(st.integers(min_value=0, max_value=12)))
    ]


_History = tuple[list[CapacityHold], list[NodeHold]]


@given(histories(), _served())
def test_every_nano_dollar_of_any_history_has_one_place(
    history: _History, requests: list[UsageRecord]
) -> None:
    holds, nodes = history
    attribution = attribute(holds, requests, NOON_S + HOUR_S, NOON_S, nodes)
    places = (
        *(cost.nano_usd for cost in attribution.costs.values()),
        *(held.idle_nano_usd for held in attribution.holds),
        *(held.starting_nano_usd for held in attribution.holds),
        *(held.draining_nano_usd for held in attribution.holds),
        *(pool.idle_nodes_nano_usd for pool in attribution.pools),
    )
    assert sum(places) == sum(pool.nano_usd for pool in attribution.pools)
    assert sum(places) == attribution.cost_nano_usd
    assert all(place >= 0 for place in places)
    for cost in attribution.costs.values():
        assert cost.prefill_nano_usd >= 0 and cost.decode_nano_usd >= 0
        assert cost.prefill_nano_usd + cost.decode_nano_usd <= cost.nano_usd


@given(histories(), _served())
def test_every_share_is_that_of_the_definition(
    history: _History, requests: list[UsageRecord]
) -> None:
    holds, nodes = history
    attribution = attribute(holds, requests, NOON_S + HOUR_S, NOON_S, nodes)
    pieces = 2 * (len(holds) + len(nodes) + len(requests)) + 1
    for record in requests:
        exact = _defined_share(record, holds, nodes, requests)
        found = attribution.requests.get(record.request_id, 0)
        # Rounding, and the order of nano-dollars where several share a node.
        assert abs(found - exact) <= 100 * pieces + exact * 1e-6


def _defined_share(
    record: UsageRecord,
    holds: list[CapacityHold],
    nodes: list[NodeHold],
    requests: list[UsageRecord],
) -> Fraction:
    """Instant by instant, in fractions."""
    flights = {
        other.request_id: (other, _us(other.at_s + other.queue_s), _us(other.finished_at_s))
        for other in requests
        if other.group == record.group
    }
    _, start_us, end_us = flights[record.request_id]
    moments = [moment for _, *both in flights.values() for moment in both]
    everything: list[CapacityHold | NodeHold] = [*holds, *nodes]
    moments += [_us(at_s) for held in everything for at_s in (held.started_at_s, held.held_until_s)]
    moments += [_us(NOON_S), _us(NOON_S + HOUR_S)]
    share = Fraction(0)
    for left, right in pairwise(sorted(set(moments))):
        inside = start_us <= left < end_us and _us(NOON_S) <= left < _us(NOON_S + HOUR_S)
        for hold in holds if inside else ():
            if hold.group != record.group or not _is_held(hold, left, right):
                continue
            weights = {
                key: _work(hold, other, b - a)
                for key, (other, a, b) in flights.items()
                if a <= left and right <= b
            }
            part = weights[record.request_id] / sum(weights.values())
            share += _rate_of(hold, holds, nodes, left, right) * part * (right - left)
    return share


def _work(hold: CapacityHold, request: UsageRecord, in_flight_us: int) -> Fraction:
    if hold.prefill_tokens_per_s is None or hold.decode_tokens_per_s is None:
        return Fraction(1)
    uncached = request.prompt_tokens - request.cached_tokens
    work_s = Fraction(uncached) / Fraction(hold.prefill_tokens_per_s)
    work_s += Fraction(request.completion_tokens) / Fraction(hold.decode_tokens_per_s)
    # Nothing weighs nothing: the least there is.
    return work_s / in_flight_us + Fraction(1, 1 << 60)


def _rate_of(
    hold: CapacityHold, holds: list[CapacityHold], nodes: list[NodeHold], left: int, right: int
) -> Fraction:
    """Nano-dollars a microsecond."""
    groups = [h for h in holds if h.pool == hold.pool and _is_held(h, left, right)]
    there = [n for n in nodes if n.pool == hold.pool and _is_held(n, left, right)]
    known = any(node.node_id == WHOLE_POOL for node in there)
    of_groups = sum((Fraction(repr(h.usd_per_hour)) for h in groups), Fraction(0))
    of_nodes = sum((Fraction(repr(n.usd_per_hour)) for n in there), Fraction(0))
    rate = Fraction(repr(hold.usd_per_hour)) * 10 / 36
    return rate * of_nodes / of_groups if known and of_nodes < of_groups else rate


def _is_held(hold: CapacityHold | NodeHold, left: int, right: int) -> bool:
    return _us(hold.started_at_s) <= left and right <= _us(hold.held_until_s)


@given(histories(), _served(), st.lists(st.floats(min_value=0, max_value=HOUR_S), max_size=3))
def test_windows_add_up_in_every_part_of_every_hold(
    history: _History, requests: list[UsageRecord], cuts_s: list[float]
) -> None:
    holds, nodes = history
    edges = [NOON_S, *sorted(NOON_S + cut for cut in cuts_s), NOON_S + HOUR_S]
    windows = [attribute(holds, requests, b, a, nodes) for a, b in pairwise(edges)]
    whole = attribute(holds, requests, NOON_S + HOUR_S, NOON_S, nodes)
    for index, held in enumerate(whole.holds):
        for name in ("attributed", "idle", "starting", "draining"):
            parts = [getattr(w.holds[index], f"{name}_nano_usd") for w in windows]
            assert sum(parts) == getattr(held, f"{name}_nano_usd")
    assert sum(w.idle_nodes_nano_usd for w in windows) == whole.idle_nodes_nano_usd
    for request_id, share in whole.requests.items():
        parts = [window.requests.get(request_id, 0) for window in windows]
        # Rounding: a nano-dollar or two for each cut and each change of a price.
        assert abs(sum(parts) - share) <= 2 * (len(windows) + len(holds) + len(nodes)) * 4


@given(histories(), _served(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_digit(
    history: _History, requests: list[UsageRecord], random: Random
) -> None:
    holds, nodes = history
    one = attribute(holds, requests, NOON_S + HOUR_S, NOON_S, nodes)
    other = attribute(
        random.sample(holds, len(holds)),
        random.sample(requests, len(requests)),
        NOON_S + HOUR_S,
        NOON_S,
        random.sample(nodes, len(nodes)),
    )
    assert one.costs == other.costs
    assert set(one.holds) == set(other.holds)
    assert one.pools == other.pools


def test_many_requests_at_once_are_paid_in_parts_and_lose_nothing() -> None:
    held = hold(0, 900)
    requests = [request(f"r{n:05}", n / 20, n / 20 + 90 + n % 7) for n in range(16_000)]
    attribution = attribute([held], requests, _END_S)
    assert attribution.attributed_nano_usd + attribution.idle_nano_usd == 900 * _MILLI
    assert attribution.attributed_nano_usd == attribution.holds[0].attributed_nano_usd
    # Each of about 1860 in flight pays its part of every second; this one for 96 of them.
    assert attribution.requests["r08000"] == pytest.approx(_MILLI * 96 / 1860, rel=0.001)


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
