"""`expertmesh replay`: every recorded decision decided again, and compared to the last bit."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import typer

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import shown
from expertmesh.core.scaling.replay import read_record
from expertmesh.core.scaling.replay import replay as decided_again
from expertmesh.errors import SetupError
from expertmesh.store.database import Database
from expertmesh.store.journal import Journal, JournalEntry

_PAGE = 200
_DECISION = "decision"


@dataclass
class _Count:
    decisions: int = 0
    equal: int = 0
    other_version: int = 0
    first_difference: str | None = None

    @property
    def differ(self) -> int:
        return self.decisions - self.equal - self.other_version


def replay(
    journal: Annotated[
        Path | None,
        typer.Argument(metavar="[JOURNAL]", help="An exported journal. Default: the store."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Decisions about this model only.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the entries, a JSON object a line."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Decide every recorded decision again from what was recorded with it, and end with 1 where
    one is not equal: then another version of the policy wrote it, or it was changed."""
    count = _Count()
    if journal is None:

        async def read(database: Database) -> None:
            with _writer(export) as out:
                async for entry in _from_store(Journal(database), model):
                    _take(count, entry, out)

        with_store(store, False, read)
        source = "the store"
    else:
        source = str(journal)
        try:
            with _writer(export) as out:
                for entry in _from_file(journal, model):
                    _take(count, entry, out)
        except SetupError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
    _tell(count, source)


def _take(count: _Count, entry: JournalEntry, out: TextIO | None) -> None:
    if out is not None:
        out.write(json.dumps(msgspec.to_builtins(entry), ensure_ascii=False) + "\n")
    if entry.kind != _DECISION:
        return
    count.decisions += 1
    try:
        record = read_record(entry.payload)
    except msgspec.ValidationError:
        count.other_version += 1
        return
    found = decided_again(record).first_difference
    if found is None:
        count.equal += 1
    elif count.first_difference is None:
        when = shown(entry.at_s)
        count.first_difference = f"decision {entry.seq} of {entry.model}, {when}: {found}"


def _tell(count: _Count, source: str) -> None:
    text = f"{count.equal} of {count.decisions} decisions in {source} replay to the last bit"
    if count.other_version:
        text += f"; {count.other_version} in another version's form were not checked"
    typer.echo(text)
    if count.first_difference is not None:
        typer.echo(f"error: {count.differ} differ; the first: {count.first_difference}", err=True)
    elif not count.equal:
        typer.echo("error: nothing was checked", err=True)
    if count.first_difference is not None or not count.equal:
        raise typer.Exit(1)


async def _from_store(journal: Journal, model: str | None) -> AsyncIterator[JournalEntry]:
    after = 0
    while page := await journal.read(after=after, limit=_PAGE, model=model):
        for entry in page:
            yield entry
        after = page[-1].seq


def _from_file(path: Path, model: str | None) -> Iterator[JournalEntry]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                entry = _entry(path, number, line)
                if model is None or entry.model == model:
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: cannot be read: {error}") from None


def _entry(path: Path, number: int, line: str) -> JournalEntry:
    try:
        # As the store reads it: every number as it was written.
        value: Any = json.loads(line)
        return msgspec.convert(value, JournalEntry)
    except (ValueError, msgspec.ValidationError) as error:
        raise SetupError(
            f"{path}: line {number}: {error}; write it with `expertmesh replay --export`"
        ) from None


def _writer(path: Path | None) -> Any:
    if path is None:
        return nullcontext(None)
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        typer.echo(f"error: --export: {path}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
