"""Where limits are kept: in this process, in a server of this host, or in Redis."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final, Literal, Protocol

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import Estimate, LimitKind, Refused, Reserved
from expertmesh.core.admission.window import day_of, day_start_s, month_of
from expertmesh.core.domain.tenant import Account

_log = logging.getLogger(__name__)

OnUnavailable = Literal["open", "closed"]
"""What a request gets whose limits cannot be read: let in without a count, or refused."""

_EXPIRE_PERIOD_S = 1.0


class Limiter(Protocol):
    """Neither `reserve` nor `settle` raises, whatever is away."""

    @property
    def connected(self) -> bool:
        """Limits can be read."""
        ...

    def reserve(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> Reserved | Refused | asyncio.Future[Reserved | Refused]:
        """`now_s` is Unix time. Who gives up waiting cancels the future, and owes no settlement."""
        ...

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        """Once for each request that was let in; again does nothing."""
        ...

    async def run(self) -> None:
        """The background work, until it is cancelled."""
        ...

    async def close(self) -> None:
        """Settle what is buffered, within a bounded time; `run` has ended."""
        ...


class SpendSource(Protocol):
    async def spend(
        self, day_start_s: float, month_start_s: float
    ) -> Mapping[str, tuple[int, int]]:
        """By account: spent since the start of the day and of the month, in 1e-12 USD."""
        ...


class Seeded(Protocol):
    def seed(self, account: str, day_pico_usd: int, month_pico_usd: int, now_s: float) -> None: ...


async def spend_so_far(source: SpendSource, now_s: float) -> Mapping[str, tuple[int, int]]:
    """Of the running UTC day and month. Raises what the source raises."""
    day = day_of(now_s)
    month_first_day, _ = month_of(day)
    return await source.spend(float(day_start_s(day)), float(day_start_s(month_first_day)))


async def seed_book(book: Seeded, source: SpendSource, now_s: float) -> None:
    """Raises what the source raises: without it budgets would begin anew with every start."""
    for account, (day_pico, month_pico) in (await spend_so_far(source, now_s)).items():
        book.seed(account, day_pico, month_pico, now_s)


def unavailable(choice: OnUnavailable) -> Reserved | Refused:
    if choice == "open":
        return Reserved(None)
    return Refused(LimitKind.UNAVAILABLE, "", 0.0, 1.0, None)


class LocalLimiter:
    """For one worker: answers at once."""

    def __init__(self, book: LimitBook) -> None:
        """The book has been seeded with what was spent before."""
        self.book: Final = book

    @property
    def connected(self) -> bool:
        return True

    def reserve(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> Reserved | Refused:
        return self.book.reserve(reservation_id, accounts, estimate, now_s)

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        self.book.settle(reservation_id, tokens, pico_usd, now_s)

    async def run(self) -> None:
        await expire_for_ever(self.book)

    async def close(self) -> None:
        """Nothing is buffered."""


async def expire_for_ever(book: LimitBook) -> None:
    while True:
        await asyncio.sleep(_EXPIRE_PERIOD_S)
        expired = book.expire(time.time())
        if expired:
            _log.warning("limits: %d reservations were never settled; kept as estimated", expired)
