"""What `expertmesh simulate` does, and how it shows the outcome."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from expertmesh.cli.times import duration_s
from expertmesh.errors import SetupError
from expertmesh.launch.policies import policy_names, read_policy, without_gaps
from expertmesh.simulator.events import simulate_events
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.oracle import Least, least_cost, problem
from expertmesh.simulator.outcome import Outcome
from expertmesh.simulator.policy import PolicyMaker
from expertmesh.simulator.report import comparison_json, headers, rows
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.scenario_file import load_scenario
from expertmesh.simulator.trace_file import read_trace
from expertmesh.simulator.workload import Load, Trace

_FINE_S = 1.0
"""Bins in which the fluid mode gets its load."""
_SHOWN = ("cost $", "x oracle", "attained", "worst 10 min", "starts", "wasted", "lost")


@dataclass(frozen=True, slots=True)
class Replay:
    scenario: Scenario
    name: str
    """Of the trace."""
    trace: Trace
    load: Load
    seed: int
    by_request: bool

    @property
    def mode(self) -> str:
        return "event" if self.by_request else "fluid"


@dataclass(frozen=True, slots=True)
class Compared:
    replay: Replay
    outcomes: tuple[Outcome, ...]
    """By cost."""
    oracle: Least | None
    """None: no fleet of the scenario serves all of it."""


def compare(
    file: Path,
    trace: Path,
    policies: list[str],
    *,
    by_request: bool,
    scale: float,
    part: tuple[str | None, str | None],
    seed: int | None,
    plot: Path | None,
) -> Compared:
    """Without policies: all, as published. Raises ManifestError and SetupError."""
    scenario = load_scenario(file, seed)
    chosen = _part(trace, scale, *part, scenario.seed)
    load = chosen.load(_FINE_S, scenario.seed)
    if not load.requests.sum():
        raise SetupError(f"{trace}: no requests {_range(*part)}: choose another part")
    replay = Replay(scenario, trace.name, chosen, load, scenario.seed, by_request)
    # Names are checked before minutes are spent.
    names = [without_gaps(name, scenario, load) for name in policies or policy_names()]
    makers = [(name, read_policy(name)) for name in names]
    least = least_cost(problem(scenario, load))
    oracle = least if isinstance(least, Least) else None
    outcomes = sorted(_run_all(replay, makers), key=lambda o: (o.usd, o.policy))
    if plot is not None:
        _plot(plot, outcomes, oracle)
    return Compared(replay, tuple(outcomes), oracle)


def show(compared: Compared, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results_as_json(compared), indent=2))
        return
    # A table in a pipe keeps its lines whole.
    Console(width=None if sys.stdout.isatty() else 160).print(render(compared))


def results_as_json(compared: Compared) -> dict[str, Any]:
    replay = compared.replay
    told = comparison_json(compared.outcomes, compared.oracle)
    for row, outcome in zip(told["policies"], compared.outcomes, strict=True):
        row["peak_groups"] = _peak_groups(outcome)
    return {
        "scenario": replay.scenario.name,
        "mode": replay.mode,
        "seed": replay.seed,
        "span_s": replay.load.span_s,
        "requests": float(replay.load.requests.sum()),
        **told,
    }


def render(compared: Compared) -> Table:
    """`attained` is the share of requests that met both targets. JSON has the rest."""
    replay, oracle = compared.replay, compared.oracle
    hours = replay.load.span_s / 3600
    requests = float(replay.load.requests.sum())
    table = Table(
        title=f"{replay.scenario.name}: {requests:,.0f} requests in {hours:,.1f} h of "
        f"{replay.name}, {replay.mode} mode, seed {replay.seed}",
        caption=f"oracle: the least cost {oracle.bound}"
        if oracle
        else "no oracle: no fleet of this scenario serves all of it",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", overflow="fold")
    for header in (*_SHOWN, "peak groups"):
        table.add_column(header, justify="right")
    places = [headers().index(header) for header in ("policy", *_SHOWN)]
    peaks = [int(oracle.fleet.sum(axis=1).max())] if oracle else []
    peaks += [_peak_groups(outcome) for outcome in compared.outcomes]
    for row, peak in zip(rows(compared.outcomes, oracle), peaks, strict=True):
        table.add_row(*(row[place] for place in places), f"{peak:,}")
    return table


def _peak_groups(outcome: Outcome) -> int:
    groups = outcome.series.groups
    return int(groups.sum(axis=(1, 2)).max()) if len(groups) else 0


def _part(file: Path, scale: float, from_: str | None, to: str | None, seed: int) -> Trace:
    whole: Trace = read_trace(file)
    start_s = 0.0 if from_ is None else duration_s(from_)
    end_s = whole.span_s if to is None else duration_s(to)
    if start_s >= end_s:
        raise SetupError(
            f"{file}: nothing {_range(from_, to)}: the trace is {_shown(whole.span_s)} long, and "
            "the part must end after it begins"
        )
    if not scale > 0.0:
        raise SetupError(f"--scale: {scale:g}: write a number above 0")
    if from_ is not None or to is not None:
        whole = whole.between(start_s, end_s)
    return whole if scale == 1.0 else whole.scaled(scale, seed)


def _range(from_: str | None, to: str | None) -> str:
    parts = [f"from {from_}" if from_ else "", f"up to {to}" if to else ""]
    return " ".join(filter(None, parts)) or "at all"


def _shown(span_s: float) -> str:
    return f"{span_s / 3600:.1f} h" if span_s >= 3600 else f"{span_s / 60:.1f} min"


def _run_all(replay: Replay, makers: list[tuple[str, PolicyMaker]]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with _progress() as advance:
        for index, (name, make) in enumerate(makers):

            def tell(share: float, name: str = name, index: int = index) -> None:
                advance(name, (index + share) / len(makers))

            outcomes.append(replace(_run(replay, make, tell), policy=name))
    return outcomes


def _run(replay: Replay, make: PolicyMaker, tell: Callable[[float], None]) -> Outcome:
    if replay.by_request:
        requests = replay.trace.sample(replay.seed)
        return simulate_events(replay.scenario, requests, make, progress=tell)
    return simulate_fluid(replay.scenario, replay.load, make, progress=tell)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Only for a person who watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name, share: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda name, share: bar.update(task, description=name, completed=share)


def _plot(file: Path, outcomes: list[Outcome], oracle: Least | None) -> None:
    try:
        # Only here: it takes a second, and is not needed otherwise.
        from expertmesh.simulator.plots import plot
    except ModuleNotFoundError as error:
        raise SetupError(f"--plot: needs {error.name}: install expertmesh[simulate]") from None
    plot(file, outcomes, oracle)
