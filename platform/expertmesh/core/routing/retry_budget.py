"""How many requests may be tried again: a share of what has lately been asked.

When everything fails, retries double the load on what is left. A budget over all requests stops
that, as in Finagle's RetryBudget and Envoy's retry budgets, and lets single failures be hidden.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryBudgetConfig:
    share: float = 0.2
    """Retries per request over the window."""
    minimum_per_s: float = 3.0
    """Allowed whatever the traffic: with few requests a share of them is less than one."""
    window_s: int = 10


class RetryBudget:
    """Counts in slots of one second, of which the window's last ones count."""

    __slots__ = (
        "_free",
        "_requests",
        "_retries",
        "_second",
        "_share",
        "_slots",
        "_spent",
        "_total",
    )

    def __init__(self, config: RetryBudgetConfig = RetryBudgetConfig()) -> None:
        self._share = config.share
        self._slots = max(1, config.window_s)
        self._free = config.minimum_per_s * self._slots
        self._requests = [0] * self._slots
        self._retries = [0] * self._slots
        self._total = 0
        """Requests in the window."""
        self._spent = 0
        """Retries in the window."""
        self._second: int | None = None

    def request(self, now_s: float) -> None:
        """A first attempt; `now_s` is monotonic."""
        second = int(now_s)
        if second != self._second:
            self._advance(second)
        self._requests[second % self._slots] += 1
        self._total += 1

    def may_retry(self, now_s: float) -> bool:
        """True takes one retry from the budget: ask only for a retry that will be made."""
        second = int(now_s)
        if second != self._second:
            self._advance(second)
        if self._spent + 1 > self._total * self._share + self._free:
            return False
        self._retries[second % self._slots] += 1
        self._spent += 1
        return True

    def _advance(self, second: int) -> None:
        """Empty the slots that fall out of the window."""
        last, slots = self._second, self._slots
        if last is not None and second < last:
            return  # late news count for their old slot
        first = second - slots + 1 if last is None else max(last + 1, second - slots + 1)
        for passed in range(first, second + 1):
            slot = passed % slots
            self._total -= self._requests[slot]
            self._spent -= self._retries[slot]
            self._requests[slot] = self._retries[slot] = 0
        self._second = second
