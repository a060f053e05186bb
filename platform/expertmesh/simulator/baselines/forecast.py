"""One step ahead in an even time series: as Dynamo's planner predicts its load.

Source: `components/src/dynamo/planner/core/load/predictors.py` of Dynamo: constant, ARIMA and
Kalman. Auto-ARIMA is replaced by the family of smoothers with a damped trend, which are the
optimal predictors of ARIMA(1,1,2), (0,2,2) and (0,1,1) processes: the parameters are those with
the least squared error so far.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_LEAST_POINTS = 5


class Forecast(Protocol):
    def add(self, value: float) -> None: ...

    def next(self) -> float:
        """0 without values, never negative."""
        ...


@dataclass(slots=True)
class Constant:
    """The last value."""

    _last: float = 0.0

    def add(self, value: float) -> None:
        self._last = value

    def next(self) -> float:
        return self._last


def _candidates() -> NDArray[np.float64]:
    """Weights of level and trend, and the trend's damping."""
    grid = [
        (level, trend, damping)
        for level in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
        for trend, damping in ((0.0, 1.0), (0.1, 0.9), (0.3, 0.9), (0.1, 1.0), (0.3, 1.0))
    ]
    return np.array(grid).T


@dataclass(slots=True)
class DampedTrend:
    """The best smoother of a grid; the last value until there are five."""

    _parameters: NDArray[np.float64] = field(default_factory=_candidates)
    _level: NDArray[np.float64] | None = None
    _trend: NDArray[np.float64] | None = None
    _squares: NDArray[np.float64] | None = None
    _points: int = 0
    _last: float = 0.0

    def add(self, value: float) -> None:
        level_weight, trend_weight, damping = self._parameters
        self._points += 1
        self._last = value
        if self._level is None or self._trend is None or self._squares is None:
            self._level = np.full(len(level_weight), value)
            self._trend = np.zeros(len(level_weight))
            self._squares = np.zeros(len(level_weight))
            return
        expected = self._level + damping * self._trend
        error = value - expected
        self._squares = self._squares + error * error
        self._level = expected + level_weight * error
        self._trend = damping * self._trend + level_weight * trend_weight * error

    def next(self) -> float:
        if self._points < _LEAST_POINTS or self._level is None or self._squares is None:
            return self._last
        assert self._trend is not None
        best = int(np.argmin(self._squares))
        damping = self._parameters[2][best]
        return max(0.0, float(self._level[best] + damping * self._trend[best]))


@dataclass(slots=True)
class Kalman:
    """Level and trend with Dynamo's default noises; the last value until there are five."""

    level_noise: float = 1.0
    trend_noise: float = 0.1
    measurement_noise: float = 10.0
    _state: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    _spread: NDArray[np.float64] = field(default_factory=lambda: 1000.0 * np.eye(2))
    _points: int = 0
    _last: float = 0.0

    def add(self, value: float) -> None:
        self._points += 1
        self._last = value
        if self._points == 1:
            self._state = np.array([value, 0.0])
            return
        step = np.array([[1.0, 1.0], [0.0, 1.0]])
        state = step @ self._state
        noise = np.diag([self.level_noise, self.trend_noise])
        spread = step @ self._spread @ step.T + noise
        gain = spread[:, 0] / (spread[0, 0] + self.measurement_noise)
        self._state = state + gain * (value - state[0])
        self._spread = spread - np.outer(gain, spread[0])

    def next(self) -> float:
        if self._points < _LEAST_POINTS:
            return self._last
        return max(0.0, float(self._state[0] + self._state[1]))
