"""`expertmesh usage`: who used what, what it is worth, and what the capacity behind it cost."""

import json
import sys
import time
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import moment_s, shown
from expertmesh.core.metering.attribution import NANO_USD_PER_USD
from expertmesh.core.metering.report import By, UsageReport, UsageRow
from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report


def usage(
    by: Annotated[By, typer.Option(help="One row for each of these.")] = By.MODEL,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on: 2026-01-31, or 7d ago as 7d.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON; money as exact decimal strings.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Show usage, tariff price and capacity cost."""
    now_s = time.time()
    since_s = None if since is None else moment_s(since, now_s)
    until_s = None if until is None else moment_s(until, now_s)

    async def read(database: Database) -> UsageReport:
        return await usage_report(Ledger(database), by, since_s, until_s)

    report = with_store(store, False, read)
    if as_json:
        typer.echo(json.dumps(usage_as_json(report), indent=2))
        return
    # A table in a pipe keeps its lines whole.
    Console(width=None if sys.stdout.isatty() else 160).print(render_usage(report))


def render_usage(report: UsageReport) -> Table:
    total = report.total
    table = Table(
        title=_title(report),
        caption=(
            f"capacity {_nano(total.capacity_nano_usd)} $ = "
            f"attributed {_nano(total.attributed_nano_usd)} $ + "
            f"idle {_nano(total.idle_nano_usd)} $"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_footer=True,
    )
    table.add_column(report.by.value, footer="total", overflow="fold")
    for header, cell in zip(_HEADERS, _cells(total), strict=True):
        # On a narrow terminal the other columns fold; money stays readable as one number.
        table.add_column(
            header, footer=cell, justify="right", overflow="fold", no_wrap=header in _MONEY
        )
    for key, row in report.rows.items():
        table.add_row(key, *_cells(row))
    return table


def usage_as_json(report: UsageReport) -> dict[str, Any]:
    return {
        "by": report.by.value,
        "since_s": report.since_s,
        "until_s": report.until_s,
        "rows": [{report.by.value: key} | _row_as_json(row) for key, row in report.rows.items()],
        "total": _row_as_json(report.total),
    }


_MONEY = ("tariff", "capacity", "= attributed", "+ idle")
_HEADERS = ("requests", "tokens in (cached)", "tokens out", *_MONEY)


def _title(report: UsageReport) -> str:
    if report.since_s is None or report.until_s is None:
        return "Usage: nothing recorded yet"
    return f"Usage and its cost in $, {shown(report.since_s)} to {shown(report.until_s)} UTC"


def _cells(row: UsageRow) -> tuple[str, ...]:
    return (
        f"{row.requests:,}",
        f"{row.prompt_tokens:,} ({row.cached_tokens:,})",
        f"{row.completion_tokens:,}",
        _usd(row.tariff_usd),
        _nano(row.capacity_nano_usd),
        _nano(row.attributed_nano_usd),
        _nano(row.idle_nano_usd),
    )


def _row_as_json(row: UsageRow) -> dict[str, int | str]:
    return {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "tariff_usd": _plain(row.tariff_usd),
        "capacity_usd": _plain(Decimal(row.capacity_nano_usd).scaleb(-9)),
        "attributed_usd": _plain(Decimal(row.attributed_nano_usd).scaleb(-9)),
        "idle_usd": _plain(Decimal(row.idle_nano_usd).scaleb(-9)),
    }


def _nano(nano_usd: int) -> str:
    """All nine digits, so that the columns can be added up by eye."""
    return f"{nano_usd // NANO_USD_PER_USD:,}.{nano_usd % NANO_USD_PER_USD:09d}"


def _usd(amount: Decimal) -> str:
    """All digits there are, at least two after the point."""
    whole, _, digits = f"{amount:,f}".partition(".")
    return f"{whole}.{digits.rstrip('0'):0<2}"


def _plain(amount: Decimal) -> str:
    return f"{amount:f}"
