"""Samples come in by the controller's clock; their totals tell rates over about ten seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.controller.recent import Recent, rate


def recent_of(*samples: tuple[float, int]) -> Recent[int]:
    recent: Recent[int] = Recent()
    for at_s, total in samples:
        recent.add(at_s, total)
    return recent


def test_one_sample_tells_nothing() -> None:
    recent: Recent[int] = Recent()
    assert (recent.last, recent.last_at_s, recent.span()) == (None, None, None)
    recent.add(100.0, 5)
    assert (recent.last, recent.last_at_s, recent.span()) == (5, 100.0, None)


def test_two_samples_a_moment_apart_tell_nothing() -> None:
    recent = recent_of((100.0, 0), (100.01, 1))
    assert recent.span() is None
    recent.add(101.0, 2)
    assert recent.span() == (1.0, 0, 2)


def test_the_span_grows_to_ten_seconds_and_moves_on() -> None:
    recent = recent_of(*((100.0 + second, second) for second in range(11)))
    assert recent.span() == (10.0, 0, 10)
    recent.add(111.0, 11)
    assert recent.span() == (10.0, 1, 11)


def test_a_late_sample_makes_the_span_longer() -> None:
    recent = recent_of((100.0, 0), (101.0, 1), (125.0, 90))
    assert recent.span() == (24.0, 1, 90)


def test_after_a_long_silence_it_begins_anew() -> None:
    recent = recent_of((100.0, 0), (101.0, 1), (161.5, 90))
    assert recent.span() is None
    assert recent.last == 90


def test_a_clock_that_jumps_back_begins_anew() -> None:
    recent = recent_of((100.0, 0), (101.0, 1), (50.0, 2))
    assert recent.span() is None
    recent.add(51.0, 3)
    assert recent.span() == (1.0, 2, 3)


@given(st.lists(st.floats(0.0, 59.0), min_size=1, max_size=300))
def test_samples_are_few_and_the_span_is_as_long_as_it_can_be(gaps_s: list[float]) -> None:
    recent: Recent[float] = Recent()
    at_s, first_s = 1000.0, None
    for gap_s in gaps_s:
        at_s += gap_s
        first_s = at_s if first_s is None else first_s
        recent.add(at_s, at_s)
        assert len(recent._earlier) <= 22
        span = recent.span()
        if span is not None:
            span_s, first, last = span
            assert (last, span_s) == (at_s, at_s - first)
            assert span_s >= 9.5 or first - first_s < 1.0


@pytest.mark.parametrize(("before", "after", "per_s"), [(5, 25, 2.0), (5, 5, 0.0), (9, 2, 0.0)])
def test_a_rate_is_never_negative(before: int, after: int, per_s: float) -> None:
    assert rate(before, after, 10.0) == per_s
