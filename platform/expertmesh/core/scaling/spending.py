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

    def rate_usd_per_hour(
        self, budget_usd: float, now_usd_per_hour: float, drain_s: float, now_s: float
    ) -> float:
        """That the rest of the day allows. What groups cost while they drain is kept back, so that
        going below a shrinking rate is always still possible."""
        left_s = (math.floor(now_s / DAY_S) + 1) * DAY_S - now_s
        kept_usd = now_usd_per_hour * min(drain_s, left_s) / 3600.0
        left_usd = budget_usd - self.usd - kept_usd
        return max(0.0, left_usd) * 3600.0 / max(left_s, _SHORTEST_S)
