"""How fast a queue empties, and so when it is worth to come back."""

from math import exp
from typing import Final

_LEAST_S = 1.0
_MOST_S = 120.0
"""Clients of OpenAI's kind ignore longer waits."""
_UNKNOWN_S = 5.0
_LEAST_PERIOD_S = 0.25
"""Rates over shorter times are noise."""


class DrainRate:
    """Tokens served per second, as an average that forgets exponentially."""

    __slots__ = ("_memory_s", "_rate", "_served", "_since_s", "_weight")

    def __init__(self, now_s: float, memory_s: float = 30.0) -> None:
        """After `memory_s` what was seen counts for 1/e."""
        self._memory_s: Final = memory_s
        self._since_s = now_s
        self._served = 0
        self._rate = 0.0
        self._weight = 0.0

    def served(self, tokens: int, now_s: float) -> None:
        self._served += tokens
        if now_s - self._since_s >= _LEAST_PERIOD_S:
            self._fold(now_s)

    def tokens_per_s(self, now_s: float) -> float | None:
        """None before the first measurement. Times without service count."""
        if now_s - self._since_s >= _LEAST_PERIOD_S:
            self._fold(now_s)
        return self._rate / self._weight if self._weight > 0.0 else None

    def retry_after_s(self, backlog_tokens: int, now_s: float) -> float:
        """Until so many tokens are served, between 1 and 120 s."""
        rate = self.tokens_per_s(now_s)
        if rate is None:
            return _UNKNOWN_S
        if backlog_tokens <= 0:
            return _LEAST_S
        if rate * _MOST_S <= backlog_tokens:
            return _MOST_S
        return max(_LEAST_S, backlog_tokens / rate)

    def _fold(self, now_s: float) -> None:
        elapsed_s = now_s - self._since_s
        keep = exp(-elapsed_s / self._memory_s)
        self._rate = self._rate * keep + self._served / elapsed_s * (1.0 - keep)
        # So that the first measurement counts in full, rather than as an average with nothing.
        self._weight = self._weight * keep + (1.0 - keep)
        self._since_s = now_s
        self._served = 0
