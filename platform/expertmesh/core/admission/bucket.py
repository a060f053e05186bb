"""A rate limit that can be owed to: so much at once, and it comes back over a minute."""

_PERIOD_S = 60.0
_LATER_S = 0.001
"""Added to waits: who comes back exactly then is not refused for a rounding error."""


class Bucket:
    """Counts what is used rather than what is left: never negative, and above `capacity` when
    more was used than there was. Times never go back; the caller sees to it.
    """

    __slots__ = ("at_s", "capacity", "per_s", "used")

    def __init__(self, capacity: int, at_s: float) -> None:
        self.capacity = capacity
        self.per_s = capacity / _PERIOD_S
        self.used = 0.0
        """As of `at_s`."""
        self.at_s = at_s

    def resize(self, capacity: int, now_s: float) -> None:
        """What has been used stays used."""
        self.refill(now_s)
        self.capacity = capacity
        self.per_s = capacity / _PERIOD_S

    def refill(self, now_s: float) -> float:
        """Returns what is used now."""
        used = self.used - (now_s - self.at_s) * self.per_s
        self.used = used = used if used > 0.0 else 0.0
        self.at_s = now_s
        return used

    def correct(self, amount: float, now_s: float) -> None:
        """Less or more was used than had been taken."""
        used = self.refill(now_s) + amount
        self.used = used if used > 0.0 else 0.0

    def wait_s(self, amount: int, now_s: float) -> float:
        """0 when the amount fits. One above the capacity fits when nothing is used."""
        used = self.refill(now_s)
        if self.capacity <= 0:
            return _PERIOD_S if used + amount > 0.0 else 0.0
        missing = used if amount > self.capacity else used + amount - self.capacity
        return missing / self.per_s + _LATER_S if missing > 0.0 else 0.0

    def reset_s(self) -> float:
        """Until nothing is used."""
        return self.used / self.per_s if self.per_s > 0.0 else _PERIOD_S
