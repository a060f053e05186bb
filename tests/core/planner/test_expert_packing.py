from random import Random

import pytest

from expertmesh.core.planner.expert_packing import Packing, greedy, improve, pack, replicate

SAME = 1e-12


def test_replicas_make_the_largest_share_as_small_as_it_can_be() -> None:
    assert replicate([9.0, 2.0, 1.0], 6, None) == [4, 1, 1]
    assert replicate([8.0, 5.0, 1.0], 6, None) == [3, 2, 1]


def test_replicas_are_limited_while_the_slots_can_be_filled() -> None:
    assert replicate([8.0, 3.0, 1.0], 6, 2) == [2, 2, 2]
    assert replicate([8.0, 3.0, 1.0], 7, 2) == [4, 2, 1]


def test_a_swap_and_a_new_owner_keep_counts_shares_and_loads_right() -> None:
    packing = Packing([6.0, 4.0, 2.0], [[0, 1], [0, 2], [0, 2]])
    assert (packing.counts, packing.loads) == ([3, 1, 2], [6.0, 3.0, 3.0])
    packing.swap(0, 1, 1, 2)
    assert packing.ranks == [[0, 2], [0, 1], [0, 2]]
    packing.reassign(0, 0, 1)
    fresh = Packing([6.0, 4.0, 2.0], packing.ranks)
    assert packing.ranks == [[1, 2], [0, 1], [0, 2]]
    assert (packing.counts, packing.shares, packing.loads) == (
        (fresh.counts, fresh.shares, fresh.loads)
    )


def test_a_slot_gets_a_hot_expert_instead_of_a_copy_of_a_cold_one() -> None:
    packing = Packing([9.0, 1.0, 1.0, 1.0, 1.0], [[0, 1], [2, 3], [4, 1]])
    improve(packing, target=0.0)
    assert packing.counts == [2, 1, 1, 1, 1]
    assert packing.heaviest == 5.5


def test_a_copy_leaves_the_heaviest_rank() -> None:
    """Its place is taken by the expert that weighs least there."""
    packing = Packing([6.0, 5.9, 0.2, 0.1], [[1, 0], [0, 2], [3, 2]])
    before = packing.heaviest
    improve(packing, target=0.0)
    assert packing.heaviest < before
    assert sorted(packing.counts) == [1, 1, 2, 2]


def test_improving_stops_at_the_target() -> None:
    start = [[0, 1], [2, 3], [4, 1]]
    packing = Packing([9.0, 1.0, 1.0, 1.0, 1.0], start)
    improve(packing, target=9.5)
    assert packing.ranks == start


@pytest.mark.parametrize("seed", range(20))
def test_improving_never_makes_the_heaviest_rank_heavier(seed: int) -> None:
    rng = Random(seed)
    weights = [rng.paretovariate(0.8) for _ in range(12)]
    experts = [*range(12), *(rng.randrange(12) for _ in range(4))]
    rng.shuffle(experts)
    packing = Packing(weights, [experts[start : start + 4] for start in range(0, 16, 4)])
    before = packing.heaviest
    improve(packing, target=0.0)
    assert packing.heaviest <= before * (1 + SAME)
    assert sorted(len(rank) for rank in packing.ranks) == [4] * 4
    assert all(packing.counts)
    again = Packing(weights, packing.ranks)
    assert packing.loads == pytest.approx(again.loads, rel=SAME)


def test_larger_pieces_than_the_smallest_possible_fit_the_ranks_better() -> None:
    """The smallest possible pieces are a little over half a rank's load: two must not meet."""
    rng = Random(5)
    weights = [rank**-1.5 * rng.uniform(0.9, 1.1) for rank in range(1, 257)]
    mean = sum(weights) / 32
    one, six = (pack(weights, 32, 9, trials).heaviest / mean for trials in (1, 6))
    assert greedy(weights, 32, 9).heaviest / mean > 1.1
    assert one > 1.02
    assert six < 1.002


def test_with_no_trial_it_is_the_greedy_start() -> None:
    weights = [5.0, 3.0, 2.0, 2.0]
    assert pack(weights, 2, 3, 0).ranks == greedy(weights, 2, 3).ranks
