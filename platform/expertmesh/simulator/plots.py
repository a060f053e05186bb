"""Simulated runs on one page: load and groups, queue, targets met, and money over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from expertmesh.core.domain.fleet import GroupState
from expertmesh.errors import SetupError
from expertmesh.simulator.oracle import Least
from expertmesh.simulator.outcome import SHOWN_STATES, Outcome

Floats = NDArray[np.float64]

_POINTS = 1500
"""On a time axis; more cannot be told apart."""
_ALPHA = {GroupState.READY: 0.85, GroupState.STARTING: 0.4, GroupState.DRAINING: 0.15}
_LOAD, _ORACLE = "black", "crimson"


def plot(file: Path, outcomes: Sequence[Outcome], oracle: Least | None = None) -> None:
    """Writes a PNG: a row for each outcome, of the same scenario and load, and one for the money.

    Raises SetupError when the file cannot be written.
    """
    figure = Figure(figsize=(15, 2.6 * len(outcomes) + 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(outcomes) + 1, 2, width_ratios=(2, 1), height_ratios=[2.6] * len(outcomes) + [3.6]
    )
    shared: Axes | None = None
    highest = _highest(outcomes, oracle)
    for row, outcome in enumerate(outcomes):
        groups = figure.add_subplot(grid[row, 0], sharex=shared)
        shared = shared or groups
        _plot_groups(groups, outcome, oracle, highest)
        _plot_queue(figure.add_subplot(grid[row, 1], sharex=shared), outcome)
    _plot_cost(figure.add_subplot(grid[-1, 0], sharex=shared), outcomes, oracle)
    _plot_front(figure.add_subplot(grid[-1, 1]), outcomes, oracle)
    figure.suptitle(outcomes[0].scenario)
    try:
        canvas.print_figure(str(file), format="png", dpi=100)
    except OSError as error:
        raise SetupError(f"{file}: cannot be written: {error.strerror or error}") from error


def _plot_groups(axes: Axes, outcome: Outcome, oracle: Least | None, highest: float) -> None:
    """All in groups of the first option, so that a load can be compared with groups of any."""
    series, worth = outcome.series, _worth(outcome)
    hours = _thin(series.at_s) / 3600
    colors = _colors(len(outcome.options))
    below = np.zeros(len(hours))
    order = (GroupState.READY, GroupState.STARTING, GroupState.DRAINING)
    handles: list[Artist] = [
        Patch(color=colors[i], label=name) for i, name in enumerate(outcome.options)
    ]
    for state in order:
        for option in range(len(outcome.options)):
            counts = series.groups[:, option, SHOWN_STATES.index(state)] * worth[option]
            above = below + _thin(counts)
            axes.fill_between(
                hours, below, above, color=colors[option], alpha=_ALPHA[state], linewidth=0
            )
            below = above
    (load,) = axes.plot(
        hours, _thin(series.load_groups[:, 0]), color=_LOAD, linewidth=0.8, label="load"
    )
    handles.append(load)
    if oracle is not None:
        fleet = oracle.fleet @ worth
        at = np.arange(len(fleet)) * oracle.bin_s / 3600
        (line,) = axes.plot(
            _thin(at), _thin(fleet), color=_ORACLE, linewidth=0.9, linestyle="--", label="oracle"
        )
        handles.append(line)
    axes.set_ylim(0, highest)
    axes.set_ylabel(f"groups of\n{outcome.options[0]}", fontsize=8)
    axes.set_title(
        f"{outcome.policy}: ${outcome.usd:,.0f}, {outcome.attainment.both:.2%} attained "
        f"(strong: ready, pale: starting, palest: draining)",
        fontsize=9,
        loc="left",
    )
    axes.legend(handles=handles, fontsize=7, ncols=len(handles), loc="upper right")
    axes.margins(x=0)


def _plot_queue(axes: Axes, outcome: Outcome) -> None:
    series = outcome.series
    hours = _thin(series.at_s) / 3600
    axes.plot(hours, _thin(series.queued), color="tab:blue", linewidth=0.8)
    axes.set_ylabel("queued requests", color="tab:blue", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    share = axes.twinx()
    share.plot(hours, _thin(series.both_met) * 100, color="tab:green", linewidth=0.8)
    share.set_ylabel("attained %", color="tab:green", fontsize=8)
    share.set_ylim(0, 105)
    axes.set_title(f"worst 10 min {outcome.worst_10min.both:.1%}", fontsize=9, loc="left")


def _plot_cost(axes: Axes, outcomes: Sequence[Outcome], oracle: Least | None) -> None:
    for outcome, color in zip(outcomes, _colors(len(outcomes)), strict=True):
        series = outcome.series
        step_s = outcome.duration_s / len(series.at_s)
        spent = np.cumsum(series.usd_per_hour) * step_s / 3600
        axes.plot(_thin(series.at_s) / 3600, _thin(spent), color=color, label=outcome.policy)
    if oracle is not None:
        at = (np.arange(len(oracle.fleet)) + 1) * oracle.bin_s / 3600
        spent = np.cumsum(oracle.usd_by_bin)
        axes.plot(_thin(at), _thin(spent), color=_ORACLE, linestyle="--", label="oracle")
    axes.set_ylabel("$ spent")
    axes.set_xlabel("hours")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="upper left")
    axes.margins(x=0)


def _plot_front(axes: Axes, outcomes: Sequence[Outcome], oracle: Least | None) -> None:
    """Cheap is left, and good is up."""
    for outcome, color in zip(outcomes, _colors(len(outcomes)), strict=True):
        attained = outcome.attainment.both * 100
        axes.scatter([outcome.usd], [attained], color=color, s=28, zorder=3)
        axes.annotate(
            outcome.policy,
            (outcome.usd, attained),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    if oracle is not None:
        axes.axvline(oracle.usd, color=_ORACLE, linestyle="--", linewidth=0.9)
    axes.set_xlim(0, 1.15 * max(outcome.usd for outcome in outcomes) or 1.0)
    axes.set_xlabel("$")
    axes.set_ylabel("attained %")
    axes.grid(alpha=0.3)


def _highest(outcomes: Sequence[Outcome], oracle: Least | None) -> float:
    """One scale for all rows."""
    tops = [1.0]
    for outcome in outcomes:
        worth = _worth(outcome)
        tops.append(float((outcome.series.groups.sum(axis=2) @ worth).max()))
        tops.append(float(_thin(outcome.series.load_groups[:, 0]).max()))
        if oracle is not None:
            tops.append(float((oracle.fleet @ worth).max()))
    return 1.1 * max(tops)


def _worth(outcome: Outcome) -> Floats:
    """Of one group of each option, in groups of the first one, over the whole run."""
    total = outcome.series.load_groups.sum(axis=0)
    if not (total > 0).all():
        return np.ones(len(total))
    return np.asarray(total[0] / total)


def _thin(values: Floats) -> Floats:
    """Means over so many values that few enough remain; what is not a number is left out."""
    size = -(-len(values) // _POINTS)
    if size <= 1:
        return values
    starts = np.arange(0, len(values), size)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0.0), starts)
    count = np.add.reduceat(known.astype(np.float64), starts)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count)


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    table = colormaps["tab10" if count <= 10 else "tab20"]
    return [table(index % table.N) for index in range(count)]
