from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from tests.core.metering.histories import HOUR_S, histories
from tests.store.records import NOON_S, capacity_hold, node_hold

from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
from expertmesh.core.metering.node_cost import CapacityCost, capacity_cost, us_of

_SINCE_US = us_of(NOON_S)
_UNTIL_US = us_of(NOON_S + HOUR_S)
_NANO = 1_000_000_000
_ROUGH_NANO_USD = 100
"""Of one piece: what the order of nano-dollars may move."""


def cost(
    holds: Sequence[CapacityHold],
    nodes: Sequence[NodeHold],
    since_us: int = _SINCE_US,
    until_us: int = _UNTIL_US,
) -> tuple[list[int], CapacityCost]:
    """Nano-dollars of each hold, and the whole."""
    found = capacity_cost(holds, nodes, since_us, until_us)
    return [sum(p.nano_usd(p.start_us, p.end_us) for p in pieces) for pieces in found.pieces], found


def whole(start_s: float = 0, end_s: float = HOUR_S, pool: str = "cpu") -> NodeHold:
    return node_hold(WHOLE_POOL, NOON_S + start_s, NOON_S + end_s, pool=pool, usd_per_hour=0)


def node(name: str, usd_per_hour: float, start_s: float = 0, end_s: float = HOUR_S) -> NodeHold:
    return node_hold(name, NOON_S + start_s, NOON_S + end_s, usd_per_hour=usd_per_hour)


def group(
    name: str, usd_per_hour: float, start_s: float = 0, end_s: float = HOUR_S
) -> CapacityHold:
    return capacity_hold(name, NOON_S + start_s, NOON_S + end_s, usd_per_hour=usd_per_hour)


def test_without_nodes_a_group_costs_its_own_price() -> None:
    amounts, found = cost([group("g", 0.3)], [])
    assert amounts == [300_000_000]
    assert [(p.pool, p.nano_usd, p.idle_nodes_nano_usd) for p in found.pools] == [
        ("cpu", 300_000_000, 0)
    ]


def test_a_node_without_a_group_is_idle() -> None:
    amounts, found = cost([], [whole(), node("n", 0.5)])
    (pool,) = found.pools
    assert (amounts, pool.nano_usd, pool.idle_nodes_nano_usd) == ([], 500_000_000, 500_000_000)
    assert pool.idle_nodes_us == HOUR_S * 1_000_000


def test_of_a_node_that_is_used_in_part_the_rest_is_idle() -> None:
    amounts, found = cost([group("g", 0.25)], [whole(), node("n", 1.0)])
    assert amounts == [250_000_000]
    assert found.pools[0].idle_nodes_nano_usd == 750_000_000


def test_groups_that_fill_a_node_leave_nothing_whatever_their_prices_round_to() -> None:
    third = 1.0 / 3  # three of them are a little less than one dollar, six sixths may be more
    amounts, found = cost([group(name, third) for name in "abc"], [whole(), node("n", 1.0)])
    assert sum(amounts) + found.pools[0].idle_nodes_nano_usd == _NANO
    assert 0 <= found.pools[0].idle_nodes_nano_usd <= _ROUGH_NANO_USD
    assert max(amounts) - min(amounts) <= _ROUGH_NANO_USD

    dear = 0.34
    amounts, found = cost([group(name, dear) for name in "abc"], [whole(), node("n", 1.0)])
    assert sum(amounts) == _NANO and found.pools[0].idle_nodes_nano_usd == 0
    assert max(amounts) - min(amounts) <= _ROUGH_NANO_USD


