"""Service times from measured iterations."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_COEFFICIENTS = 3


@dataclass(frozen=True, slots=True)
class MeasuredIteration:
    decoding: float
    """Sequences that decode."""
    context_tokens: float
    """Their contexts, summed."""
    prompt_tokens: float
    """Computed beside them."""
    took_s: float
    known_s: float = 0.0
    """Part of it that is known from elsewhere, and not to be fitted."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """The coefficients of `ServiceTime`, none of them negative."""

    alpha_s: float
    beta_s: float
    gamma_s: float
    errors: tuple[float, ...]
    """Of each measurement: predicted by measured, less 1."""


def fit_iterations(measured: Sequence[MeasuredIteration]) -> Fit:
    """The least squares of the relative errors, by trying which coefficients are 0.

    Raises ValueError without measurements, or with one that took no time.
    """
    if not measured:
        raise ValueError("nothing was measured")
    if any(each.took_s <= 0.0 for each in measured):
        raise ValueError("an iteration takes time; leave out measurements of 0 s")
    terms = np.array(
        [(1.0, each.decoding + each.prompt_tokens, each.context_tokens) for each in measured]
    )
    took_s = np.array([each.took_s for each in measured])
    known_s = np.array([each.known_s for each in measured])
    weights = np.sqrt([each.weight for each in measured]) / took_s
    best = np.zeros(_COEFFICIENTS)
    least = np.inf
    for size in range(1, _COEFFICIENTS + 1):
        for chosen in combinations(range(_COEFFICIENTS), size):
            columns = list(chosen)
            # Columns of like size, or the solver takes the small ones for nothing.
            scale = np.abs(terms[:, columns]).max(axis=0)
            scale = np.where(scale > 0.0, scale, 1.0)
            matrix = terms[:, columns] / scale * weights[:, None]
            solution, *_ = np.linalg.lstsq(matrix, (took_s - known_s) * weights, rcond=None)
            if (solution < 0.0).any():
                continue
            error = float(np.sum((matrix @ solution - (took_s - known_s) * weights) ** 2))
            if error < least * (1.0 - 1e-9):
                least, best = error, np.zeros(_COEFFICIENTS)
                best[columns] = solution / scale
    errors = (terms @ best + known_s) / took_s - 1.0
    return Fit(float(best[0]), float(best[1]), float(best[2]), tuple(errors.tolist()))
