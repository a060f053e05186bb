from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.scaling.peak import Peak

values = st.lists(st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 10.0)), max_size=120)


def test_nothing_seen_is_no_need() -> None:
    assert Peak().since(0.0) == 0.0


def test_the_highest_value_counts_for_as_long_as_it_is_kept() -> None:
    peak = Peak().seen(5.0, 100.0, 60.0).seen(2.0, 110.0, 60.0)
    assert peak.since(50.0) == 5.0
    assert peak.since(101.0) == 2.0
    assert peak.seen(1.0, 161.0, 60.0).since(101.0) == 2.0


def test_a_value_that_is_topped_is_forgotten() -> None:
    assert Peak().seen(1.0, 1.0, 9.0).seen(3.0, 2.0, 9.0).falls == ((2.0, 3.0),)


def test_a_value_that_is_reached_again_counts_from_then_on() -> None:
    assert Peak().seen(3.0, 1.0, 9.0).seen(3.0, 5.0, 9.0).since(4.0) == 3.0


def test_time_that_does_not_count_moves_everything() -> None:
    peak = Peak().seen(5.0, 100.0, 60.0).later(40.0)
    assert (peak.since(140.0), peak.since(141.0)) == (5.0, 0.0)


def test_a_clock_that_was_set_back_keeps_no_value_of_the_future() -> None:
    peak = Peak().seen(9.0, 5000.0, 60.0).seen(1.0, 1000.0, 60.0)
    assert peak.since(0.0) == 1.0


@given(values)
def test_it_never_forgets_too_soon_and_stays_small(course: list[tuple[float, float]]) -> None:
    peak, now_s, seen = Peak(), 0.0, []
    for dt_s, value in course:
        now_s += dt_s
        seen.append((now_s, value))
        peak = peak.seen(value, now_s, 60.0)
        truth = max(v for at_s, v in seen if at_s >= now_s - 60.0)
        assert peak.since(now_s - 60.0) >= truth
        assert len(peak.falls) <= 49
        times = [at_s for at_s, _ in peak.falls]
        highs = [v for _, v in peak.falls]
        assert times == sorted(times)
        assert highs == sorted(highs, reverse=True)


@given(st.lists(st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 10.0)), max_size=40))
def test_of_few_values_it_is_exact(course: list[tuple[float, float]]) -> None:
    peak, now_s, seen = Peak(), 0.0, []
    for dt_s, value in course:
        now_s += dt_s
        seen.append((now_s, value))
        peak = peak.seen(value, now_s, 60.0)
        assert peak.since(now_s - 60.0) == max(v for at, v in seen if at >= now_s - 60.0)