def test_a_gang_that_waits_for_nodes_costs_nothing_until_they_exist() -> None:
    half_s = HOUR_S / 2
    amounts, found = cost([group("g", 1.0)], [whole(), node("n", 1.0, half_s)])
    assert amounts == [_NANO // 2]
    assert (found.pools[0].nano_usd, found.pools[0].idle_nodes_nano_usd) == (_NANO // 2, 0)


def test_while_nobody_looked_groups_cost_their_price() -> None:
    half_s = HOUR_S / 2
    amounts, _ = cost([group("g", 1.0)], [whole(half_s), node("n", 1.0, half_s)])
    assert amounts == [_NANO]
    # A node that is known to have been there the whole time is counted all the same.
    amounts, found = cost([group("g", 0.25)], [whole(half_s), node("n", 1.0)])
    assert amounts == [250_000_000] and found.pools[0].idle_nodes_nano_usd == 750_000_000


def test_pools_do_not_mix() -> None:
    other = node_hold("n", NOON_S, NOON_S + HOUR_S, pool="other", usd_per_hour=1.0)
    amounts, found = cost([group("g", 0.5)], [whole(pool="other"), other])
    assert amounts == [500_000_000]
    assert {p.pool: p.idle_nodes_nano_usd for p in found.pools} == {"cpu": 0, "other": _NANO}


def test_a_pool_of_price_zero_costs_nothing() -> None:
    amounts, found = cost([group("g", 0.0)], [whole(), node("n", 0.0)])
    assert amounts == [0]
    assert (found.pools[0].nano_usd, found.pools[0].idle_nodes_nano_usd) == (0, 0)


@given(histories())
def test_nodes_cost_what_their_groups_and_their_idle_time_cost(
    history: tuple[list[CapacityHold], list[NodeHold]],
) -> None:
    holds, nodes = history
    amounts, found = cost(holds, nodes)
    total = sum(amounts) + sum(pool.idle_nodes_nano_usd for pool in found.pools)
    assert total == sum(pool.nano_usd for pool in found.pools)
    assert all(amount >= 0 for amount in amounts)
    assert all(pool.idle_nodes_nano_usd >= 0 for pool in found.pools)
    for hold, pieces in zip(holds, found.pieces, strict=True):
        held = sum(piece.end_us - piece.start_us for piece in pieces)
        assert held == us_of(hold.held_until_s) - us_of(hold.started_at_s)
        assert all(a.end_us == b.start_us for a, b in pairwise(pieces))
    exact = _exact(holds, nodes)
    edges = 2 * (len(holds) + len(nodes)) + 1
    for pool in found.pools:
        rough = _ROUGH_NANO_USD * edges
        assert abs(pool.idle_nodes_nano_usd - exact[pool.pool][0]) <= rough
        assert abs(pool.nano_usd - exact[pool.pool][1]) <= edges * (len(holds) + 1)


@given(histories(), st.lists(st.floats(min_value=0, max_value=HOUR_S), max_size=4))
def test_windows_side_by_side_add_up_to_the_last_digit(
    history: tuple[list[CapacityHold], list[NodeHold]], cuts_s: list[float]
) -> None:
    holds, nodes = history
    edges = sorted({_SINCE_US, _UNTIL_US, *(us_of(NOON_S + cut) for cut in cuts_s)})
    windows = [cost(holds, nodes, a, b) for a, b in pairwise(edges)]
    amounts, found = cost(holds, nodes)
    for index, amount in enumerate(amounts):
        assert sum(window[index] for window, _ in windows) == amount
        assert all(window[index] >= 0 for window, _ in windows)
    for number, pool in enumerate(found.pools):
        parts = [window.pools[number] for _, window in windows]
        assert sum(part.nano_usd for part in parts) == pool.nano_usd
        assert sum(part.idle_nodes_nano_usd for part in parts) == pool.idle_nodes_nano_usd
        assert all(part.idle_nodes_nano_usd >= 0 for part in parts)


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    history: tuple[list[CapacityHold], list[NodeHold]],
    random: Random,
) -> None:
    holds, nodes = history
    amounts, found = cost(holds, nodes)
    order = random.sample(range(len(holds)), len(holds))
    other, shuffled = cost([holds[index] for index in order], random.sample(nodes, len(nodes)))
    assert [amounts[index] for index in order] == other
    assert found.pools == shuffled.pools


def _exact(
    holds: Sequence[CapacityHold], nodes: Sequence[NodeHold]
) -> dict[str, tuple[Fraction, Fraction]]:
    """Idle nodes and the whole, by pool: the definition, in fractions."""
    found = {}
    everything: list[CapacityHold | NodeHold] = [*holds, *nodes]
    for pool in {held.pool for held in everything}:
        mine = [held for held in everything if held.pool == pool]
        edges = sorted({us_of(t) for h in mine for t in (h.started_at_s, h.held_until_s)})
        idle = total = Fraction(0)
        for start_us, end_us in pairwise(edges):
            here = [
                h
                for h in mine
                if us_of(h.started_at_s) <= start_us and end_us <= us_of(h.held_until_s)
            ]
            of_groups, of_nodes = (
                sum((_rate(h) for h in here if isinstance(h, kind)), Fraction(0))
                for kind in (CapacityHold, NodeHold)
            )
            known = any(isinstance(h, NodeHold) and h.node_id == WHOLE_POOL for h in here)
            pays = of_nodes if known else max(of_nodes, of_groups)
            total += pays * (end_us - start_us)
            idle += max(Fraction(0), pays - of_groups) * (end_us - start_us)
        found[pool] = idle, total
    return found


def _rate(hold: CapacityHold | NodeHold) -> Fraction:
    if isinstance(hold, NodeHold) and hold.node_id == WHOLE_POOL:
        return Fraction(0)
    return Fraction(repr(hold.usd_per_hour)) * 10 / 36
