import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.scaling.spending import DAY_S, Spending

MIDNIGHT_S = 20_000 * DAY_S


def test_what_it_costs_is_added_up() -> None:
    noon_s = MIDNIGHT_S + DAY_S / 2
    spending = Spending().spent(36.0, 100.0, noon_s).spent(36.0, 50.0, noon_s + 50)
    assert spending.day == 20_000
    assert spending.usd == pytest.approx(1.5)


def test_at_midnight_it_begins_anew_and_what_belongs_to_yesterday_stays_there() -> None:
    before = Spending().spent(36.0, 100.0, MIDNIGHT_S - 10)
    after = before.spent(36.0, 40.0, MIDNIGHT_S + 30)
    assert (before.day, after.day) == (19_999, 20_000)
    assert after.usd == pytest.approx(36.0 * 30 / 3600)


def test_the_rate_is_what_is_left_over_the_rest_of_the_day() -> None:
    spending = Spending(20_000, 60.0)
    at_s = MIDNIGHT_S + 12 * 3600
    assert spending.rate_usd_per_hour(120.0, 0.0, at_s) == pytest.approx(5.0)


def test_what_drains_cost_is_kept_back() -> None:
    spending = Spending(20_000, 60.0)
    at_s = MIDNIGHT_S + 12 * 3600
    assert spending.rate_usd_per_hour(120.0, 4800.0, at_s) == pytest.approx(
        60 * 3600 / (43_200 + 4800)
    )


def test_near_midnight_nothing_is_spent_in_a_rush() -> None:
    at_s = MIDNIGHT_S + DAY_S - 60
    rate = Spending(20_000, 90.0).rate_usd_per_hour(100.0, 0.0, at_s)
    assert rate == pytest.approx(10.0 * 3600 / 900)


def test_a_budget_that_is_spent_is_no_money() -> None:
    assert Spending(20_000, 101.0).rate_usd_per_hour(100.0, 60.0, MIDNIGHT_S + 1) == 0.0


@given(
    st.floats(1.0, 1e4),
    st.floats(0.0, 50.0),
    st.floats(0.0, 600.0),
    st.lists(st.floats(1.0, 600.0), min_size=1, max_size=300),
)
def test_who_never_costs_more_than_the_rate_or_drains_keeps_the_day(
    budget_usd: float, group_usd_per_hour: float, drain_s: float, steps_s: list[float]
) -> None:
    """Groups are started up to the rate; once it has fallen below what they cost, they drain."""
    spending, now_s = Spending(20_000, 0.0), MIDNIGHT_S
    cost, leaves_at_s = 0.0, 0.0
    for step_s in steps_s:
        rate = spending.rate_usd_per_hour(budget_usd, drain_s, now_s)
        if cost > rate:
            over_s = min(drain_s, MIDNIGHT_S + DAY_S - now_s)
            assert spending.usd + cost * over_s / 3600 <= budget_usd + cost * 600 / 3600 + 1e-6
            break
        if cost + group_usd_per_hour <= rate and not leaves_at_s:
            cost += group_usd_per_hour
        now_s += step_s
        if now_s >= MIDNIGHT_S + DAY_S:
            break
        spending = spending.spent(cost, step_s, now_s)
