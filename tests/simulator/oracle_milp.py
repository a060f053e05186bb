"""The oracle's problem as an integer program, solved by HiGHS: slow, and written another way."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from expertmesh.simulator.oracle import Problem


def least_cost_milp(problem: Problem, miss_share: float = 0.0) -> float | None:
    """USD; None when there is no such fleet.

    Variables are, bin by bin: groups of each option, groups started, and the share missed.
    """
    bins, options = problem.loads.shape
    width = 2 * options + 1
    usd = np.zeros((bins, width))
    usd[:, :options] = np.array(problem.usd_per_hour) * problem.bin_s / 3600
    usd[:, options : 2 * options] = (
        np.array(problem.usd_per_hour) * np.array(problem.start_s) / 3600
    )
    usd[0, options : 2 * options] = 0.0
    upper = np.full((bins, width), np.inf)
    upper[:, :options] = problem.max_groups
    upper[:, -1] = 1.0 if miss_share else 0.0
    integral = np.zeros((bins, width))
    integral[:, :options] = 1

    rows: list[tuple[dict[int, float], float, float]] = []

    def column(bin_: int, which: int) -> int:
        return bin_ * width + which

    for bin_ in range(bins):
        loads = problem.loads[bin_]
        if loads.max() > 0:
            row = {column(bin_, option): 1 / loads[option] for option in range(options)}
            rows.append(({**row, column(bin_, width - 1): 1.0}, 1.0, np.inf))
        counts = {column(bin_, option): 1.0 for option in range(options)}
        rows.append((counts, problem.min_groups, np.inf))
        if problem.budget_usd_per_hour is not None:
            rate = {column(bin_, option): problem.usd_per_hour[option] for option in range(options)}
            rows.append((rate, -np.inf, problem.budget_usd_per_hour))
        for members, nodes in problem.zones:
            used = {column(bin_, option): float(problem.nodes[option]) for option in members}
            rows.append((used, -np.inf, float(nodes[bin_])))
        for option in range(options if bin_ else 0):
            started = {
                column(bin_, options + option): 1.0,
                column(bin_, option): -1.0,
                column(bin_ - 1, option): 1.0,
            }
            rows.append((started, 0.0, np.inf))
    missed = {
        column(bin_, width - 1): float(problem.requests[bin_])
        for bin_ in range(bins)
        if problem.loads[bin_].max() > 0
    }
    rows.append((missed, -np.inf, miss_share * float(problem.requests.sum())))

    matrix = lil_array((len(rows), bins * width))
    for index, (row, _, _) in enumerate(rows):
        for where, value in row.items():
            matrix[index, where] = value
    result = milp(
        usd.ravel(),
        integrality=integral.ravel(),
        bounds=Bounds(np.zeros(bins * width), upper.ravel()),
        constraints=LinearConstraint(
            matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows]
        ),
        options={"mip_rel_gap": 0.0},
    )
    return float(result.fun) if result.status == 0 else None


def cost_of(problem: Problem, fleet: NDArray[np.int64]) -> float:
    """USD of groups and of starts, without a look at what they serve."""
    price = np.array(problem.usd_per_hour) / 3600
    started = np.maximum(np.diff(fleet, axis=0), 0).sum(axis=0)
    running = fleet.sum(axis=0) * problem.bin_s
    return float((price * (running + started * np.array(problem.start_s))).sum())
