"""`expertmesh explain`: what the controller decided, why, and what would have changed it."""

from collections.abc import Sequence
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console

from expertmesh.cli.explain_view import one_line, render, render_calibration, render_changed
from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import duration_s
from expertmesh.core.scaling.calibration import calibrate
from expertmesh.core.scaling.explanation import explain as explained
from expertmesh.core.scaling.replay import DecisionRecord, read_record
from expertmesh.core.scaling.what_if import changed
from expertmesh.store.database import Database
from expertmesh.store.journal import Journal, JournalEntry

DECISION = "decision"
"""Kind of the journal entries that are decisions."""
_LATER = 500
"""Entries after a decision in which it is looked for what became of it."""
_PAGE = 200
_LOOKED_BACK = 2_000
"""Entries in which the newest decision that acted is looked for."""
_PIPE_WIDTH = 80


def explain(
    seq: Annotated[
        int | None,
        typer.Argument(
            metavar="[SEQ]", min=1, help="A decision's number. Default: the newest that acted."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, max=1000, help="List so many of the last, a line each."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Decisions about this model only.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="KEY=VALUE",
            help="Decide again with this changed, e.g. queue=2x; may be repeated. A wrong key "
            "prints all that can be changed.",
        ),
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="How well what was expected came true.")
    ] = False,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="For --calibration: 30m, 12h, 7d.")
    ] = "7d",
    as_json: Annotated[bool, typer.Option("--json", help="JSON.")] = False,
    store: StoreOption = None,
) -> None:
    """Tell why a decision was taken: what it saw, the candidates and why each lost, what bound it,
    what would have changed it, what was expected and what happened."""
    if calibration:
        _calibration(store, model, duration_s(since), as_json)
        return
    if limit is not None and seq is None:
        _list(store, limit, model, as_json)
        return

    async def read(database: Database) -> tuple[JournalEntry | None, tuple[JournalEntry, ...]]:
        journal = Journal(database)
        entry = await _find(journal, seq, model)
        if entry is None:
            return None, ()
        return entry, await journal.read(after=entry.seq, limit=_LATER, model=entry.model)

    entry, later = with_store(store, False, read)
    if entry is None:
        what = "no decisions yet" if seq is None else f"{seq}: no such decision"
        _fail(f"{what}; see `expertmesh explain --limit 10` for the last ones")
    record = readable(entry)
    if record is None:
        # Written by another version: its own words are still good.
        if what_if:
            _fail(f"{entry.seq}: another version wrote this decision; it cannot be decided again")
        _print_json(_summary(entry)) if as_json else typer.echo(one_line(entry))
        return
    if what_if:
        _what_if(entry, record, what_if, as_json)
        return
    after = [each for each in map(readable, later) if each is not None]
    explanation = explained(record, after)
    if as_json:
        _print_json({"seq": entry.seq, "at_s": entry.at_s, **msgspec.to_builtins(explanation)})
    else:
        _print(render(entry.seq, explanation))


def readable(entry: JournalEntry) -> DecisionRecord | None:
    """None for other entries, and for those that another version wrote."""
    if entry.kind != DECISION:
        return None
    try:
        return read_record(entry.payload)
    except msgspec.ValidationError:
        return None


async def _find(journal: Journal, seq: int | None, model: str | None) -> JournalEntry | None:
    if seq is not None:
        found = await journal.read(after=seq - 1, limit=1)
        return next((e for e in found if e.seq == seq and e.kind == DECISION), None)
    entries = await journal.read(limit=_LOOKED_BACK, model=model, newest=True)
    decisions = [entry for entry in entries if entry.kind == DECISION]
    acting = [entry for entry in decisions if _acted(entry)]
    chosen = acting or decisions
    return chosen[-1] if chosen else None


def _acted(entry: JournalEntry) -> bool:
    decision = entry.payload.get("decision", {})
    return bool(decision.get("actions") or decision.get("advice"))


def _list(store: str | None, limit: int, model: str | None, as_json: bool) -> None:
    async def read(database: Database) -> tuple[JournalEntry, ...]:
        return await Journal(database).read(limit=limit, model=model, newest=True)

    entries = [entry for entry in with_store(store, False, read) if entry.kind == DECISION]
    if not entries:
        _fail("no decisions yet")
    if as_json:
        _print_json([_summary(entry) for entry in entries])
        return
    for entry in entries:
        typer.echo(one_line(entry))


def _what_if(
    entry: JournalEntry, record: DecisionRecord, settings: Sequence[str], as_json: bool
) -> None:
    try:
        before, after = changed(record), changed(record, *settings)
    except ValueError as error:
        _fail(str(error))
    # Not from the journal: another version may have decided otherwise with nothing changed.
    one = explained(before, with_counterfactuals=False)
    other = explained(after, with_counterfactuals=False)
    if as_json:
        _print_json(
            {
                "seq": entry.seq,
                "what_if": list(settings),
                "decided": msgspec.to_builtins(one),
                "changed": msgspec.to_builtins(other),
            }
        )
    else:
        _print(render_changed(entry.seq, settings, (before, one), (after, other)))


def _calibration(store: str | None, model: str | None, span_s: float, as_json: bool) -> None:
    async def read(database: Database) -> list[DecisionRecord]:
        journal, found, after = Journal(database), [], 0
        newest = await journal.read(limit=1, model=model, newest=True)
        from_s = newest[-1].at_s - span_s if newest else 0.0
        while page := await journal.read(after=after, limit=_PAGE, model=model):
            after = page[-1].seq
            records = (readable(entry) for entry in page if entry.at_s >= from_s)
            found += [record for record in records if record is not None]
        return found

    records = with_store(store, False, read)
    if not records:
        _fail("no decisions yet")
    found = calibrate(records)
    if as_json:
        _print_json(msgspec.to_builtins(found))
    else:
        _print(render_calibration(found))


def _summary(entry: JournalEntry) -> dict[str, object]:
    decision = entry.payload.get("decision", {})
    return {
        "seq": entry.seq,
        "at_s": entry.at_s,
        "model": entry.model,
        "reason": decision.get("reason"),
        "actions": decision.get("actions", []),
    }


def _print(what: object) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH, no_color=True)
    console.print(what)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
