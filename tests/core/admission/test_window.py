from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.admission.window import day_of, day_start_s, month_of

EPOCH = date(1970, 1, 1)


@given(st.floats(min_value=0, max_value=4e9))
def test_the_day_is_that_of_utc(at_s: float) -> None:
    day = day_of(at_s)
    assert EPOCH + timedelta(days=day) == datetime.fromtimestamp(at_s, UTC).date()
    assert day_start_s(day) <= at_s < day_start_s(day + 1)


@given(st.dates(min_value=EPOCH, max_value=date(2400, 12, 31)))
def test_the_month_is_that_of_the_calendar(day: date) -> None:
    first, next_first = (EPOCH + timedelta(days=n) for n in month_of((day - EPOCH).days))
    assert first == day.replace(day=1)
    assert next_first == (day.replace(day=28) + timedelta(days=4)).replace(day=1)


@pytest.mark.parametrize("year", [2000, 2024, 2026, 2100])
def test_every_day_of_a_year(year: int) -> None:
    for number in range(366):
        day = date(year, 1, 1) + timedelta(days=number)
        first, next_first = (EPOCH + timedelta(days=n) for n in month_of((day - EPOCH).days))
        assert first == day.replace(day=1)
        assert next_first.day == 1 and first < day + timedelta(days=1) <= next_first
