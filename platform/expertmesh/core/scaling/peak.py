"""The highest value of the last while: a need is only gone when it has been gone for long."""

import itertools
from dataclasses import dataclass

_MOST = 48
"""Values that are remembered; where there are more, two that are close in time become one."""


@dataclass(frozen=True, slots=True)
class Peak:
    falls: tuple[tuple[float, float], ...] = ()
    """(time, value): when each value was last reached or topped; times rise and values fall."""

    def seen(self, value: float, now_s: float, keep_s: float) -> "Peak":
        kept = [
            entry
            for entry in self.falls
            if now_s - keep_s <= entry[0] <= now_s and entry[1] > value
        ]
        if len(kept) >= _MOST:
            gaps = [later[0] - entry[0] for entry, later in itertools.pairwise(kept)]
            at = gaps.index(min(gaps))
            # The higher value is taken to have lasted a little longer.
            kept[at : at + 2] = [(kept[at + 1][0], kept[at][1])]
        return Peak((*kept, (now_s, value)))

    def later(self, by_s: float) -> "Peak":
        """As if it had all been seen so much later: for a time that does not count."""
        return Peak(tuple((at_s + by_s, value) for at_s, value in self.falls))

    def since(self, from_s: float) -> float:
        """The highest value reached at that time or later; 0 when nothing was seen."""
        return max((value for at_s, value in self.falls if at_s >= from_s), default=0.0)
