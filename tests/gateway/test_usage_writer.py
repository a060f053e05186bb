import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from tests.gateway.memory_store import MemoryLedger
from tests.gateway.metered import closed, opened

from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway import usage_writer
from expertmesh.gateway.usage_journal import UsageJournal, left_journals
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger

ROOT = Path(__file__).parents[2]
BUSY = UpstreamUnavailable("store: locked")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def until(met: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if met():
                return
            await asyncio.sleep(0.002)


async def test_records_come_in_batches() -> None:
    ledger = MemoryLedger()
    writer = UsageWriter(ledger, UsageJournal(), 0.01)
    for number in range(1200):
        writer.record(closed(number))
    running = asyncio.create_task(writer.run())
    await until(lambda: len(ledger.rows) == 1200)
    assert ledger.batches == [256] * 4 + [176]
    assert writer.pending == 0
    running.cancel()


async def test_the_ledger_gets_the_exact_price() -> None:
    ledger = MemoryLedger()
    writer = UsageWriter(ledger, UsageJournal(), 10.0)
    writer.record(closed(1))
    assert await writer.flush()
    row = ledger.rows["req_1"]
    # 1000 tokens at 0.20, 234 at 0.05 and 56 at 0.60 dollars a million
    assert row.tariff_usd == Decimal("0.0002453")
    assert row == UsageRecord(
        request_id="req_1",
        at_s=1000.0,
        tenant="team-a",
        key_id="key_0",
        model="m",
        group="g",
        pool="p",
        endpoint="chat_completions",
        outcome=Outcome.OK,
        prompt_tokens=1234,
        cached_tokens=234,
        completion_tokens=56,
        queue_s=0.25,
        ttft_s=0.5,
        duration_s=2.0,
        tariff_usd=Decimal("0.0002453"),
    )


async def test_nothing_is_lost_or_doubled_while_the_store_is_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(), 0.01)
    writer.record(closed(1))
    for _ in range(3):
        assert not await writer.flush()
    writer.record(closed(2))
    assert writer.pending == 2
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    ledger.error = None
    assert await writer.flush()
    assert sorted(ledger.rows) == ["req_1", "req_2"]
    assert writer.pending == 0


async def test_close_waits_for_the_store() -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(), 10.0)
    writer.record(closed(1))
    closing = asyncio.create_task(writer.close(5.0))
    await asyncio.sleep(0.1)
    assert not closing.done()
    ledger.error = None
    await closing
    assert sorted(ledger.rows) == ["req_1"]


async def test_what_the_store_never_takes_goes_to_the_log_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(), 10.0)
    writer.record(closed(1))
    await writer.close(0.1)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert '"request_id":"req_1"' in line and '"usd_per_mtok_out":0.6' in line
    assert writer.given_up == 1


async def test_what_the_store_never_takes_stays_in_files_for_the_next_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(tmp_path), 10.0)
    writer.record(closed(1))
    await writer.close(0.1)
    assert "1 records stay in" in caplog.text and writer.given_up == 0
    ledger.error = None
    await run_until(UsageWriter(ledger, UsageJournal(tmp_path), 0.01), ledger, 1)
    assert sorted(ledger.rows) == ["req_1"]
    assert names(tmp_path) == ["lock"]


async def run_until(writer: UsageWriter, ledger: MemoryLedger, rows: int) -> None:
    running = asyncio.create_task(writer.run())
    await until(lambda: len(ledger.rows) >= rows)
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await writer.close(1.0)


async def test_a_store_that_is_away_gets_what_a_killed_worker_left_later(tmp_path: Path) -> None:
    killed = UsageJournal(tmp_path)
    killed.close_call(closed(1))
    killed.open_call(opened(2)).progress(12)
    killed.close()  # with something pending it leaves all as a kill would
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(tmp_path), 0.01)
    running = asyncio.create_task(writer.run())
    await asyncio.sleep(0.1)
    assert ledger.rows == {}
    assert left_journals(tmp_path) == []  # held
    ledger.error = None
    await until(lambda: len(ledger.rows) == 2)
    assert ledger.rows["req_2"].outcome is Outcome.ERROR
    assert ledger.rows["req_2"].completion_tokens == 12
    assert ledger.rows["req_2"].tariff_usd == Decimal("0.0000086")  # 7 in, 12 out
    await until(lambda: len(list(tmp_path.glob("worker-*"))) == 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await writer.close(1.0)
    assert names(tmp_path) == ["lock"]


async def test_one_bad_row_does_not_hold_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    ledger = MemoryLedger()
    ledger.refused_ids = {"req_2"}
    writer = UsageWriter(ledger, UsageJournal(), 10.0)
    for number in range(5):
        writer.record(closed(number))
    assert await writer.flush()
    assert sorted(ledger.rows) == ["req_0", "req_1", "req_3", "req_4"]
    assert "req_2" in caplog.text and "a row breaks a rule" in caplog.text
    assert writer.given_up == 1


async def test_counts_that_cannot_be_priced_do_not_hold_up_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, UsageJournal(), 10.0)
    writer.record(closed(1, completion_tokens=-1))
    writer.record(closed(2))
    for _ in range(3):
        await writer.flush()
    ledger.error = None
    assert await writer.flush()
    assert sorted(ledger.rows) == ["req_2"]
    # Once, however often the batch was tried.
    assert writer.given_up == 1 and caplog.text.count("req_1") == 1


