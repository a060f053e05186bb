"""The newest samples of one source's totals: enough to tell rates over about the last ten seconds.

The times are this process' own, of when a sample came in: a source's clock may jump.
"""

from collections import deque
from typing import Generic, TypeVar

Sample = TypeVar("Sample")

_SPAN_S = 10.0
_LEAST_SPAN_S = 0.5
"""Two samples that came in a moment after each other say nothing about a rate."""
_LONGEST_GAP_S = 60.0
"""After a longer silence, or a jump of the clock, a mean over the gap would say nothing."""


class Recent(Generic[Sample]):
    """Clear it when the source's totals have begun again at 0."""

    def __init__(self) -> None:
        self._earlier: deque[tuple[float, Sample]] = deque()
        self._last: tuple[float, Sample] | None = None

    @property
    def last(self) -> Sample | None:
        return None if self._last is None else self._last[1]

    @property
    def last_at_s(self) -> float | None:
        return None if self._last is None else self._last[0]

    def add(self, at_s: float, sample: Sample) -> None:
        if self._last is not None:
            if not 0.0 <= at_s - self._last[0] <= _LONGEST_GAP_S:
                self.clear()
            elif not self._earlier or self._last[0] - self._earlier[-1][0] >= _LEAST_SPAN_S:
                self._earlier.append(self._last)
        self._last = at_s, sample
        while len(self._earlier) > 1 and self._earlier[1][0] <= at_s - _SPAN_S:
            self._earlier.popleft()

    def clear(self) -> None:
        self._earlier.clear()
        self._last = None

    def span(self) -> tuple[float, Sample, Sample] | None:
        """Its length in seconds, and the samples at its ends; None until it is long enough."""
        if self._last is None or not self._earlier:
            return None
        first_at_s, first = self._earlier[0]
        last_at_s, last = self._last
        if last_at_s - first_at_s < _LEAST_SPAN_S:
            return None
        return last_at_s - first_at_s, first, last


def rate(before: int, after: int, span_s: float) -> float:
    """Per second; three places are enough, and keep the journal small."""
    return round(max(0, after - before) / span_s, 3)
