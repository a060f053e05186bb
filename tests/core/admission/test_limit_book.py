from datetime import UTC, datetime

import pytest

from expertmesh.core.admission.limit_book import (
    PICO_PER_USD,
    Estimate,
    Headroom,
    LimitBook,
    LimitKind,
    Refused,
    Reserved,
)
from expertmesh.core.domain.tenant import Account, Limits

NOON_S = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
MIDNIGHT_S = datetime(2026, 2, 1, tzinfo=UTC).timestamp()
MONTH_END_S = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
DOLLAR = Estimate(10, PICO_PER_USD)


def account(name: str = "tenant:acme", **limits: float) -> Account:
    return Account(name, Limits(**limits))  # type: ignore[arg-type]


def granted(answer: Reserved | Refused) -> Headroom | None:
    assert isinstance(answer, Reserved), answer
    return answer.headroom


def refused(answer: Reserved | Refused) -> Refused:
    assert isinstance(answer, Refused), answer
    return answer


def reserve(
    book: LimitBook,
    reservation_id: str,
    *accounts: Account,
    tokens: int = 0,
    usd: float = 0.0,
    at_s: float = NOON_S,
) -> Reserved | Refused:
    estimate = Estimate(tokens, round(usd * PICO_PER_USD))
    return book.reserve(reservation_id, accounts, estimate, at_s)


def test_without_accounts_all_is_granted_and_settles_once() -> None:
    book = LimitBook()
    assert granted(reserve(book, "a", tokens=10**9, usd=1e6)) is None
    assert book.settle("a", 1, 1, NOON_S) is True
    assert book.settle("a", 1, 1, NOON_S) is False


def test_requests_refill_over_a_minute() -> None:
    book, acme = LimitBook(), account(requests_per_min=60)
    for number in range(60):
        headroom = granted(reserve(book, f"r{number}", acme))
        assert headroom == Headroom(60, 59 - number, number + 1.0, None, None, None)
    answer = refused(reserve(book, "more", acme))
    assert (answer.kind, answer.account, answer.limit) == (
        LimitKind.REQUESTS_PER_MIN,
        "tenant:acme",
        60,
    )
    assert answer.retry_after_s == pytest.approx(1.0, abs=0.002)
    assert answer.headroom == Headroom(60, 0, 60.0, None, None, None)
    granted(reserve(book, "later", acme, at_s=NOON_S + answer.retry_after_s))
    refused(reserve(book, "too many", acme, at_s=NOON_S + answer.retry_after_s))


def test_settled_requests_stay_counted_in_the_minute() -> None:
    book, acme = LimitBook(), account(requests_per_min=1)
    granted(reserve(book, "a", acme))
    book.settle("a", 0, 0, NOON_S)
    assert refused(reserve(book, "b", acme)).kind is LimitKind.REQUESTS_PER_MIN


def test_tokens_that_were_not_used_come_back_at_once() -> None:
    book, acme = LimitBook(), account(tokens_per_min=600)
    granted(reserve(book, "a", acme, tokens=600))
    assert refused(reserve(book, "b", acme, tokens=100)).kind is LimitKind.TOKENS_PER_MIN
    book.settle("a", 100, 0, NOON_S)
    headroom = granted(reserve(book, "b", acme, tokens=100))
    assert headroom == Headroom(None, None, None, 600, 400, 20.0)


def test_tokens_above_the_estimate_are_owed() -> None:
    book, acme = LimitBook(), account(tokens_per_min=600)
    granted(reserve(book, "a", acme, tokens=10))
    book.settle("a", 1200, 0, NOON_S)
    answer = refused(reserve(book, "b", acme, tokens=10))
    assert answer.headroom is not None and answer.headroom.remaining_tokens == 0
    # 600 owed and 10 wanted, at 10 a second.
    assert answer.retry_after_s == pytest.approx(61.0, abs=0.002)
    refused(reserve(book, "b", acme, tokens=10, at_s=NOON_S + 60.9))
    granted(reserve(book, "b", acme, tokens=10, at_s=NOON_S + 61))


