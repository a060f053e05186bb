"""What the tests of all limiters share."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from expertmesh.core.admission.reservation import Estimate, Refused, Reserved
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.gateway.limiter import Limiter

NOON_S = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
DAY_S = datetime(2026, 1, 31, tzinfo=UTC).timestamp()
MONTH_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
PICO = 10**12


def account(name: str = "tenant:acme", **limits: float) -> Account:
    return Account(name, Limits(**limits))  # type: ignore[arg-type]


async def reserve(
    limiter: Limiter,
    reservation_id: str,
    *accounts: Account,
    tokens: int = 0,
    usd: float = 0.0,
    at_s: float = NOON_S,
) -> Reserved | Refused:
    estimate = Estimate(tokens, round(usd * PICO))
    answer = limiter.reserve(reservation_id, accounts, estimate, at_s)
    if isinstance(answer, Reserved | Refused):
        return answer
    async with asyncio.timeout(10):
        return await answer


@asynccontextmanager
async def running(limiter: Limiter) -> AsyncIterator[None]:
    task = asyncio.create_task(limiter.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await limiter.close()


async def until(condition: object, what: str = "it") -> None:
    """A callable, polled for ten seconds."""
    assert callable(condition)
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what} did not happen")


class FixedSpend:
    def __init__(self, spent: Mapping[str, tuple[int, int]]) -> None:
        self.spent = spent
        self.asked: list[tuple[float, float]] = []

    async def spend(
        self, day_start_s: float, month_start_s: float
    ) -> Mapping[str, tuple[int, int]]:
        self.asked.append((day_start_s, month_start_s))
        return self.spent
