"""How long a group was held, and at what price: the cost side of the ledger."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CapacityHold:
    group: str
    model: str
    pool: str
    usd_per_hour: float
    """As in the group's spec; rated through its shortest decimal form, so 0.3 is exactly 0.3."""
    started_at_s: float
    """Unix time from which the group occupied nodes. A controller that re-adopts a group passes
    the start that the ledger already holds."""
    seen_at_s: float
    """Unix time at which the group was last known to be held; an open hold costs until then."""
    ended_at_s: float | None = None

    @property
    def held_until_s(self) -> float:
        return self.seen_at_s if self.ended_at_s is None else self.ended_at_s