def test_an_estimate_above_the_bucket_is_let_in_when_it_is_full() -> None:
    book, acme = LimitBook(), account(tokens_per_min=600)
    granted(reserve(book, "small", acme, tokens=60))
    answer = refused(reserve(book, "huge", acme, tokens=1800))
    assert answer.retry_after_s == pytest.approx(6.0, abs=0.002)
    granted(reserve(book, "huge", acme, tokens=1800, at_s=NOON_S + 6))
    answer = refused(reserve(book, "after", acme, tokens=1, at_s=NOON_S + 6))
    assert answer.retry_after_s == pytest.approx(120.1, abs=0.01)


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        (Limits(requests_per_min=0), LimitKind.REQUESTS_PER_MIN),
        (Limits(tokens_per_min=0), LimitKind.TOKENS_PER_MIN),
        (Limits(concurrent_requests=0), LimitKind.CONCURRENT_REQUESTS),
        (Limits(usd_per_day=0.0), LimitKind.USD_PER_DAY),
        (Limits(usd_per_month=0.0), LimitKind.USD_PER_MONTH),
    ],
)
def test_a_limit_of_zero_lets_nothing_in(limits: Limits, kind: LimitKind) -> None:
    book = LimitBook()
    answer = refused(book.reserve("a", (Account("key:k", limits),), DOLLAR, NOON_S))
    assert answer.kind is kind and answer.limit == 0 and answer.retry_after_s > 0


def test_concurrency_counts_open_reservations() -> None:
    book, acme = LimitBook(), account(concurrent_requests=2)
    granted(reserve(book, "a", acme))
    granted(reserve(book, "b", acme))
    answer = refused(reserve(book, "c", acme))
    assert (answer.kind, answer.limit, answer.headroom) == (LimitKind.CONCURRENT_REQUESTS, 2, None)
    assert book.settle("a", 0, 0, NOON_S) and not book.settle("a", 0, 0, NOON_S)
    granted(reserve(book, "c", acme))
    refused(reserve(book, "d", acme))


def test_a_thousand_at_once_against_a_budget_worth_a_hundred() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0)
    answers = [reserve(book, f"r{number}", acme, usd=0.01) for number in range(1000)]
    assert sum(isinstance(answer, Reserved) for answer in answers) == 100
    assert book.committed_pico_usd("tenant:acme") == (PICO_PER_USD, PICO_PER_USD)
    answer = refused(answers[-1])
    assert (answer.kind, answer.limit) == (LimitKind.USD_PER_DAY, 1.0)
    assert answer.retry_after_s == MIDNIGHT_S - NOON_S


def test_money_that_was_not_spent_comes_back() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0)
    granted(reserve(book, "a", acme, usd=1.0))
    refused(reserve(book, "b", acme, usd=1e-12))
    book.settle("a", 0, PICO_PER_USD // 4, NOON_S)
    granted(reserve(book, "b", acme, usd=0.75))
    refused(reserve(book, "c", acme, usd=1e-12))


def test_a_settlement_never_charges_more_than_was_reserved() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0)
    granted(reserve(book, "a", acme, usd=0.25))
    book.settle("a", 0, PICO_PER_USD, NOON_S)
    assert book.committed_pico_usd("tenant:acme") == (PICO_PER_USD // 4,) * 2
    assert book.clipped_pico_usd == 3 * PICO_PER_USD // 4


def test_a_new_day_starts_at_zero_and_an_old_reservation_changes_nothing_in_it() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0, usd_per_month=5.0)
    granted(reserve(book, "old", acme, usd=1.0, at_s=MIDNIGHT_S - 1))
    refused(reserve(book, "b", acme, usd=1.0, at_s=MIDNIGHT_S - 1))
    granted(reserve(book, "b", acme, usd=1.0, at_s=MIDNIGHT_S))
    book.settle("old", 0, 0, MIDNIGHT_S)
    assert book.committed_pico_usd("tenant:acme") == (PICO_PER_USD, PICO_PER_USD)
    refused(reserve(book, "c", acme, usd=1.0, at_s=MIDNIGHT_S))


