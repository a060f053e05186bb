"""`expertmesh simulate`: a trace replayed with several scaling policies, beside the least cost."""

from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from expertmesh.errors import ExpertMeshError, SetupError


class Mode(StrEnum):
    FLUID = "fluid"
    EVENT = "event"


def simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A scenario file.")],
    trace: Annotated[
        Path, typer.Option("--trace", metavar="CSV", help="Requests, or statistics of clients.")
    ],
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:PARAMETER=VALUE,…]",
            help="May be repeated; by default all, as published.",
        ),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="fluid: a day in seconds; event: each request.")
    ] = Mode.FLUID,
    scale: Annotated[float, typer.Option(help="Times as many requests as in the trace.")] = 1.0,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Into the trace: 90m, 8h.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="TIME", help="Into the trace.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="In place of the scenario's; of trace and mishaps.")
    ] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Load, groups, queue and cost over time.")
    ] = None,
) -> None:
    """Replay a trace, and compare scaling policies with each other and with the least cost."""
    try:
        run = _imported()
        told = run.compare(
            file,
            trace,
            policies or [],
            by_request=mode is Mode.EVENT,
            scale=scale,
            part=(from_, to),
            seed=seed,
            plot=plot,
        )
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    run.show(told, as_json=as_json_)


def _imported() -> ModuleType:
    """Only here: the other commands do without numpy."""
    try:
        from expertmesh.cli import simulate_run
    except ModuleNotFoundError as error:
        raise SetupError(f"needs {error.name}; install expertmesh[simulate]") from None
    return simulate_run
