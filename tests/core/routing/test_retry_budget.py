import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.routing.retry_budget import RetryBudget, RetryBudgetConfig


def granted(budget: RetryBudget, now_s: float, asked: int) -> int:
    return sum(budget.may_retry(now_s) for _ in range(asked))


def test_without_traffic_the_minimum_is_allowed() -> None:
    assert granted(RetryBudget(), 0.0, 100) == 30, "3/s over 10 s"
    budget = RetryBudget()
    assert [granted(budget, second, 9) for second in (0, 5, 9, 10, 15, 20)] == [9, 9, 9, 9, 9, 9]
    assert granted(budget, 20.5, 90) == 12, "of 30, 9 each were taken at 15 and 20 s"


def test_a_fifth_of_the_requests_may_be_retried() -> None:
    budget = RetryBudget()
    for n in range(1000):
        budget.request(n / 100)
    assert granted(budget, 9.99, 1000) == 230
    assert not budget.may_retry(9.99)


def test_old_requests_and_retries_leave_the_window() -> None:
    budget = RetryBudget(RetryBudgetConfig(share=0.5, minimum_per_s=0.0, window_s=4))
    for _ in range(10):
        budget.request(1.9)
    assert granted(budget, 4.99, 3) == 3
    assert granted(budget, 5.0, 3) == 0
    for _ in range(6):
        budget.request(7.5)
    assert granted(budget, 7.99, 9) == 0, "the three retries of 4.99 still count"
    assert granted(budget, 8.0, 9) == 3


@pytest.mark.parametrize("pause_s", [10, 11, 1e6, 1e12])
def test_a_long_pause_empties_the_window(pause_s: float) -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.request(5.0)
    granted(budget, 5.0, 50)
    assert granted(budget, 5.0 + pause_s, 100) == 30


def test_no_retries_at_all_when_configured_so() -> None:
    budget = RetryBudget(RetryBudgetConfig(share=0.0, minimum_per_s=0.0))
    budget.request(0.0)
    assert not budget.may_retry(0.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.booleans(), st.integers(1, 20)), min_size=1, max_size=80
    ),
    st.integers(1, 6),
)
def test_in_every_window_retries_stay_within_the_share_and_as_many_as_that_are_granted(
    course: list[tuple[float, bool, int]], window_s: int
) -> None:
    config = RetryBudgetConfig(window_s=window_s)
    budget = RetryBudget(config)
    now_s = 0.0
    requests: list[int] = []
    retries: list[int] = []
    for pause_s, is_request, count in course:
        now_s += pause_s
        second = int(now_s)
        for _ in range(count):
            if is_request:
                budget.request(now_s)
                requests.append(second)
                continue
            asked = sum(second - window_s < at <= second for at in requests)
            spent = sum(second - window_s < at <= second for at in retries)
            allowed = spent + 1 <= config.share * asked + config.minimum_per_s * window_s
            assert budget.may_retry(now_s) is allowed, (now_s, asked, spent)
            if allowed:
                retries.append(second)
