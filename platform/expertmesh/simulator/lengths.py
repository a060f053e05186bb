"""Lengths of prompts and outputs, of which only a mean is known: lognormal, up to a longest."""

from dataclasses import dataclass
from math import erfc, sqrt

import numpy as np

from expertmesh.simulator.workload import Floats, Integers, Requests

_HALVINGS = 60
_NO_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class Lengths:
    """The defaults are those of the published two-hour sample of DeepSeek-R1's requests."""

    prompt_sigma: float = 1.5
    """Standard deviation of the logarithm."""
    output_sigma: float = 1.0
    longest_prompt: int = 65_536
    """Draws above it are this long; the mean counts them so."""
    longest_output: int = 32_768

    @classmethod
    def fit(cls, requests: Requests) -> "Lengths":
        """With the spread for which a lognormal has the sample's ratio of mean to median: that
        is what work depends on, more than on the shape at the short end."""

        def sigma(tokens: Integers) -> float:
            ratio = float(np.mean(tokens) / np.median(tokens))
            return float(np.sqrt(2.0 * np.log(max(1.0, ratio))))

        if not len(requests):
            raise ValueError("lengths cannot be fitted to no requests")
        return cls(
            sigma(requests.prompt_tokens),
            sigma(requests.output_tokens),
            int(requests.prompt_tokens.max()),
            int(requests.output_tokens.max()),
        )


def median_for_mean(mean: Floats, sigma: float, longest: float) -> Floats:
    """Medians of the lognormals that, cut at `longest`, have these means."""
    target = np.minimum(mean, 0.999 * longest)
    low = np.log(target) - sigma * sigma / 2.0
    high = np.full_like(target, np.log(longest) + 8.0 * sigma)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        below = _cut_mean(middle, sigma, longest) < target
        low = np.where(below, middle, low)
        high = np.where(below, high, middle)
    return np.asarray(np.exp(low))


def cut_variance(median: Floats, sigma: float, longest: float) -> Floats:
    """Of such a lognormal."""
    mu = np.log(median)
    if sigma < _NO_SPREAD:
        return np.zeros_like(median)
    edge = (np.log(longest) - mu) / sigma
    square = np.exp(2.0 * mu + 2.0 * sigma * sigma) * _normal(edge - 2.0 * sigma)
    square = square + longest * longest * _normal(-edge)
    return np.asarray(np.maximum(0.0, square - _cut_mean(mu, sigma, longest) ** 2))


def _cut_mean(mu: Floats, sigma: float, longest: float) -> Floats:
    if sigma < _NO_SPREAD:
        return np.asarray(np.minimum(np.exp(mu), longest))
    edge = (np.log(longest) - mu) / sigma
    inside = np.exp(mu + sigma * sigma / 2.0) * _normal(edge - sigma)
    return np.asarray(inside + longest * _normal(-edge))


def _normal(values: Floats) -> Floats:
    """Distribution function of the standard normal law."""
    return np.array([0.5 * erfc(-value / sqrt(2.0)) for value in values])
