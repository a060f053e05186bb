"""What a request asks of its accounts before it runs, and what it is told.

Some of these are made for every request: a frozen dataclass takes three times as long.
"""

from decimal import ROUND_FLOOR, Decimal
from enum import StrEnum
from functools import lru_cache

import msgspec

PICO_PER_USD = 10**12


class LimitKind(StrEnum):
    REQUESTS_PER_MIN = "requests_per_min"
    TOKENS_PER_MIN = "tokens_per_min"
    CONCURRENT_REQUESTS = "concurrent_requests"
    USD_PER_DAY = "usd_per_day"
    USD_PER_MONTH = "usd_per_month"
    UNAVAILABLE = "unavailable"
    """The limits could not be read, and calls are to be refused then."""


class Estimate(msgspec.Struct, frozen=True, gc=False):
    tokens: int
    """A guess: prompt and completion; what is used beyond it is owed."""
    pico_usd: int
    """An upper bound, in 1e-12 USD: no more than this is ever charged."""


class Headroom(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is left under the tightest of the accounts; None where none has such a limit."""

    limit_requests: int | None
    remaining_requests: int | None
    reset_requests_s: float | None
    """Until all of the limit is free again, if nothing else is used."""
    limit_tokens: int | None
    remaining_tokens: int | None
    reset_tokens_s: float | None


class Reserved(msgspec.Struct, frozen=True, gc=False):
    headroom: Headroom | None
    """None when no account limits requests or tokens, or the limits could not be read."""


class Refused(msgspec.Struct, frozen=True, gc=False):
    kind: LimitKind
    account: str
    limit: float
    """Of the kind, in its unit."""
    retry_after_s: float
    """Until the same request may fit, if nothing else is used."""
    headroom: Headroom | None


@lru_cache(maxsize=4096)
def pico_of_usd(usd: float) -> int:
    """By the shortest decimal form of the number, so 0.3 is exactly 300,000,000,000.

    Digits beyond a pico-dollar are dropped. Raises ValueError for what is no amount.
    """
    amount = Decimal(str(usd))
    if not amount.is_finite():
        raise ValueError(f"an amount of money must be finite, got {usd!r}")
    return int((amount * PICO_PER_USD).to_integral_value(ROUND_FLOOR))
