"""What is asked of a simulated fleet: requests one by one, or their sums over short times."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_COPY_SPREAD_S = 10.0
"""Copies of a request lie this far around it: near enough to keep its burst."""


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Sums over bins of `bin_s`, the first of which begins at 0."""

    bin_s: float
    requests: Floats
    """Arrivals in each bin."""
    prompt_tokens: Floats
    """Of those arrivals, without what is in the prefix cache."""
    output_tokens: Floats
    """Of those arrivals, whenever they will be produced."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def span_s(self) -> float:
        return self.bin_s * len(self.requests)

    @property
    def start_s(self) -> Floats:
        """Of each bin."""
        return self.bin_s * np.arange(len(self.requests), dtype=np.float64)

    def coarser(self, bins: int) -> "Load":
        """`bins` bins become one; the last one may be only partly filled."""
        starts = np.arange(0, len(self.requests), bins)
        return Load(
            self.bin_s * bins,
            *(
                np.add.reduceat(column, starts) if len(starts) else column
                for column in (self.requests, self.prompt_tokens, self.output_tokens)
            ),
        )


class Trace(Protocol):
    """Recorded requests, or statistics that requests are drawn from."""

    @property
    def span_s(self) -> float: ...

    def between(self, start_s: float, end_s: float) -> Self:
        """The part from `start_s` up to `end_s`; its times begin at 0."""
        ...

    def scaled(self, factor: float, seed: int = 1) -> Self:
        """With `factor` times as many requests in the same time."""
        ...

    def sample(self, seed: int = 1) -> "Requests": ...

    def load(self, bin_s: float, seed: int = 1) -> Load: ...


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """One entry a request in every column, sorted by time."""

    at_s: Floats
    """Since the start."""
    prompt_tokens: Integers
    """With those that are in the prefix cache; at least 1."""
    output_tokens: Integers
    """At least 1."""
    cached_tokens: Integers
    """Of the prompt, in the prefix cache; always fewer than the prompt's."""
    client: Integers
    span_s: float
    """Of the whole trace: at least the time of the last request."""

    @classmethod
    def of(
        cls,
        at_s: Floats,
        prompt_tokens: Integers,
        output_tokens: Integers,
        cached_tokens: Integers | None = None,
        client: Integers | None = None,
        span_s: float | None = None,
    ) -> "Requests":
        """Sorts, and fills in what is not given; the order of simultaneous requests stays."""
        count = len(at_s)
        order = np.argsort(at_s, kind="stable")
        at_s = np.asarray(at_s, dtype=np.float64)[order]
        prompt = np.maximum(1, np.asarray(prompt_tokens, dtype=np.int64)[order])
        output = np.maximum(1, np.asarray(output_tokens, dtype=np.int64)[order])
        nothing = np.zeros(count, dtype=np.int64)
        cached = nothing if cached_tokens is None else np.asarray(cached_tokens)[order]
        last_s = float(at_s[-1]) if count else 0.0
        return cls(
            at_s,
            prompt,
            output,
            # An engine computes the last token of a prompt in any case.
            np.clip(cached.astype(np.int64), 0, prompt - 1),
            nothing if client is None else np.asarray(client, dtype=np.int64)[order],
            last_s if span_s is None else max(span_s, last_s),
        )

    def __len__(self) -> int:
        return len(self.at_s)

    def between(self, start_s: float, end_s: float) -> "Requests":
        first, last = np.searchsorted(self.at_s, (start_s, end_s))
        part = slice(int(first), int(last))
        return Requests(
            self.at_s[part] - start_s,
            self.prompt_tokens[part],
            self.output_tokens[part],
            self.cached_tokens[part],
            self.client[part],
            max(0.0, min(end_s, self.span_s) - start_s),
        )

    def scaled(self, factor: float, seed: int = 1) -> "Requests":
        """Copies lie within 10 s of the original; with a fraction some are chosen by chance."""
        draw = np.random.default_rng(seed)
        times = int(factor) + (draw.random(len(self)) < factor - int(factor))
        which = np.repeat(np.arange(len(self)), times)
        is_copy = np.ones(len(which), dtype=bool)
        firsts = np.cumsum(times) - times
        is_copy[firsts[times > 0]] = False
        shift_s = draw.uniform(-_COPY_SPREAD_S, _COPY_SPREAD_S, len(which)) * is_copy
        return Requests.of(
            np.clip(self.at_s[which] + shift_s, 0.0, self.span_s),
            self.prompt_tokens[which],
            self.output_tokens[which],
            self.cached_tokens[which],
            self.client[which],
            self.span_s,
        )

    def sample(self, seed: int = 1) -> "Requests":
        """They are what they are."""
        return self

    def load(self, bin_s: float, seed: int = 1) -> Load:
        count = max(1, int(np.ceil(self.span_s / bin_s)))
        bins = np.minimum((self.at_s / bin_s).astype(np.int64), count - 1)

        def total(weights: Integers | None = None) -> Floats:
            return np.bincount(bins, weights, count).astype(np.float64)

        return Load(
            bin_s,
            total(),
            total(self.prompt_tokens - self.cached_tokens),
            total(self.output_tokens),
        )
