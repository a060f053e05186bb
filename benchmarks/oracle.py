"""How long the least cost takes to find, and how it compares with an integer program.

    python -m benchmarks.oracle [--days N] [--milp-minutes N]

The load is a wave with noise, drawn from a seed. The integer program is solved by HiGHS to a gap of
0, which is why it gets minutes where the dynamic program gets days.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from benchmarks.figures import Conditions, Figure, Row, show, with_note
from rich.console import Console
from tests.simulator.oracle_milp import least_cost_milp

from expertmesh.simulator.oracle import Least, NotServable, Problem, best_static, least_cost

_BIN_S = 60.0
_SEEDS = (1, 2, 3)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a group."""

    usd_per_hour: float
    start_s: float
    speed: float
    most: int
    nodes: int


_SMALL, _MIDDLE, _LARGE = (
    _Size(28.0, 300.0, 0.42, 16, 1),
    _Size(56.0, 360.0, 1.0, 12, 2),
    _Size(112.0, 480.0, 2.3, 7, 4),
)


def _problem(sizes: Sequence[_Size], bins: int, *, seed: int, spot: bool = False) -> Problem:
    """A daily wave between 1 and 7 middle groups, with bursts of minutes; with `spot`, the first
    size is in a zone that comes and goes by hours."""
    draw = np.random.default_rng(seed)
    days = np.arange(bins) * _BIN_S / 86400
    work = (4 + 3 * np.sin(2 * math.pi * days)) * draw.gamma(50, 1 / 50, bins)
    hours = draw.integers(0, 2, -(-bins // 60)) * sizes[0].most * sizes[0].nodes
    zone = ((0,), np.repeat(hours, 60)[:bins].astype(np.float64))
    return Problem(
        bin_s=_BIN_S,
        usd_per_hour=tuple(
            size.usd_per_hour * (0.4 if spot and i == 0 else 1.0) for i, size in enumerate(sizes)
        ),
        start_s=tuple(size.start_s for size in sizes),
        max_groups=tuple(size.most for size in sizes),
        loads=work[:, None] / np.array([size.speed for size in sizes]),
        requests=work * 1000,
        nodes=tuple(size.nodes for size in sizes),
        zones=(zone,) if spot else (),
    )


def measure_time(days: int) -> Figure:
    bins = round(days * 86400 / _BIN_S)
    cases: tuple[tuple[str, Problem, float], ...] = (
        ("one size", _problem((_MIDDLE,), bins, seed=1), 0.0),
        ("two sizes", _problem((_SMALL, _MIDDLE), bins, seed=1), 0.0),
        ("three sizes", _problem((_SMALL, _MIDDLE, _LARGE), bins, seed=1), 0.0),
        (
            "three sizes, one of them spot",
            _problem((_SMALL, _MIDDLE, _LARGE), bins, seed=1, spot=True),
            0.0,
        ),
        ("two sizes, 1 % missed", _problem((_SMALL, _MIDDLE), bins // 7, seed=1), 0.01),
    )
    return Figure(
        "The least cost by dynamic programming",
        ("case", "days", "states", "CPU, s", "$", "of the best static"),
        tuple(_timed(name, problem, missed) for name, problem, missed in cases),
        (f"bins of {_BIN_S:.0f} s; the time includes the way back to the fleet of each bin",),
    )


def _timed(name: str, problem: Problem, missed: float) -> Row:
    found, taken_s = _clock(lambda: least_cost(problem, miss_share=missed))
    if not isinstance(found, Least):
        raise RuntimeError(f"{name}: no fleet serves bin {found.bin}")
    static = best_static(problem)
    ratio = "-" if isinstance(static, NotServable) else f"{found.usd / static[0]:.2f}"
    return (
        name,
        f"{problem.bins * problem.bin_s / 86400:.0f}",
        f"{math.prod(most + 1 for most in problem.max_groups):,}",
        f"{taken_s:.1f}",
        f"{found.usd:,.0f}",
        ratio,
    )


def compare_with_milp(minutes: int) -> Figure:
    rows = []
    for sizes, spot in (((_SMALL, _MIDDLE), False), ((_SMALL, _MIDDLE), True)):
        for seed in _SEEDS:
            problem = _problem(sizes, minutes, seed=seed, spot=spot)
            found, own_s = _clock(lambda problem=problem: least_cost(problem))
            expected, milp_s = _clock(lambda problem=problem: least_cost_milp(problem))
            if not isinstance(found, Least) or expected is None:
                raise RuntimeError(f"seed {seed}: only one of the two found a fleet")
            rows.append(
                (
                    f"two sizes{', one of them spot' if spot else ''}, seed {seed}",
                    f"{found.usd:.4f}",
                    f"{expected:.4f}",
                    f"{abs(found.usd - expected) / expected:.1e}",
                    f"{own_s:.3f}",
                    f"{milp_s:.2f}",
                )
            )
    return Figure(
        "Against an integer program",
        ("case", "$", "HiGHS, $", "difference", "CPU, s", "HiGHS, s"),
        tuple(rows),
        (f"{minutes} bins of {_BIN_S:.0f} s",),
    )


def _clock(work: Callable[[], T]) -> tuple[T, float]:
    """CPU time: other work on the machine is not in it."""
    began_s = time.process_time()
    return work(), time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the least cost takes to find.")
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--milp-minutes", type=int, default=60)
    chosen = parser.parse_args()
    conditions = Conditions.now()
    figures = (measure_time(chosen.days), compare_with_milp(chosen.milp_minutes))
    last = with_note(figures[-1], conditions.until_now())
    show(Console(), (*figures[:-1], last))


if __name__ == "__main__":
    main()
