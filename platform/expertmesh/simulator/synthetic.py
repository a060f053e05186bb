"""Requests that nobody recorded: for tests, and for questions with a known answer."""

from collections.abc import Sequence

import numpy as np

from expertmesh.simulator.workload import Floats, Requests


def poisson(
    requests_per_s: float,
    duration_s: float,
    seed: int = 1,
    prompt_tokens: int = 1000,
    output_tokens: int = 200,
    sigma: float = 0.0,
) -> Requests:
    """Arrivals by chance at a steady rate; `sigma` spreads the lengths, which keep their means."""
    return steps([(duration_s, requests_per_s)], seed, prompt_tokens, output_tokens, sigma)


def steps(
    parts: Sequence[tuple[float, float]],
    seed: int = 1,
    prompt_tokens: int = 1000,
    output_tokens: int = 200,
    sigma: float = 0.0,
) -> Requests:
    """One part after another, each (duration in seconds, requests a second)."""
    draw = np.random.default_rng(seed)
    times: list[Floats] = []
    start_s = 0.0
    for duration_s, rate in parts:
        count = draw.poisson(duration_s * rate)
        times.append(start_s + duration_s * draw.random(count))
        start_s += duration_s
    at_s = np.concatenate(times) if times else np.empty(0)

    def lengths(mean: int) -> Floats:
        factor = np.exp(sigma * draw.standard_normal(len(at_s)) - sigma * sigma / 2.0)
        return np.asarray(np.rint(mean * factor))

    return Requests.of(
        at_s,
        lengths(prompt_tokens).astype(np.int64),
        lengths(output_tokens).astype(np.int64),
        span_s=start_s,
    )


def bursts(
    requests_per_s: float,
    burst_requests_per_s: float,
    every_s: float,
    burst_s: float,
    duration_s: float,
    seed: int = 1,
    prompt_tokens: int = 1000,
    output_tokens: int = 200,
    sigma: float = 0.0,
) -> Requests:
    """A steady rate, and every so often a higher one for a while."""
    parts: list[tuple[float, float]] = []
    left_s = duration_s
    while left_s > 0.0:
        calm_s = min(left_s, every_s - burst_s)
        parts.append((calm_s, requests_per_s))
        left_s -= calm_s
        high_s = min(left_s, burst_s)
        parts.append((high_s, burst_requests_per_s))
        left_s -= high_s
    return steps(parts, seed, prompt_tokens, output_tokens, sigma)
