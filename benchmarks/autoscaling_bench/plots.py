"""Plots of the fronts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.autoscaling_bench.tuning import GOAL
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 110


def plot_fronts(
    file: Path, title: str, fronts: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Cost in units of the oracle's against the requests that missed a target."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["tab10"]
    for index, (name, all_points) in enumerate(fronts.items()):
        points = _best(all_points)
        costs = [cost for cost, _ in points]
        missed = [100 * max(1 - attained, 1e-4) for _, attained in points]
        own = name == "expertmesh"
        axes.plot(
            missed,
            costs,
            marker="o",
            color="black" if own else colours(index % 10),
            linewidth=2.5 if own else 1.2,
            label=name,
        )
    axes.axvline(100 * (1 - GOAL), color="grey", linestyle=":")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("requests that missed a target, %")
    axes.set_ylabel("cost, x oracle")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    canvas.print_figure(str(file), format="png", dpi=_DPI)


def _best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those than which no other is cheaper and better."""
    kept: list[tuple[float, float]] = []
    for cost, attained in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or attained > kept[-1][1]:
            kept.append((cost, attained))
    return kept
