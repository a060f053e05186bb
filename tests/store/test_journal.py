import asyncio
import json
import math
from dataclasses import dataclass

import pytest
from sqlalchemy import delete, select

from expertmesh.core.metering.usage import Outcome
from expertmesh.store.database import Database
from expertmesh.store.journal import Journal, JournalEntry
from expertmesh.store.schema import journal_entries


async def test_an_entry_comes_back_digit_for_digit(database: Database) -> None:
    payload = {"wait_s": 0.1 + 0.2, "at": 1e300, "n": 2**62, "none": None, "ü": ["a", {"b": True}]}
    seq = await Journal(database).append(12.5, "decision", "tiny-moe", payload)
    assert await Journal(database).read() == (
        JournalEntry(seq, 12.5, "decision", "tiny-moe", payload),
    )


@dataclass(frozen=True, slots=True)
class _Observation:
    outcome: Outcome
    groups: tuple[str, ...]


async def test_core_values_are_written_as_plain_ones(database: Database) -> None:
    journal = Journal(database)
    await journal.append(1.0, "tick", None, {"seen": _Observation(Outcome.OK, ("a", "b"))})
    (entry,) = await journal.read()
    assert entry.payload == {"seen": {"outcome": "ok", "groups": ["a", "b"]}}
    assert entry.model is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
async def test_what_would_not_replay_is_refused(database: Database, number: float) -> None:
    journal = Journal(database)
    with pytest.raises(ValueError, match="JSON"):
        await journal.append(1.0, "tick", None, {"wait_s": [number]})
    assert await journal.read() == ()


async def test_reading_on_from_the_last_number_seen_meets_every_entry_once(
    database: Database,
) -> None:
    journal = Journal(database)
    written = [await journal.append(float(n), "tick", None, {"n": n}) for n in range(25)]
    assert written == sorted(set(written))

    pages, after = [], 0
    while page := await journal.read(after=after, limit=10):
        pages.append([entry.payload["n"] for entry in page])
        after = page[-1].seq
    assert [len(page) for page in pages] == [10, 10, 5]
    assert [n for page in pages for n in page] == list(range(25))


async def test_the_newest_come_in_ascending_order_too(database: Database) -> None:
    journal = Journal(database)
    seqs = [await journal.append(float(n), "tick", None, {}) for n in range(5)]
    assert [entry.seq for entry in await journal.read(limit=2, newest=True)] == seqs[-2:]
    assert await journal.read(after=seqs[-1], newest=True) == ()


async def test_reading_one_model(database: Database) -> None:
    journal = Journal(database)
    for model in ("a", "b", None, "a"):
        await journal.append(1.0, "decision", model, {})
    assert [entry.model for entry in await journal.read(model="a")] == ["a", "a"]
    assert await journal.read(model="c") == ()


async def test_a_number_is_not_given_out_twice(database: Database) -> None:
    journal = Journal(database)
    seq = await journal.append(1.0, "tick", None, {})
    async with database.writing() as connection:
        await connection.execute(delete(journal_entries))
    assert await journal.append(2.0, "tick", None, {}) > seq


async def test_numbers_appear_in_order_under_concurrent_writers(database: Database) -> None:
    """A reader that pages while others write must not miss an entry that commits late."""
    journal = Journal(database)

    async def write() -> None:
        for _ in range(20):
            await journal.append(1.0, "tick", None, {})

    seen: list[int] = []

    async def follow() -> None:
        while len(seen) < 80:
            page = await journal.read(after=seen[-1] if seen else 0)
            seen.extend(entry.seq for entry in page)
            await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await asyncio.gather(follow(), *(write() for _ in range(4)))
    assert seen == [entry.seq for entry in await journal.read(limit=100)]
    assert len(seen) == 80


async def test_a_large_entry_is_stored_packed_and_comes_back_digit_for_digit(
    database: Database,
) -> None:
    payload = {"ranks": [{"url": f"http://10.0.0.{n}/ü", "at_s": n / 7} for n in range(1000)]}
    await Journal(database).append(1.0, "decision", "a", payload)
    (entry,) = await Journal(database).read()
    assert entry.payload == payload
    async with database.reading() as connection:
        text = (await connection.execute(select(journal_entries.c.payload_json))).scalar_one()
    assert len(text) < 0.35 * len(json.dumps(payload))


async def test_what_is_old_is_forgotten_and_the_newest_of_each_model_stays(
    database: Database,
) -> None:
    journal = Journal(database)
    term = await journal.open_term(1.0, "controller started", {})
    for at_s in range(2, 12):
        await journal.append_in_term(term, float(at_s), "decision", "busy", {})
    await journal.append_in_term(term, 3.0, "decision", "quiet", {})
    await journal.append(20.0, "controller started", None, {})
    assert await journal.forget(before_s=8.0) == 7
    kept = [(entry.at_s, entry.model) for entry in await journal.read()]
    assert kept == [(8.0, "busy"), (9.0, "busy"), (10.0, "busy"), (11.0, "busy"), (3.0, "quiet"),
                    (20.0, None)]  # fmt: skip
    assert await journal.forget(before_s=8.0) == 0
    assert await journal.forget(before_s=1e9) == 3
    assert {entry.model for entry in await journal.read()} == {"busy", "quiet", None}


async def test_forgetting_everything_keeps_the_term_and_the_numbers(database: Database) -> None:
    journal = Journal(database)
    first = await journal.open_term(1.0, "controller started", {})
    second = await journal.open_term(2.0, "controller started", {})
    last = await journal.append(3.0, "controller started", None, {})
    assert await journal.forget(before_s=1e9) == 1
    assert await journal.newest_term() == second
    assert await journal.append_in_term(first, 4.0, "decision", "a", {}) is None
    seq = await journal.append_in_term(second, 4.0, "decision", "a", {})
    assert seq is not None
    assert seq > last


async def test_many_are_forgotten_a_batch_at_a_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.store.journal._BATCH", 3)
    journal = Journal(database)
    for at_s in range(8):
        await journal.append(float(at_s), "decision", "a", {})
    assert [await journal.forget(before_s=1e9) for _ in range(4)] == [3, 3, 1, 0]
    assert [entry.at_s for entry in await journal.read()] == [7.0]
