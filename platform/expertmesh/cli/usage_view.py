"""The usage report as a table, as JSON, as CSV, and under the names of FOCUS."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from expertmesh.cli.times import shown
from expertmesh.core.metering.attribution import NANO_USD_PER_USD
from expertmesh.core.metering.rating import usd_of
from expertmesh.core.metering.report import UsageReport, UsageRow
from expertmesh.store.focus import COLUMNS, FOCUS_VERSION, focus_rows
from expertmesh.store.report import UsageCells


@dataclass(frozen=True, slots=True)
class UsageTable:
    """Shows every digit of the money on 80 columns, and all its parts where there is room."""

    report: UsageReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report, total = self.report, self.report.total
        columns = _WIDE if options.max_width >= _WIDE_FROM else _NARROW
        table = Table(
            title=_title(report),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_footer=True,
        )
        table.add_column(report.by.value, footer="total", overflow="fold")
        for header, cell in columns.items():
            # On a narrow terminal the other columns fold; money stays readable as one number.
            table.add_column(
                header,
                footer=cell(total),
                justify="right",
                overflow="fold",
                no_wrap=header in _MONEY,
            )
        for key, row in report.rows.items():
            table.add_row(key, *(cell(row) for cell in columns.values()))
        yield from _bars(report, options)
        yield table
        yield Text(_sentence(total))


def _bars(report: UsageReport, options: ConsoleOptions) -> Iterator[RenderableType]:
    """What each row cost, the dearest first: the part that served requests, and the rest."""
    rows = sorted(report.rows.items(), key=lambda row: (-row[1].capacity_nano_usd, row[0]))
    rows = [(key, row) for key, row in rows if row.capacity_nano_usd > 0]
    if not rows:
        return
    used, unused = ("#", ".") if options.ascii_only else ("\N{FULL BLOCK}", "\N{LIGHT SHADE}")
    most = rows[0][1].capacity_nano_usd
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for column in ("key", "bar", "cost"):
        table.add_column(column, overflow="fold", no_wrap=column == "bar")
    for key, row in rows[:_BARS]:
        cells = max(1, round(_BAR_CELLS * row.capacity_nano_usd / most))
        share = row.attributed_nano_usd / row.capacity_nano_usd
        filled = round(cells * share)
        bar = Text(used * filled, style="cyan") + Text(unused * (cells - filled), style="dim")
        table.add_row(key, bar, f"{row.capacity_usd:,.2f} $, {share:.0%} used")
    yield Text(f"capacity by {report.by.value}: {used} used, {unused} not used")
    yield table
    if len(rows) > _BARS:
        yield Text(f"and {len(rows) - _BARS} more")


def render_usage(report: UsageReport) -> UsageTable:
    return UsageTable(report)


def usage_as_json(report: UsageReport) -> dict[str, Any]:
    return {
        "by": report.by.value,
        "since_s": report.since_s,
        "until_s": report.until_s,
        "rows": [{report.by.value: key, **_plain_row(row)} for key, row in report.rows.items()],
        "total": _plain_row(report.total),
    }


def usage_as_csv(report: UsageReport) -> str:
    """A header and one line a row; without the total, which a sheet would count twice."""
    rows = [{report.by.value: key, **_plain_row(row)} for key, row in report.rows.items()]
    return _csv((report.by.value, *_plain_row(UsageRow())), rows)


def focus_as_csv(cells: UsageCells) -> str:
    return _csv(COLUMNS, _focus(cells))


def focus_as_json(cells: UsageCells) -> str:
    return json.dumps({"FocusVersion": FOCUS_VERSION, "Rows": list(_focus(cells))}, indent=2)


def _focus(cells: UsageCells) -> list[dict[str, Any]]:
    if cells.since_s is None or cells.until_s is None:
        return []
    return [
        {name: _as_text(value) for name, value in row.items()}
        for row in focus_rows(cells.cells, cells.since_s, cells.until_s)
    ]


def _as_text(value: Decimal | str | int | None) -> str | int | None:
    """All digits and no exponent, as FOCUS wants numbers."""
    return f"{value:f}" if isinstance(value, Decimal) else value


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Nothing at all between two commas is null."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _title(report: UsageReport) -> str:
    if report.since_s is None or report.until_s is None:
        return "Usage: nothing recorded yet"
    return f"Usage and its cost in $, {shown(report.since_s)} to {shown(report.until_s)} UTC"


def _sentence(total: UsageRow) -> str:
    """The parts that are not zero, and always the first two."""
    parts = [("attributed", total.attributed_nano_usd), ("idle", total.idle_nano_usd)]
    others = (
        ("starting", total.starting_nano_usd),
        ("draining", total.draining_nano_usd),
        ("idle nodes", total.idle_nodes_nano_usd),
    )
    parts += [other for other in others if other[1]]
    told = " + ".join(f"{name} {_nano(amount)} $" for name, amount in parts)
    return f"capacity {_nano(total.capacity_nano_usd)} $ = {told}"


def _per_mtok(row: UsageRow) -> str:
    if row.usd_per_mtok is None:
        return "-"
    if row.usd_per_mtok_in is None or row.usd_per_mtok_out is None:
        return f"{row.usd_per_mtok:,.2f}"
    return f"{row.usd_per_mtok:,.2f} ({row.usd_per_mtok_in:,.2f}, {row.usd_per_mtok_out:,.2f})"


def _plain_row(row: UsageRow) -> dict[str, int | str | float | None]:
    return {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "tariff_usd": _plain(row.tariff_usd),
        "capacity_usd": _plain(row.capacity_usd),
        "attributed_usd": _plain(usd_of(row.attributed_nano_usd)),
        "idle_usd": _plain(usd_of(row.idle_nano_usd)),
        "starting_usd": _plain(usd_of(row.starting_nano_usd)),
        "draining_usd": _plain(usd_of(row.draining_nano_usd)),
        "idle_nodes_usd": _plain(usd_of(row.idle_nodes_nano_usd)),
        "external_usd": _plain(usd_of(row.external_nano_usd)),
        "margin_usd": _plain(row.margin_usd),
        "usd_per_mtok": _plain_or_none(row.usd_per_mtok),
        "usd_per_mtok_in": _plain_or_none(row.usd_per_mtok_in),
        "usd_per_mtok_out": _plain_or_none(row.usd_per_mtok_out),
        "energy_wh": None if row.energy_wh is None else round(row.energy_wh, 6),
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


def _plain_or_none(amount: Decimal | None) -> str | None:
    return None if amount is None else _plain(amount)


_WIDE_FROM = 150
_BARS = 12
_BAR_CELLS = 30
_USE: dict[str, Callable[[UsageRow], str]] = {
    "requests": lambda row: f"{row.requests:,}",
    "tokens in (cached)": lambda row: f"{row.prompt_tokens:,} ({row.cached_tokens:,})",
    "tokens out": lambda row: f"{row.completion_tokens:,}",
    "tariff": lambda row: _usd(row.tariff_usd),
    "capacity": lambda row: _nano(row.capacity_nano_usd),
    "= attributed": lambda row: _nano(row.attributed_nano_usd),
}
_NARROW = _USE | {
    "+ not used": lambda row: _nano(row.unattributed_nano_usd),
    "margin": lambda row: f"{row.margin_usd:,.4f}",
}
_WIDE = _USE | {
    "+ idle": lambda row: _nano(row.idle_nano_usd),
    "+ starting": lambda row: _nano(row.starting_nano_usd),
    "+ draining": lambda row: _nano(row.draining_nano_usd),
    "+ idle nodes": lambda row: _nano(row.idle_nodes_nano_usd),
    "margin": lambda row: f"{row.margin_usd:,.4f}",
    "$/Mtok (in, out)": lambda row: _per_mtok(row),
    "Wh": lambda row: "-" if row.energy_wh is None else f"{row.energy_wh:,.1f}",
}
_MONEY = {"tariff", "capacity"} | {name for name in _NARROW | _WIDE if name[0] in "=+"}
