"""Tables of measured figures: on the terminal, and as generated blocks in a document."""

import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    columns: Row
    """The first one names the row, the others are numbers."""
    rows: tuple[Row, ...]
    notes: Row = ()

    def to_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        align = [":--", *("--:" for _ in self.columns[1:])]
        lines = [f"**{self.title}**", "", _line(self.columns), _line(align)]
        lines += [_line(row) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What else kept the machine busy: without it no figure can be compared with another."""

    load_before: float

    @classmethod
    def now(cls) -> "Conditions":
        return cls(os.getloadavg()[0])

    def until_now(self) -> str:
        return (
            f"{os.cpu_count()} cores; load average over 1 minute "
            f"{self.load_before:.1f} before and {os.getloadavg()[0]:.1f} after"
        )


def with_note(figure: Figure, note: str) -> Figure:
    return replace(figure, notes=(*figure.notes, note))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the smallest and largest value beside it."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def mebibytes(value_bytes: float) -> str:
    return f"{value_bytes / 2**20:,.0f}"


def show(console: Console, figures: Iterable[Figure]) -> None:
    for figure in figures:
        console.print(figure.to_rich())
        for note in figure.notes:
            console.print(note, style="dim", markup=False, highlight=False)
        console.print()


def write_block(document: Path, name: str, figures: Sequence[Figure]) -> None:
    """Replaces what stands between the markers of `name`. Raises ValueError without markers."""
    begin, end = f"<!-- begin figures: {name} -->", f"<!-- end figures: {name} -->"
    text = document.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{document.name}: needs {begin} and {end}, once each, in this order")
    body = "\n\n".join(figure.to_markdown() for figure in figures)
    block = f"{begin}\n\n{body}\n\n{end}"
    document.write_text(pattern.sub(lambda _: block, text))
