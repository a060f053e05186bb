from itertools import chain
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.planner.expert_load import power_law
from expertmesh.core.planner.placement import (
    Loads,
    Placement,
    Ranks,
    balancedness,
    place,
    rank_loads,
)
from expertmesh.core.planner.replan import replan

RANKS = Ranks(8, 8)
LOADS = power_law(64, 2, 1.01, spread=100.0)


def drifted(loads: Loads, sigma: float, seed: int = 0) -> Loads:
    rng = Random(seed)
    return [[load * rng.lognormvariate(0.0, sigma) for load in layer] for layer in loads]


def arrivals(before: Placement, after: Placement) -> int:
    return sum(
        len(set(new) - set(old))
        for layer in range(len(before.slots))
        for old, new in zip(before.by_rank(layer), after.by_rank(layer), strict=True)
    )


def test_nothing_moves_while_loads_stay() -> None:
    current = place(LOADS, RANKS)
    found = replan(current, LOADS, RANKS, expert_bytes=10)
    assert found.placement == current
    assert (found.moved_experts, found.moved_bytes) == (0, 0)
    assert found.before == found.after == found.best


@pytest.mark.parametrize("ranks", [RANKS, Ranks(8, 8, nodes=2, groups=4), Ranks(32, 0), Ranks(8)])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("slack", [0.0, 0.02, 0.1])
def test_balance_is_within_the_slack_and_moves_are_fewer(
    ranks: Ranks, sigma: float, slack: float
) -> None:
    loads = drifted(LOADS, sigma)
    current = place(LOADS, ranks)
    found = replan(current, loads, ranks, expert_bytes=10, slack=slack)
    fresh = place(loads, ranks)
    for new, best in zip(rank_loads(found.placement, loads), rank_loads(fresh, loads), strict=True):
        assert max(new) <= max(best) * (1 + slack) * (1 + 1e-9)
    assert found.after == balancedness(found.placement, loads)
    assert found.best == balancedness(fresh, loads)
    assert found.before == balancedness(current, loads)
    assert found.moved_experts == arrivals(current, found.placement)
    assert found.moved_bytes == 10 * found.moved_experts
    assert found.moved_experts <= found.best_moved_experts <= arrivals(current, fresh)


def test_slack_saves_most_moves_after_a_small_change() -> None:
    loads = drifted(LOADS, 0.1)
    current = place(LOADS, RANKS)
    tight, loose = (replan(current, loads, RANKS, slack=slack) for slack in (0.0, 0.05))
    assert loose.moved_experts * 4 < tight.best_moved_experts
    assert loose.moved_experts < tight.moved_experts


@given(st.integers(0, 1000), st.sampled_from((RANKS, Ranks(8, 8, 2, 4))), st.floats(0.0, 2.0))
def test_the_placement_is_complete_and_keeps_groups_on_nodes(
    seed: int, ranks: Ranks, sigma: float
) -> None:
    loads = drifted(LOADS, sigma, seed)
    found = replan(place(LOADS, ranks, 2), loads, ranks, trials=2)
    for layer, slots in enumerate(found.placement.slots):
        assert set(slots) == set(range(64))
        assert len(slots) == 72
        if ranks.hierarchical:
            by_rank = found.placement.by_rank(layer)
            sides = [{e // 16 for e in chain(*half)} for half in (by_rank[:4], by_rank[4:])]
            assert not sides[0] & sides[1]


def test_experts_that_stay_keep_their_slot() -> None:
    loads = drifted(LOADS, 0.3)
    current = place(LOADS, RANKS)
    found = replan(current, loads, RANKS)
    assert found.moved_experts > 0
    for before, after in zip(current.slots, found.placement.slots, strict=True):
        changed = sum(old != new for old, new in zip(before, after, strict=True))
        assert changed <= found.moved_experts < len(before)


@pytest.mark.parametrize("ranks", [Ranks(16, 0), Ranks(4, 8), Ranks(8, 16), Ranks(16, 16, 2, 4)])
def test_another_number_of_ranks_or_slots_leaves_what_it_can(ranks: Ranks) -> None:
    current = place(LOADS, RANKS)
    found = replan(current, LOADS, ranks)
    assert (found.placement.ranks, found.placement.redundant) == (ranks.count, ranks.redundant)
    assert all(set(slots) == set(range(64)) for slots in found.placement.slots)
    assert found.after >= found.best / 1.02 * (1 - 1e-9)
    assert found.moved_experts <= found.best_moved_experts < sum(map(len, found.placement.slots))


def test_from_a_global_to_a_hierarchical_placement() -> None:
    current = place(LOADS, RANKS)
    found = replan(current, LOADS, Ranks(8, 8, nodes=2, groups=4))
    assert found.moved_experts > 0
    assert found.after >= found.best / 1.02 * (1 - 1e-9)


def test_after_the_loss_of_a_rank_its_experts_are_placed_again() -> None:
    current = place(LOADS, Ranks(8))
    left = Placement(64, 7, tuple(slots[:56] for slots in current.slots))
    found = replan(left, LOADS, Ranks(7, 6))
    assert found.before is None
    assert all(set(slots) == set(range(64)) for slots in found.placement.slots)
    assert found.moved_experts >= 2 * 8


def test_what_does_not_fit_together_is_refused() -> None:
    current = place(LOADS, RANKS)
    with pytest.raises(ValueError, match="2 layers of 64 experts, the loads are for 1 layers"):
        replan(current, LOADS[:1], RANKS)
    with pytest.raises(ValueError, match="slack is at least 0"):
        replan(current, LOADS, RANKS, slack=-0.1)
    with pytest.raises(ValueError, match="do not divide by"):
        replan(current, LOADS, Ranks(7))
