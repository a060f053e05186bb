"""A day's budget as a rate: what is left of it over what is left of the day."""

import math
from dataclasses import dataclass

DAY_S = 86_400.0
_SHORTEST_S = 900.0
"""Near midnight the rest of the budget is not spent in a rush."""


@dataclass(frozen=True, slots=True)
class Spending:
    day: int = 0
    """Days since 1970 (UTC)."""
    usd: float = 0.0
    """Spent on it so far."""

    def spent(self, usd_per_hour: float, over_s: float, now_s: float) -> "Spending":
        """With what has been costing so much until now; what belongs to yesterday stays there."""
        today = math.floor(now_s / DAY_S)
        if today != self.day:
            over_s = min(over_s, now_s - today * DAY_S)
            return Spending(today, usd_per_hour * over_s / 3600.0)
        return Spending(today, self.usd + usd_per_hour * over_s / 3600.0)

    def rate_usd_per_hour(self, budget_usd: float, drain_s: float, now_s: float) -> float:
        """That the rest of the day allows, and one more drain: so what groups cost while they drain
        is always left, and a fleet that is just within the rate stays within it."""
        left_s = (math.floor(now_s / DAY_S) + 1) * DAY_S - now_s
        over_s = max(left_s, _SHORTEST_S) + min(drain_s, left_s)
        return max(0.0, budget_usd - self.usd) * 3600.0 / over_s
