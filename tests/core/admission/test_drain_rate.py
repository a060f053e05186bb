import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.admission.drain_rate import DrainRate


def steady(tokens_per_s: int, seconds: int) -> DrainRate:
    rate = DrainRate(0.0)
    for second in range(1, seconds + 1):
        rate.served(tokens_per_s, float(second))
    return rate


def test_the_first_measurement_counts_in_full() -> None:
    rate = steady(1000, 1)
    assert rate.tokens_per_s(1.0) == pytest.approx(1000)
    assert rate.retry_after_s(20_000, 1.0) == pytest.approx(20)


def test_before_any_measurement_a_short_wait() -> None:
    rate = DrainRate(0.0)
    rate.served(10, 0.1)
    assert rate.tokens_per_s(0.2) is None
    assert rate.retry_after_s(10**9, 0.2) == 5


def test_it_follows_a_change_and_forgets_in_idle_times() -> None:
    rate = steady(1000, 60)
    for second in range(61, 151):
        rate.served(100, float(second))
    assert rate.tokens_per_s(150.0) == pytest.approx(100, rel=0.5)
    assert steady(1000, 60).tokens_per_s(150.0) == pytest.approx(0, abs=60)


def test_many_small_ones_in_a_burst_are_one_measurement() -> None:
    rate = DrainRate(0.0)
    for number in range(1000):
        rate.served(1, number / 1000)
    assert rate.tokens_per_s(1.0) == pytest.approx(1000, rel=0.01)


def test_the_wait_is_between_one_second_and_two_minutes() -> None:
    rate = steady(1000, 10)
    assert rate.retry_after_s(0, 10.0) == 1
    assert rate.retry_after_s(1, 10.0) == 1
    assert rate.retry_after_s(10**9, 10.0) == 120
    stuck = DrainRate(0.0)
    stuck.served(0, 10.0)
    assert stuck.retry_after_s(1, 10.0) == 120


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e4)), max_size=50),
    st.integers(0, 10**12),
    st.floats(0, 1e6),
)
def test_any_history_gives_a_wait_in_bounds(
    events: list[tuple[int, float]], backlog: int, later_s: float
) -> None:
    rate, now_s = DrainRate(0.0), 0.0
    for tokens, elapsed_s in events:
        now_s += elapsed_s
        rate.served(tokens, now_s)
    assert 1 <= rate.retry_after_s(backlog, now_s + later_s) <= 120
    longer = rate.retry_after_s(backlog * 2 + 1, now_s + later_s)
    assert longer >= rate.retry_after_s(backlog, now_s + later_s)
