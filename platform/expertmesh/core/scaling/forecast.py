"""What the load will be when a group that is asked for now is ready.

Three simple forecasters are weighted by how well each did lately, and a margin above them is
learned as a quantile of their errors. On public traces nothing cleverer forecast the mean better
than the last value; what a forecast can give is the margin.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

BIN_S = 30.0
_FAST_BINS = 2
_SLOW_BINS = 10
_TREND_BINS = 6
_MOST_BINS = 120
"""An hour: the longest horizon that is learned."""
_DAMPING = 0.5
"""Share of the trend over the horizon that is believed."""
_WEIGHT_RATE = 0.1
_MARGIN_RATE = 0.04
_LEAST_QUANTILE = 0.6
_MOST_QUANTILE = 0.9999
_MARGIN = 0.215
"""For each standard deviation that the wanted quantile is from the mean: 0.5 for 99 %. Found by
simulating a day of DeepSeek-R1's requests; less is felt at each step of the load that nothing
announces, more costs and attains no more."""
_LEARNED = (0.6, 1.2)
"""Share of it that errors of forecasts may make it."""
_SMALL_LOAD = 0.05
"""Of a group: errors below it say nothing."""


@dataclass(frozen=True, slots=True)
class _Due:
    bin_number: int
    """When it falls due."""
    guesses: tuple[float, ...]
    """Of each forecaster."""
    guess: float


@dataclass(frozen=True, slots=True)
class Forecaster:
    """What has been learned; `horizon_bins` ahead."""

    bins: tuple[float, ...] = ()
    """Mean load of each past bin, the newest last."""
    bin_number: int = 0
    """Of the bin that is filling."""
    filled_s: float = 0.0
    filled: float = 0.0
    """Load times seconds in the bin that is filling."""
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    margin: float = 1.0
    """Learned share of the usual margin."""
    calm_from: int = 0
    """Bin from which another error counts."""
    due: tuple[_Due, ...] = ()

    def seen(
        self, load: float, over_s: float, horizon_s: float, quantile: float, group: float
    ) -> "Forecaster":
        """With a load that has lasted for `over_s`. `group` is what a group can do on average."""
        after = self
        left_s = min(over_s, _MOST_BINS * BIN_S)
        while left_s > 0:
            part_s = min(left_s, BIN_S - after.filled_s)
            after = replace(
                after, filled_s=after.filled_s + part_s, filled=after.filled + load * part_s
            )
            left_s -= part_s
            if after.filled_s >= BIN_S - 1e-9:
                after = after._close(horizon_s, quantile, group)
        return after

    def _close(self, horizon_s: float, quantile: float, group: float) -> "Forecaster":
        mean = self.filled / self.filled_s
        after = replace(
            self,
            bins=(*self.bins[-(_SLOW_BINS + _TREND_BINS) :], mean),
            bin_number=self.bin_number + 1,
            filled_s=0.0,
            filled=0.0,
        )
        ahead = max(1, min(_MOST_BINS, round(horizon_s / BIN_S)))
        for past in self.due:
            if past.bin_number == self.bin_number:
                after = after._learn(past, mean, ahead, quantile, group)
        guesses = after._guesses(ahead)
        guess = _weighed(guesses, after.weights)
        due = tuple(d for d in self.due if d.bin_number > self.bin_number)
        return replace(after, due=(*due, _Due(self.bin_number + ahead, guesses, guess)))

    def _learn(
        self, due: _Due, actual: float, ahead: int, quantile: float, group: float
    ) -> "Forecaster":
        scale = max(actual, due.guess, _SMALL_LOAD)
        losses = [_pinball(actual - guess, 0.5) / scale for guess in due.guesses]
        raw = [
            weight * math.exp(-_WEIGHT_RATE * loss / 0.1)
            for weight, loss in zip(self.weights, losses, strict=True)
        ]
        # None is ever quite forgotten: the load may change its nature.
        total = sum(raw)
        weights = [0.05 + 0.85 * value / total for value in raw]
        margin, calm_from = self.margin, self.calm_from
        if max(actual, due.guess) > _SMALL_LOAD:
            usual = math.sqrt(max(due.guess, _SMALL_LOAD) * group) * usual_margin(quantile)
            over = (actual - due.guess) / usual
            if over <= margin:
                margin -= _MARGIN_RATE * (1.0 - quantile)
            elif self.bin_number >= calm_from:
                # One rise is one error, however many bins it is seen in.
                margin += _MARGIN_RATE * quantile * min(over - margin, 1.0) / 0.1
                calm_from = self.bin_number + max(1, ahead)
            margin = min(_LEARNED[1], max(_LEARNED[0], margin))
        return replace(
            self,
            weights=(weights[0], weights[1], weights[2]),
            margin=margin,
            calm_from=calm_from,
        )

    def _guesses(self, ahead: int) -> tuple[float, float, float]:
        fast = _mean(self.bins[-_FAST_BINS:])
        slow = _mean(self.bins[-_SLOW_BINS:])
        before = _mean(self.bins[-(_FAST_BINS + _TREND_BINS) : -_FAST_BINS] or (fast,))
        rise = (fast - before) / ((_FAST_BINS + _TREND_BINS) / 2)
        trend = max(0.0, fast + _DAMPING * rise * min(ahead, 2 * _TREND_BINS))
        return fast, slow, trend

    def spare(self, expected: float, group: float, quantile: float) -> float:
        """Load to be kept in hand: as many groups as the margin times the root of those that
        carry the load (square-root staffing)."""
        return self.margin * usual_margin(quantile) * math.sqrt(expected * group)

    def expected(self, horizon_s: float, now_load: float) -> float:
        """The likely load then, before the margin; never less than now, for it falls only after it
        has been seen to fall."""
        if not self.bins:
            return now_load
        ahead = max(1, min(_MOST_BINS, round(horizon_s / BIN_S)))
        return max(now_load, _weighed(self._guesses(ahead), self.weights))


def usual_margin(quantile: float) -> float:
    return _MARGIN * NormalDist().inv_cdf(min(_MOST_QUANTILE, max(_LEAST_QUANTILE, quantile)))


def _weighed(guesses: tuple[float, ...], weights: tuple[float, ...]) -> float:
    return sum(g * w for g, w in zip(guesses, weights, strict=True)) / sum(weights)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else 0.0


def _pinball(error: float, quantile: float) -> float:
    return quantile * error if error > 0 else (quantile - 1.0) * error
