"""What limits leave and why they refuse, in the words of both protocols."""

from datetime import UTC, datetime
from typing import Final

from expertmesh.core.admission.limit_book import Headroom, LimitKind, Refused
from expertmesh.gateway.api import ApiError, Protocol

_NAMES: Final = {
    LimitKind.REQUESTS_PER_MIN: "requests per minute",
    LimitKind.TOKENS_PER_MIN: "tokens per minute",
    LimitKind.CONCURRENT_REQUESTS: "requests at once",
    LimitKind.USD_PER_DAY: "dollars per day",
    LimitKind.USD_PER_MONTH: "dollars per month",
}
_MONEY: Final = frozenset((LimitKind.USD_PER_DAY, LimitKind.USD_PER_MONTH))


def limit_lines(protocol: Protocol, headroom: Headroom, now_s: float) -> bytes:
    """Header lines; `now_s` is Unix time."""
    lines = b""
    if headroom.limit_requests is not None:
        lines = _lines(
            protocol,
            b"requests",
            headroom.limit_requests,
            headroom.remaining_requests or 0,
            headroom.reset_requests_s or 0.0,
            now_s,
        )
    if headroom.limit_tokens is not None:
        lines += _lines(
            protocol,
            b"tokens",
            headroom.limit_tokens,
            headroom.remaining_tokens or 0,
            headroom.reset_tokens_s or 0.0,
            now_s,
        )
    return lines


def _lines(
    protocol: Protocol, what: bytes, limit: int, remaining: int, reset_s: float, now_s: float
) -> bytes:
    if protocol is Protocol.ANTHROPIC:
        at = datetime.fromtimestamp(now_s + reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            b"anthropic-ratelimit-%b-limit: %d\r\nanthropic-ratelimit-%b-remaining: %d\r\n"
            b"anthropic-ratelimit-%b-reset: %b\r\n"
        ) % (what, limit, what, remaining, what, at.encode())
    return (
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\n"
        b"x-ratelimit-reset-%b: %.3fs\r\n"
    ) % (what, limit, what, remaining, what, reset_s)


def limit_error(refused: Refused) -> ApiError:
    if refused.kind is LimitKind.UNAVAILABLE:
        return ApiError(
            503,
            "The limits of this key cannot be checked now; try again.",
            code="limits_unavailable",
            retry_after_s=refused.retry_after_s,
        )
    subject, _, name = refused.account.partition(":")
    limit = f"{refused.limit:g} {_NAMES[refused.kind]}"
    if refused.kind in _MONEY:
        return ApiError(
            429,
            f"The {subject} '{name}' has no budget left for this request: its limit is {limit}. A "
            "lower max_tokens reserves less.",
            code="insufficient_quota",
            retry_after_s=refused.retry_after_s,
            retry=False,
        )
    return ApiError(
        429,
        f"The {subject} '{name}' is over its limit of {limit}; "
        f"try again in {refused.retry_after_s:.1f} s.",
        code="rate_limit_exceeded",
        retry_after_s=refused.retry_after_s,
    )
