"""The append-only record of what the controller saw, what it chose and why."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import delete, exists, func, insert, literal, or_, select

from expertmesh.store.database import Database
from expertmesh.store.schema import journal_entries

_PACKED = "zlib:"
_PACKED_FROM = 16_384
"""Characters of a payload; shorter ones stay readable for those who look into the database."""
_BATCH = 2_000
"""Entries that are forgotten in one transaction: others wait for it to end."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    seq: int
    """Grows by every entry; pass the last one seen as `after` to read on."""
    at_s: float
    kind: str
    model: str | None
    payload: dict[str, Any]


class Journal:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(
        self, at_s: float, kind: str, model: str | None, payload: Mapping[str, Any]
    ) -> int:
        """Returns the entry's number. Numbers become visible in order, so a reader misses none.

        Raises ValueError for NaN and infinities: they would not replay as they were.
        """
        statement = (
            insert(journal_entries)
            .values(at_s=at_s, kind=kind, model=model, payload_json=_text(payload))
            .returning(journal_entries.c.seq)
        )
        async with self._database.writing() as connection:
            await self._database.lock_journal(connection)
            seq: int = (await connection.execute(statement)).scalar_one()
        return seq

    async def open_term(self, at_s: float, kind: str, payload: Mapping[str, Any]) -> int:
        """Begins a new term with an entry of its own: nobody can append in an earlier one after."""
        newest = select(func.coalesce(func.max(journal_entries.c.term), 0) + 1).scalar_subquery()
        statement = (
            insert(journal_entries)
            .values(at_s=at_s, kind=kind, model=None, payload_json=_text(payload), term=newest)
            .returning(journal_entries.c.term)
        )
        async with self._database.writing() as connection:
            await self._database.lock_journal(connection)
            term: int = (await connection.execute(statement)).scalar_one()
        return term

    async def newest_term(self) -> int:
        """0 when none was ever opened."""
        query = select(func.coalesce(func.max(journal_entries.c.term), 0))
        async with self._database.reading() as connection:
            term: int = (await connection.execute(query)).scalar_one()
        return term

    async def append_in_term(
        self, term: int, at_s: float, kind: str, model: str | None, payload: Mapping[str, Any]
    ) -> int | None:
        """As `append`; None when a later term has begun."""
        columns = journal_entries.c
        values = {
            "at_s": at_s,
            "kind": kind,
            "model": model,
            "payload_json": _text(payload),
            "term": term,
        }
        row = select(*(literal(value, columns[name].type) for name, value in values.items()))
        later = exists().where(columns.term > term)
        statement = (
            insert(journal_entries)
            .from_select(list(values), row.where(~later))
            .returning(columns.seq)
        )
        async with self._database.writing() as connection:
            await self._database.lock_journal(connection)
            seq: int | None = (await connection.execute(statement)).scalar_one_or_none()
        return seq

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> tuple[JournalEntry, ...]:
        """The first `limit` entries after number `after`, or the last ones with `newest`.

        Always in ascending order; with `model`, those of that model only.
        """
        columns = journal_entries.c
        query = select(journal_entries).where(columns.seq > after).limit(limit)
        if model is not None:
            query = query.where(columns.model == model)
        query = query.order_by(columns.seq.desc() if newest else columns.seq)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        entries = (
            JournalEntry(
                row.seq, row.at_s, row.kind, row.model, json.loads(_unpacked(row.payload_json))
            )
            for row in rows
        )
        return tuple(sorted(entries, key=lambda entry: entry.seq))

    async def forget(self, before_s: float) -> int:
        """Deletes entries from before then, the oldest first, and returns how many; at most so
        many at once that nobody waits for long: call it again while it deletes any.

        The newest decision of each model, from which a controller goes on after a restart, and the
        newest entry of the newest term stay.
        """
        columns = journal_entries.c
        newest = select(func.max(columns.seq)).group_by(columns.model)
        term = select(func.max(columns.term)).scalar_subquery()
        of_term = select(func.max(columns.seq)).where(columns.term == term).scalar_subquery()
        old = (
            select(columns.seq)
            .where(
                columns.at_s < before_s,
                columns.seq.not_in(newest),
                or_(of_term.is_(None), columns.seq != of_term),
            )
            .order_by(columns.seq)
            .limit(_BATCH)
        )
        async with self._database.writing() as connection:
            result = await connection.execute(delete(journal_entries).where(columns.seq.in_(old)))
        return int(result.rowcount)


def _text(payload: Mapping[str, Any]) -> str:
    """Text rather than a JSON column: the payload comes back digit for digit."""
    text = json.dumps(msgspec.to_builtins(payload), allow_nan=False, ensure_ascii=False)
    if len(text) < _PACKED_FROM:
        return text
    return _PACKED + base64.b64encode(zlib.compress(text.encode())).decode("ascii")


def _unpacked(text: str) -> str:
    if not text.startswith(_PACKED):
        return text
    return zlib.decompress(base64.b64decode(text[len(_PACKED) :])).decode()
