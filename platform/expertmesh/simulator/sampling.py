"""Statistics of clients, and requests or sums of requests drawn from them.

The statistics are those of ServeGen (Xiang et al., "ServeGen: Workload Characterization and
Generation of Large Language Model Serving in Production", 2025): for each client and window of ten
minutes a rate and the law of the gaps, and for each window the mean lengths.
"""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from math import gamma

import numpy as np
from numpy.typing import NDArray

from expertmesh.simulator.lengths import Lengths, cut_variance, median_for_mean
from expertmesh.simulator.workload import Floats, Integers, Load, Requests

_DRAWS_A_BIN = 4.0
"""For sums: about so many of a client's arrivals a bin are placed, those between them evenly."""
_LEAST_WEIBULL = 0.02
"""Below it the moments are beyond all numbers; what it gives is all in one burst anyhow."""
_POINT_S = 1e-3
"""What is shorter has no length."""


class Gaps(IntEnum):
    """The law of the gaps between a client's arrivals."""

    EXPONENTIAL = 0
    GAMMA = 1
    WEIBULL = 2


@dataclass(frozen=True, slots=True, eq=False)
class ServeGenClients:
    """The first six columns have an entry for each client and window with requests, the last three
    one for each window."""

    client: Integers
    start_s: Floats
    """Of the window."""
    requests_per_s: Floats
    cv: Floats
    """Of the recorded gaps: standard deviation by mean; the law's own may differ."""
    gaps: Integers
    """See `Gaps`."""
    shape: Floats
    """Of the law of the gaps."""
    window_start_s: Floats
    """Sorted, and `window_s` apart."""
    mean_prompt_tokens: Floats
    mean_output_tokens: Floats
    window_s: float = 600.0
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def span_s(self) -> float:
        return self.window_s * len(self.window_start_s)

    @property
    def expected_requests(self) -> float:
        return float(self.requests_per_s.sum()) * self.window_s

    def between(self, start_s: float, end_s: float) -> "ServeGenClients":
        """Whole windows: those that begin in that time."""
        first_s = np.ceil(start_s / self.window_s) * self.window_s
        rows = (self.start_s >= first_s) & (self.start_s < end_s)
        windows = (self.window_start_s >= first_s) & (self.window_start_s < end_s)
        return replace(
            self,
            client=self.client[rows],
            start_s=self.start_s[rows] - first_s,
            requests_per_s=self.requests_per_s[rows],
            cv=self.cv[rows],
            gaps=self.gaps[rows],
            shape=self.shape[rows],
            window_start_s=self.window_start_s[windows] - first_s,
            mean_prompt_tokens=self.mean_prompt_tokens[windows],
            mean_output_tokens=self.mean_output_tokens[windows],
        )

    def scaled(self, factor: float, seed: int = 1) -> "ServeGenClients":
        """The same clients, each asking `factor` times as often with gaps of the same law."""
        return replace(self, requests_per_s=self.requests_per_s * factor)

    def sample(self, seed: int = 1) -> Requests:
        """A client's arrivals in a window are as many as its rate says, with gaps of its law, as
        seen from the window: from its start to the first, between them, and to its end."""
        draw = np.random.default_rng(seed)
        counts = self._counts(draw)
        gaps = counts + 1
        row = np.repeat(np.arange(len(counts)), gaps)
        ends = np.cumsum(gaps)
        until = _within(self._gaps(draw, row), ends, gaps)
        keep = np.ones(len(row), dtype=bool)
        keep[ends - 1] = False
        row = row[keep]
        at_s = self.start_s[row] + self.window_s * until[keep]
        window = np.searchsorted(self.window_start_s, self.start_s[row])
        lengths = self.lengths
        return Requests.of(
            at_s,
            self._tokens(
                draw, window, self.mean_prompt_tokens, lengths.prompt_sigma, lengths.longest_prompt
            ),
            self._tokens(
                draw, window, self.mean_output_tokens, lengths.output_sigma, lengths.longest_output
            ),
            client=self.client[row],
            span_s=self.span_s,
        )

    def load(self, bin_s: float, seed: int = 1) -> Load:
        """Drawn without each request: of a client with many only every m-th arrival is, with m so
        that a few fall in each bin. With gaps of a Gamma law of shape k that is exact, as the time
        of m gaps has a Gamma law of shape m·k; many Weibull gaps count as Gamma gaps of the same
        spread."""
        draw = np.random.default_rng(seed)
        bins = max(1, int(np.ceil(self.span_s / bin_s)))
        requests = self._binned(draw, bin_s, bins)
        middle_s = bin_s * (np.arange(bins) + 0.5)
        window = np.clip(
            np.searchsorted(self.window_start_s, middle_s, side="right") - 1,
            0,
            len(self.window_start_s) - 1,
        )
        lengths = self.lengths
        return Load(
            bin_s,
            requests,
            _token_sums(
                draw,
                requests,
                self.mean_prompt_tokens,
                window,
                lengths.prompt_sigma,
                lengths.longest_prompt,
            ),
            _token_sums(
                draw,
                requests,
                self.mean_output_tokens,
                window,
                lengths.output_sigma,
                lengths.longest_output,
            ),
        )

    def _binned(self, draw: np.random.Generator, bin_s: float, bins: int) -> Floats:
        """Arrivals in each bin."""
        counts = self._counts(draw)
        per_bin = counts * min(1.0, bin_s / self.window_s)
        step = np.maximum(1, np.floor(per_bin / _DRAWS_A_BIN)).astype(np.int64)
        jumps = -(-counts // step) + 1
        row = np.repeat(np.arange(len(counts)), jumps)
        ends = np.cumsum(jumps)
        # The last jump is from the last arrival to the window's end; the one before has what the
        # count leaves over of whole steps.
        weight = step[row]
        weight[ends - 1] = 0
        some = jumps > 1
        weight[ends[some] - 2] -= (step * (jumps - 1) - counts)[some]
        gaps = self._gaps(draw, row)
        several = weight > 1
        gaps[several] = draw.standard_gamma((self._gamma_shape()[row] * weight)[several])
        few = ~several & (step[row] > 1)
        gaps[few] = draw.standard_gamma(self._gamma_shape()[row[few]])
        to_s = self.start_s[row] + self.window_s * _within(gaps, ends, jumps)
        from_s = np.empty_like(to_s)
        from_s[1:] = to_s[:-1]
        from_s[ends - jumps] = self.start_s
        return _spread(from_s, to_s, weight.astype(np.float64), several, bin_s, bins)

    def _counts(self, draw: np.random.Generator) -> Integers:
        expected = self.requests_per_s * self.window_s
        return np.asarray(np.floor(expected + draw.random(len(expected))), dtype=np.int64)

    def _gaps(self, draw: np.random.Generator, row: Integers) -> Floats:
        """In no unit: they are scaled to the window."""
        law, shape = self.gaps[row], self.shape[row]
        gaps = np.empty(len(row))
        for kind in Gaps:
            chosen = law == kind
            if kind is Gaps.GAMMA:
                gaps[chosen] = draw.standard_gamma(shape[chosen])
            elif kind is Gaps.WEIBULL:
                gaps[chosen] = draw.weibull(shape[chosen])
            else:
                gaps[chosen] = draw.standard_exponential(int(chosen.sum()))
        return gaps

    def _gamma_shape(self) -> Floats:
        shape = np.where(self.gaps == Gaps.GAMMA, self.shape, 1.0)
        weibull = self.gaps == Gaps.WEIBULL
        k = np.maximum(_LEAST_WEIBULL, self.shape[weibull])
        moments = [(gamma(1.0 + 1.0 / each), gamma(1.0 + 2.0 / each)) for each in k]
        shape[weibull] = [mean * mean / (square - mean * mean) for mean, square in moments]
        return shape

    def _tokens(
        self, draw: np.random.Generator, window: Integers, means: Floats, sigma: float, longest: int
    ) -> Integers:
        median = median_for_mean(means, sigma, longest)
        tokens = median[window] * np.exp(sigma * draw.standard_normal(len(window)))
        return np.asarray(np.clip(np.rint(tokens), 1, longest), dtype=np.int64)


def _within(gaps: Floats, ends: Integers, counts: Integers) -> Floats:
    """Times after each gap as shares of the sum of their row's gaps."""
    after = np.cumsum(gaps)
    total = after[ends - 1]
    before = np.concatenate(([0.0], total[:-1]))
    length = total - before
    # With gaps so uneven that all are 0 in this arithmetic, all come at once at the end.
    length = np.where(length > 0.0, length, 1.0)
    row = np.repeat(np.arange(len(counts)), counts)
    return np.asarray(np.clip((after - before[row]) / length[row], 0.0, np.nextafter(1.0, 0.0)))


def _spread(
    from_s: Floats, to_s: Floats, weight: Floats, evenly: NDArray[np.bool_], bin_s: float, bins: int
) -> Floats:
    """Sums of the weights in each bin, each evenly over its time, or else at the end of it."""
    last = np.minimum((to_s / bin_s).astype(np.int64), bins - 1)
    first = np.minimum((from_s / bin_s).astype(np.int64), last)
    long = evenly & (first < last) & (to_s - from_s > _POINT_S)
    # The weight before a bin's edge is a constant plus a slope times the edge; each span adds to
    # both where it begins, and puts its whole weight in their place where it ends.
    constant = np.bincount(last[~long] + 1, weight[~long], bins + 1)
    first, last, from_s, weight = first[long], last[long], from_s[long], weight[long]
    slope = weight / (to_s[long] - from_s)
    constant += np.bincount(first + 1, -slope * from_s, bins + 1)
    constant += np.bincount(last + 1, weight + slope * from_s, bins + 1)
    slopes = np.bincount(first + 1, slope, bins + 1) - np.bincount(last + 1, slope, bins + 1)
    edges = bin_s * np.arange(bins + 1)
    before = np.cumsum(constant) + np.cumsum(slopes) * edges
    return np.asarray(np.maximum(0.0, np.diff(before)))


def _token_sums(
    draw: np.random.Generator,
    requests: Floats,
    means: Floats,
    window: Integers,
    sigma: float,
    longest: int,
) -> Floats:
    """Sums of as many lengths as there are requests: Gamma with their mean and variance."""
    median = median_for_mean(means, sigma, longest)
    relative = cut_variance(median, sigma, longest)[window] / means[window] ** 2
    shape = requests / np.maximum(relative, 1e-9)
    return np.asarray(draw.standard_gamma(shape) * means[window] * np.maximum(relative, 1e-9))
