from tests.gateway.limiting import DAY_S, MONTH_S, NOON_S, PICO, FixedSpend, account, reserve

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import LimitKind, Refused, Reserved
from expertmesh.gateway.limiter import LocalLimiter, seed_book, unavailable


async def test_a_thousand_at_once_against_a_budget_worth_a_hundred() -> None:
    limiter, acme = LocalLimiter(LimitBook()), account(usd_per_day=1.0)
    answers = [await reserve(limiter, f"r{number}", acme, usd=0.01) for number in range(1000)]
    assert sum(isinstance(answer, Reserved) for answer in answers) == 100


async def test_it_answers_at_once_and_settles() -> None:
    limiter, acme = LocalLimiter(LimitBook()), account(concurrent_requests=1)
    assert isinstance(await reserve(limiter, "a", acme), Reserved)
    assert isinstance(await reserve(limiter, "b", acme), Refused)
    limiter.settle("a", 0, 0, NOON_S)
    limiter.settle("a", 0, 0, NOON_S)
    assert isinstance(await reserve(limiter, "b", acme), Reserved)
    assert isinstance(await reserve(limiter, "c", acme), Refused)
    await limiter.close()


async def test_it_begins_with_what_the_ledger_says() -> None:
    source = FixedSpend({"tenant:acme": (PICO // 4, 3 * PICO)})
    limiter = LocalLimiter(LimitBook())
    await seed_book(limiter.book, source, NOON_S)
    assert source.asked == [(DAY_S, MONTH_S)]
    acme = account(usd_per_day=1.0, usd_per_month=3.5)
    assert isinstance(await reserve(limiter, "a", acme, usd=0.5), Reserved)
    answer = await reserve(limiter, "b", acme, usd=0.2)
    assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_MONTH


def test_the_configured_choice() -> None:
    assert unavailable("open") == Reserved(None)
    closed = unavailable("closed")
    assert isinstance(closed, Refused)
    assert (closed.kind, closed.retry_after_s) == (LimitKind.UNAVAILABLE, 1.0)
