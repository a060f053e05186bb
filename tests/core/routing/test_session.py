from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.core.routing.session import BUCKETS, bucket_of, rank_order, rank_seed

SESSIONS = [f"session-{n}".encode() for n in range(4000)]


def homes(names: list[str]) -> list[str]:
    seeds = [rank_seed(name) for name in names]
    order = {bucket: rank_order(seeds, bucket, 1)[0] for bucket in set(map(bucket_of, SESSIONS))}
    return [names[order[bucket_of(session)]] for session in SESSIONS]


def names_of(count: int, first: int = 0) -> list[str]:
    return [f"http://10.0.0.{n}:8000/em-m-p-{n}" for n in range(first, first + count)]


def test_the_same_in_every_process() -> None:
    assert bucket_of(b"session-1") == 7726
    seeds = [rank_seed(name) for name in names_of(4)]
    assert rank_order(seeds, 7726, 4) == (3, 0, 1, 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(0, 200), st.data())
def test_a_rank_that_joins_or_leaves_moves_only_its_own_sessions(
    count: int, first: int, data: st.DataObject
) -> None:
    names = names_of(count, first)
    gone = data.draw(st.sampled_from(names))
    before = homes(names)
    after = homes([name for name in names if name != gone])
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) <= {gone}, "read backwards, this is a rank that joins"
    share = len(moved) / len(SESSIONS)
    assert 0.6 / count <= share <= 1.5 / count, f"{share:.3f} of the sessions, 1/n {1 / count:.3f}"


@given(st.permutations(names_of(6)), st.integers(0, BUCKETS - 1))
def test_the_order_of_the_fleet_does_not_matter(names: list[str], bucket: int) -> None:
    def order(of: list[str]) -> list[str]:
        return [of[place] for place in rank_order([rank_seed(name) for name in of], bucket, 6)]

    assert order(names) == order(names_of(6))


def test_ranks_get_even_shares_and_those_of_a_full_rank_spread_over_all_others() -> None:
    names = names_of(16)
    seeds = [rank_seed(name) for name in names]
    orders = [rank_order(seeds, bucket, 2) for bucket in range(BUCKETS)]
    firsts = Counter(first for first, _ in orders)
    mean = BUCKETS / 16
    assert 0.8 * mean < min(firsts.values()) and max(firsts.values()) < 1.2 * mean, firsts
    seconds = Counter(second for first, second in orders if first == 3)
    assert len(seconds) == 15 and max(seconds.values()) < 2 * firsts[3] / 15, seconds


def test_fewer_ranks_than_asked_for() -> None:
    assert rank_order([rank_seed("a")], 5, 8) == (0,)
    assert rank_order([], 5, 8) == ()
