"""`expertmesh usage`: who used what, what it brings in, and what the capacity behind it cost."""

import json
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import moment_s
from expertmesh.cli.usage_view import (
    focus_as_csv,
    focus_as_json,
    render_usage,
    usage_as_csv,
    usage_as_json,
)
from expertmesh.core.metering.report import By
from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import UsageCells, usage_cells


def usage(
    by: Annotated[By, typer.Option(help="One row for each of these.")] = By.MODEL,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on: 2026-01-31, or 7d ago as 7d.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON; money as exact decimal strings.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV; money in US dollars.")] = False,
    focus: Annotated[
        bool,
        typer.Option(
            "--focus",
            help="Rows in the columns of FOCUS 1.2, the FinOps cost specification, by day, pool, "
            "model, tenant and key; CSV, or JSON with --json.",
        ),
    ] = False,
    store: StoreOption = None,
) -> None:
    """Show usage, revenue by tariff, capacity cost, margin and energy."""
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv: choose one of them")
    now_s = time.time()
    since_s = None if since is None else moment_s(since, now_s)
    until_s = None if until is None else moment_s(until, now_s)

    async def read(database: Database) -> UsageCells:
        return await usage_cells(Ledger(database), since_s, until_s)

    cells = with_store(store, False, read)
    if focus:
        typer.echo(focus_as_json(cells) if as_json else focus_as_csv(cells), nl=as_json)
        return
    report = cells.grouped(by)
    if as_json:
        typer.echo(json.dumps(usage_as_json(report), indent=2))
    elif as_csv:
        typer.echo(usage_as_csv(report), nl=False)
    else:
        # A table in a pipe keeps its lines whole.
        Console(width=None if sys.stdout.isatty() else 200).print(render_usage(report))
