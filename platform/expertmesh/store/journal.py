"""The append-only record of what the controller saw, what it chose and why."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import insert, select

from expertmesh.store.database import Database
from expertmesh.store.schema import journal_entries


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
        # Text rather than a JSON column: the payload comes back digit for digit.
        text = json.dumps(msgspec.to_builtins(payload), allow_nan=False, ensure_ascii=False)
        statement = (
            insert(journal_entries)
            .values(at_s=at_s, kind=kind, model=model, payload_json=text)
            .returning(journal_entries.c.seq)
        )
        async with self._database.writing() as connection:
            await self._database.lock_journal(connection)
            seq: int = (await connection.execute(statement)).scalar_one()
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
            JournalEntry(row.seq, row.at_s, row.kind, row.model, json.loads(row.payload_json))
            for row in rows
        )
        return tuple(sorted(entries, key=lambda entry: entry.seq))