async def test_a_record_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    writer = UsageWriter(MemoryLedger(), UsageJournal(), 10.0)
    writer.record(closed(1, completion_tokens=2**70))
    assert writer.pending == 0 and writer.given_up == 1
    assert "req_1" in caplog.text


async def test_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    writer = UsageWriter(
        MemoryLedger(), UsageJournal(segment_bytes=4096, most_memory_segments=1), 10.0
    )
    for number in range(100):
        writer.record(closed(number))
    assert 0 < writer.pending < 100
    assert writer.pending + writer.given_up == 100
    assert "too many records wait for the store" in caplog.text
    assert '"req_99"' in caplog.text and '"req_0"' not in caplog.text


# A worker that is killed between any two steps of the way to the ledger.

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.gateway.metered import closed, opened
from expertmesh.gateway import usage_writer
from expertmesh.gateway.usage_journal import UsageJournal
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger

step, root, store = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
usage_writer._BATCH = 5

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class DyingLedger:
    def __init__(self, ledger):
        self.ledger, self.batches = ledger, 0
    async def add_usage(self, records):
        self.batches += 1
        if step == "before the ledger":
            die()
        if step == "before the second batch" and self.batches == 2:
            die()
        added = await self.ledger.add_usage(records)
        if step == "after the ledger":
            die()
        return added

async def main():
    database = await open_database(store)
    journal = UsageJournal(root, segment_bytes=4096)
    writer = UsageWriter(DyingLedger(Ledger(database)), journal, 0.01)
    streams = [writer.open_call(opened(number)) for number in range(3)]
    for number in range(100, 160):
        writer.record(closed(number))
    streams[0].progress(5)
    if step == "between last token and record":
        die()
    writer.record(closed(0, 6), streams[0])
    streams[1].progress(8)
    if step == "before the first flush":
        die()
    if step == "between record and freeing":
        journal.maintain = die
    if step == "half way through freeing":
        segment = type(journal._segments[0])
        discard = segment.discard
        def discard_and_die(self):
            discard(self)
            die()
        segment.discard = discard_and_die
    await writer.flush()
    journal.maintain()
    writer.record(closed(1, 9), streams[1])
    if step == "after freeing":
        die()
    await writer.flush()
    die()

asyncio.run(main())
"""

STEPS = [
    "between last token and record",
    "before the first flush",
    "before the ledger",
    "after the ledger",
    "before the second batch",
    "between record and freeing",
    "half way through freeing",
    "after freeing",
    "at the end",
]


@pytest.mark.parametrize("step", STEPS)
async def test_a_kill_at_any_step_leaves_each_request_in_the_ledger_once(
    tmp_path: Path, step: str
) -> None:
    root, store = tmp_path / "usage", f"sqlite+aiosqlite:///{tmp_path}/store.db"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, step, str(root), store),
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        stderr=subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    database = await open_database(store)
    ledger = Ledger(database)
    await the_next_worker(ledger, root)
    rows = {row.request_id: row for row in await ledger.usage()}
    await database.close()
    assert sorted(rows) == sorted(f"req_{n}" for n in (*range(3), *range(100, 160)))
    for number in range(100, 160):
        assert rows[f"req_{number}"].tariff_usd == Decimal("0.0002453")
    closed_0 = step != "between last token and record"
    assert (rows["req_0"].outcome, rows["req_0"].completion_tokens) == (
        (Outcome.OK, 6) if closed_0 else (Outcome.ERROR, 5)
    )
    closed_1 = step in ("after freeing", "at the end")
    assert (rows["req_1"].outcome, rows["req_1"].completion_tokens) == (
        (Outcome.OK, 9) if closed_1 else (Outcome.ERROR, 8 if closed_0 else 0)
    )
    assert (rows["req_2"].outcome, rows["req_2"].completion_tokens) == (Outcome.ERROR, 0)
    assert names(root) == ["lock"]


async def the_next_worker(ledger: Ledger, root: Path) -> None:
    writer = UsageWriter(ledger, UsageJournal(root), 0.01)
    running = asyncio.create_task(writer.run())
    await until(lambda: len(list(root.glob("worker-*"))) == 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await writer.close(1.0)


async def test_a_second_worker_takes_over_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_writer, "_LEFT_PERIOD_S", 0.0)
    ledger = MemoryLedger()
    dead = UsageJournal(tmp_path)
    writer = UsageWriter(ledger, UsageJournal(tmp_path), 0.01)
    running = asyncio.create_task(writer.run())
    dead.close_call(closed(7))
    await asyncio.sleep(0.05)
    assert ledger.rows == {}  # the other lives
    dead.close()
    await until(lambda: "req_7" in ledger.rows)
    running.cancel()