def test_the_month_goes_on_over_midnight_and_ends_with_the_calendar() -> None:
    book, acme = LimitBook(), account(usd_per_month=1.0)
    granted(reserve(book, "a", acme, usd=1.0, at_s=MIDNIGHT_S))
    answer = refused(reserve(book, "b", acme, usd=0.5, at_s=MONTH_END_S - 1))
    assert (answer.kind, answer.retry_after_s) == (LimitKind.USD_PER_MONTH, 1.0)
    granted(reserve(book, "b", acme, usd=0.5, at_s=MONTH_END_S))


@pytest.mark.parametrize("limit", ["usd_per_day", "usd_per_month"])
def test_a_budget_can_be_spent_to_the_last_pico_dollar_and_no_further(limit: str) -> None:
    book, acme = LimitBook(), account(**{limit: 1.0})
    assert isinstance(book.reserve("a", (acme,), Estimate(0, PICO_PER_USD - 1), NOON_S), Reserved)
    assert isinstance(book.reserve("b", (acme,), Estimate(0, 2), NOON_S), Refused)
    assert isinstance(book.reserve("b", (acme,), Estimate(0, 1), NOON_S), Reserved)
    assert isinstance(book.reserve("c", (acme,), Estimate(0, 1), NOON_S), Refused)


def test_until_a_limit_changes_the_old_one_refills() -> None:
    book = LimitBook()
    granted(reserve(book, "a", account(tokens_per_min=600), tokens=600))
    # 10 a second for 20 s: 400 are still used under the new limit.
    headroom = granted(reserve(book, "b", account(tokens_per_min=6_000), at_s=NOON_S + 20))
    assert headroom is not None and headroom.remaining_tokens == 5_600


def test_all_accounts_or_none() -> None:
    book = LimitBook()
    tenant = account("tenant:acme", requests_per_min=10, tokens_per_min=600, usd_per_day=10.0)
    key = account("key:k", usd_per_day=0.5)
    answer = refused(reserve(book, "a", tenant, key, tokens=10, usd=1.0))
    assert (answer.account, answer.kind) == ("key:k", LimitKind.USD_PER_DAY)
    assert answer.headroom == Headroom(10, 10, 0.0, 600, 600, 0.0)
    assert book.committed_pico_usd("tenant:acme") == (0, 0)
    assert book.open_reservations == 0
    assert not book.settle("a", 0, 0, NOON_S)


def test_headroom_is_that_of_the_tightest_account() -> None:
    book = LimitBook()
    tenant = account("tenant:acme", requests_per_min=60, tokens_per_min=600)
    key = account("key:k", requests_per_min=120, tokens_per_min=300)
    headroom = granted(reserve(book, "a", tenant, key, tokens=30))
    assert headroom == Headroom(60, 59, 1.0, 300, 270, 6.0)


def test_the_refusal_names_the_limit_that_lasts_longest() -> None:
    book = LimitBook()
    acme = account(requests_per_min=1, usd_per_day=1.0, concurrent_requests=1)
    granted(reserve(book, "a", acme, usd=1.0))
    assert refused(reserve(book, "b", acme, usd=1.0)).kind is LimitKind.USD_PER_DAY
    assert refused(reserve(book, "b", acme)).kind is LimitKind.REQUESTS_PER_MIN


