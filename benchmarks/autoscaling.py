"""Compares scaling policies on real traces, each as published and tuned, with the least cost.

EXPERTMESH_TRACES=… python -m benchmarks.autoscaling [--case NAME]… [--quick] [--write-docs]
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.autoscaling_bench.cases import CASES, Case, Part, Situation
from benchmarks.autoscaling_bench.grids import Candidate, grid, published
from benchmarks.autoscaling_bench.plots import plot_fronts
from benchmarks.autoscaling_bench.tables import (
    Measured,
    front_table,
    parameters_table,
    policies_table,
)
from benchmarks.autoscaling_bench.tuning import GOAL, Tuned, run, tune
from benchmarks.figures import Conditions, Figure, show, with_note, write_block
from rich.console import Console

from expertmesh.launch.policies import OWN, policy_names
from expertmesh.simulator.plots import plot

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
FIGURES = Path(__file__).parents[1] / "docs/figures"
_QUICK_CASE = "azure-code"
_FRONT = 8
"""Points of a policy's front that are run on the reported part."""
_FRONT_FROM = 0.9
_SHOWN = 3
"""Runs on one plot."""


@dataclass
class Bench:
    traces: Path
    seeds: tuple[int, ...]
    quick: bool
    plots: Path | None
    console: Console
    _situations: dict[tuple[str, Part, int], Situation] = field(default_factory=dict)

    def situation(self, case: Case, part: Part, seed: int) -> Situation:
        key = (case.scenario, part, seed)
        if key not in self._situations:
            self._situations[key] = Situation(case, part, seed, self.traces)
        return self._situations[key]

    def measure(self, case: Case) -> list[Figure]:
        self._situations.clear()
        first = self.situation(case, case.tune[-1], case.tune_seeds[0])
        names = [candidate.name for candidate in published(first)]
        tuned = {name: self._tune(case, name, first) for name in ("static", *names)}
        chosen = {name: found.chosen.candidate for name, found in tuned.items()}
        figures = [self._report(case, case.report, "the reported part", chosen)]
        if case.whole is not None and not self.quick:
            figures.append(self._report(case, case.whole, "the whole", chosen, only_tuned=True))
        fronts = {name: self._front(case, found) for name, found in tuned.items()}
        figures.append(front_table(case, fronts))
        figures.append(parameters_table(case, chosen))
        if self.plots is not None:
            plot_fronts(self.plots / f"autoscaling-{case.name}-front.png", case.title, fronts)
        return figures

    def _tune(self, case: Case, name: str, first: Situation) -> Tuned:
        seeds = case.tune_seeds[:1] if self.quick else case.tune_seeds
        parts = case.tune[-1:] if self.quick else case.tune
        situations = [self.situation(case, part, seed) for part in parts for seed in seeds]
        started_s = time.monotonic()
        found = tune(situations, grid(name, first, thin=self.quick), event=self._by_request(case))
        best = found.chosen
        self._tell(
            f"{case.name}: {name}: {len(found.tried)} tried in "
            f"{time.monotonic() - started_s:.0f} s; {best.candidate.policy} "
            f"attains {best.attained:.2%} for {best.usd:,.0f} $"
        )
        return found

    def _report(
        self,
        case: Case,
        part: Part,
        name: str,
        chosen: dict[str, Candidate],
        *,
        only_tuned: bool = False,
    ) -> Figure:
        event = self._by_request(case)
        seeds = self.seeds[:1] if only_tuned else self.seeds
        situations = tuple(self.situation(case, part, seed) for seed in seeds)
        defaults = [] if only_tuned else published(situations[0])
        wanted = [(candidate, True) for candidate in chosen.values()]
        wanted += [(candidate, False) for candidate in defaults]
        measured: list[Measured] = []
        for candidate, tuned in wanted:
            outcomes = tuple(run(situation, candidate, event=event) for situation in situations)
            measured.append(Measured(candidate, tuned, situations, outcomes))
            self._tell(
                f"{case.name}: {name}: {measured[-1].label}: x{measured[-1].times_oracle[0]:.2f} "
                f"{measured[-1].attained[0]:.2%}"
            )
        if not only_tuned and self.plots is not None:
            self._plot_runs(self.plots / f"autoscaling-{case.name}-runs.png", measured)
        return policies_table(case, name, measured, "event" if event else "fluid")

    def _plot_runs(self, file: Path, measured: list[Measured]) -> None:
        """Our own, and the cheapest others that attain the goal, or come nearest."""
        own = [m for m in measured if m.candidate.name == OWN and m.tuned]
        others = [m for m in measured if m.candidate.name != OWN]
        others.sort(key=lambda m: (m.attained[0] < GOAL, m.times_oracle[0]))
        shown = own + others[: _SHOWN - len(own)]
        outcomes = [replace(m.outcomes[0], policy=m.label) for m in shown]
        oracle = measured[0].situations[0].oracle
        plot(file, outcomes, oracle)

    def _front(self, case: Case, tuned: Tuned) -> list[tuple[float, float]]:
        situation = self.situation(case, case.report, self.seeds[0])
        points = [one for one in tuned.front if one.attained >= _FRONT_FROM] or tuned.front[-1:]
        step = max(1, -(-len(points) // (3 if self.quick else _FRONT)))
        found = []
        for one in points[::-1][::step]:
            outcome = run(situation, one.candidate, event=self._by_request(case))
            found.append((outcome.usd / situation.oracle.usd, outcome.attainment.both))
        return sorted(found)

    def _by_request(self, case: Case) -> bool:
        return case.event and not self.quick

    def _tell(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def main(
    traces: Annotated[
        Path,
        typer.Option(
            envvar="EXPERTMESH_TRACES", exists=True, file_okay=False, help="Folder of the traces."
        ),
    ],
    cases: Annotated[list[str] | None, typer.Option("--case", help="May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each report.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="One case, few parameters, one seed.")
    ] = False,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Tables into docs/performance.md, and plots.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Plots into it.")] = None,
) -> None:
    known = {case.name: case for case in CASES}
    wanted = cases or ([_QUICK_CASE] if quick else list(known))
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"{name!r}: known are {', '.join(known)}", param_hint="--case")
    console = Console(stderr=True)
    plots = FIGURES if write_docs else plots
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    conditions = Conditions.now()
    bench = Bench(traces, tuple(range(1, 2 if quick else seeds + 1)), quick, plots, console)
    for name in wanted:
        started_s = time.monotonic()
        figures = bench.measure(known[name])
        took = f"{(time.monotonic() - started_s) / 60:.0f} min, {conditions.until_now()}"
        figures[0] = with_note(figures[0], f"Policies: {', '.join(policy_names())}. {took}.")
        show(Console(width=200), figures)
        if write_docs:
            write_block(DOCUMENT, f"autoscaling-{name}", figures)


if __name__ == "__main__":
    typer.run(main)
