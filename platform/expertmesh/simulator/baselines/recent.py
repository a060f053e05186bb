"""A gauge's values of the last while."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Recent:
    span_s: float
    _values: deque[tuple[float, float]] = field(default_factory=deque)

    def add(self, now_s: float, value: float) -> None:
        self._values.append((now_s, value))
        self._forget(now_s)

    def mean(self) -> float:
        """0 without values."""
        count = len(self._values)
        return sum(value for _, value in self._values) / count if count else 0.0

    def largest(self) -> float:
        """0 without values."""
        return max((value for _, value in self._values), default=0.0)

    def _forget(self, now_s: float) -> None:
        # The newest value always counts, so that a span shorter than a tick is a last value.
        while len(self._values) > 1 and self._values[0][0] <= now_s - self.span_s:
            self._values.popleft()