def test_limits_may_change_and_what_was_used_stays_used() -> None:
    book = LimitBook()
    granted(reserve(book, "a", account(usd_per_day=1.0, tokens_per_min=60), tokens=60, usd=0.5))
    raised = account(usd_per_day=2.0, tokens_per_min=600)
    assert granted(reserve(book, "b", raised, tokens=40, usd=1.0)) == Headroom(
        None, None, None, 600, 500, 10.0
    )
    lowered = account(usd_per_day=1.0, tokens_per_min=60)
    assert refused(reserve(book, "c", lowered, usd=0.1)).kind is LimitKind.USD_PER_DAY
    # What is spent without a limit counts once there is one again.
    granted(reserve(book, "c", account(), usd=5.0))
    refused(reserve(book, "d", account(usd_per_day=6.4), usd=0.1))
    granted(reserve(book, "d", account(usd_per_day=6.7), usd=0.1))


def test_a_reservation_from_before_a_limit_gives_nothing_back_to_it() -> None:
    book = LimitBook()
    granted(reserve(book, "a", account(), tokens=1000))
    granted(reserve(book, "b", account(tokens_per_min=60), tokens=60))
    book.settle("a", 0, 0, NOON_S)
    refused(reserve(book, "c", account(tokens_per_min=60), tokens=1))


def test_the_ledger_is_counted_once() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0, usd_per_month=2.0)
    granted(reserve(book, "before", acme, usd=0.25))
    for _ in range(2):
        book.seed("tenant:acme", PICO_PER_USD // 2, PICO_PER_USD, NOON_S)
    assert book.committed_pico_usd("tenant:acme") == (
        3 * PICO_PER_USD // 4,
        5 * PICO_PER_USD // 4,
    )
    granted(reserve(book, "a", acme, usd=0.25))
    refused(reserve(book, "b", acme, usd=1e-12))
    granted(reserve(book, "b", acme, usd=1.0, at_s=MIDNIGHT_S))


def test_lost_reservations_settle_at_their_estimate() -> None:
    book = LimitBook(reservation_s=100)
    acme = account(usd_per_day=1.0, concurrent_requests=2)
    granted(reserve(book, "lost", acme, usd=0.75))
    granted(reserve(book, "young", acme, usd=0.25, at_s=NOON_S + 50))
    assert book.expire(NOON_S + 99) == 0
    assert book.expire(NOON_S + 100) == 1
    assert book.settle("lost", 0, 0, NOON_S + 101) is False
    assert book.open_reservations == 1
    assert book.committed_pico_usd("tenant:acme") == (PICO_PER_USD, PICO_PER_USD)
    granted(reserve(book, "a", acme, at_s=NOON_S + 101))


def test_an_id_that_is_open_is_forfeited_not_lost() -> None:
    book, acme = LimitBook(), account(usd_per_day=1.0, concurrent_requests=1)
    granted(reserve(book, "a", acme, usd=0.5))
    granted(reserve(book, "a", acme, usd=0.5))
    refused(reserve(book, "b", acme))
    assert book.settle("a", 0, 0, NOON_S) and not book.settle("a", 0, 0, NOON_S)
    assert book.committed_pico_usd("tenant:acme")[0] == PICO_PER_USD // 2


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    book, acme = LimitBook(), account(requests_per_min=60, usd_per_day=1.0)
    granted(reserve(book, "a", acme, usd=1.0, at_s=MIDNIGHT_S))
    refused(reserve(book, "b", acme, usd=1.0, at_s=MIDNIGHT_S - 10))
    headroom = granted(reserve(book, "b", acme, at_s=MIDNIGHT_S - 10))
    assert headroom is not None and headroom.remaining_requests == 58


def test_accounts_that_nobody_uses_are_forgotten_after_a_month() -> None:
    book = LimitBook()
    for number in range(100):
        granted(reserve(book, f"r{number}", account(f"key:{number}", usd_per_day=1.0)))
        if number:
            book.settle(f"r{number}", 0, 0, NOON_S)
    granted(reserve(book, "later", account("key:new"), at_s=MONTH_END_S + 1))
    assert len(book._records) == 2  # The one whose reservation is open, and the new one.
