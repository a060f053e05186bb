"""On SQLite, and as an integration test on a real PostgreSQL."""

import asyncio
from dataclasses import replace

from sqlalchemy import text

from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.store.database import Database, open_database
from expertmesh.store.journal import Journal
from expertmesh.store.leases import LeaseTable

CLAIM = LeaseRecord("one_1", "http://one:8090", duration_s=10.0, transitions=1)


async def test_a_lease_that_nobody_took_has_no_version(database: Database) -> None:
    assert await LeaseTable(database, "controller").read() == LeaseRecord(None)


async def test_what_was_written_is_read_with_a_new_version(database: Database) -> None:
    lease = LeaseTable(database, "controller")
    first = await lease.write(CLAIM)
    assert first == replace(CLAIM, version="1")
    assert await lease.read() == first
    second = await lease.write(first)
    assert second == replace(CLAIM, version="2")
    assert await lease.read() == second


async def test_a_write_against_an_older_version_changes_nothing(database: Database) -> None:
    lease = LeaseTable(database, "controller")
    first = await lease.write(CLAIM)
    assert first is not None
    second = await lease.write(first)
    assert await lease.write(replace(first, holder="two_2")) is None
    assert await lease.write(replace(CLAIM, holder="two_2")) is None
    assert await lease.read() == second


async def test_leases_of_different_names_do_not_meet(database: Database) -> None:
    await LeaseTable(database, "one").write(CLAIM)
    assert await LeaseTable(database, "two").read() == LeaseRecord(None)


async def test_of_many_that_want_one_version_one_gets_it(url: str) -> None:
    databases = [await open_database(url) for _ in range(4)]
    tables = [LeaseTable(database, "controller") for database in databases]
    for _ in range(5):
        known = await tables[0].read()
        answers = await asyncio.gather(
            *(
                table.write(replace(known, holder=f"host_{index}"))
                for index, table in enumerate(tables)
            )
        )
        won = [answer for answer in answers if answer is not None]
        assert len(won) == 1
        assert await tables[0].read() == won[0]
    for database in databases:
        await database.close()


async def test_terms_only_grow_and_close_the_earlier_ones(database: Database) -> None:
    journal = Journal(database)
    await journal.append(1.0, "note", None, {})
    assert await journal.newest_term() == 0
    first = await journal.open_term(2.0, "term", {"holder": "one"})
    assert await journal.append_in_term(first, 3.0, "decision", "m", {"a": 0.1}) is not None
    second = await journal.open_term(4.0, "term", {"holder": "two"})
    assert second == first + 1
    assert await journal.append_in_term(first, 5.0, "decision", "m", {"a": 0.2}) is None
    assert await journal.append_in_term(second, 6.0, "decision", "m", {"a": 0.3}) is not None
    assert await journal.newest_term() == second
    entries = await journal.read()
    assert [(entry.kind, entry.at_s) for entry in entries] == [
        ("note", 1.0),
        ("term", 2.0),
        ("decision", 3.0),
        ("term", 4.0),
        ("decision", 6.0),
    ]
    assert entries[2].payload == {"a": 0.1}
    async with database.reading() as connection:
        rows = await connection.execute(text("SELECT term FROM journal_entries ORDER BY seq"))
    assert list(rows.scalars()) == [None, 1, 1, 2, 2]


async def test_terms_opened_together_differ(url: str) -> None:
    databases = [await open_database(url) for _ in range(4)]
    terms = await asyncio.gather(
        *(Journal(database).open_term(1.0, "term", {}) for database in databases)
    )
    assert sorted(terms) == [1, 2, 3, 4]
    for database in databases:
        await database.close()
