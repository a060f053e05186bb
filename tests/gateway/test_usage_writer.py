import asyncio
import logging
from decimal import Decimal

import pytest
from tests.gateway.memory_store import MemoryLedger

from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway import usage_writer
from expertmesh.gateway.usage_writer import UsageWriter

BUSY = UpstreamUnavailable("store: locked")


def usage(number: int) -> UsageRecord:
    return UsageRecord(
        request_id=f"req_{number}",
        at_s=1.0,
        tenant="team-a",
        key_id="key_0",
        model="m",
        group="g",
        pool="p",
        endpoint="chat_completions",
        outcome=Outcome.OK,
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        queue_s=0.0,
        ttft_s=0.1,
        duration_s=0.2,
        tariff_usd=Decimal("0.001"),
    )


async def test_records_come_in_batches() -> None:
    ledger = MemoryLedger()
    writer = UsageWriter(ledger, 0.05)
    running = asyncio.create_task(writer.run())
    for number in range(1200):
        writer.record(usage(number))
    await asyncio.sleep(0.12)
    assert ledger.batches == [500, 500, 200]
    running.cancel()


async def test_nothing_is_lost_or_doubled_while_the_store_is_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, 0.01)
    running = asyncio.create_task(writer.run())
    writer.record(usage(1))
    await asyncio.sleep(0.05)
    writer.record(usage(2))
    assert writer.pending == 2
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    ledger.error = None
    await asyncio.sleep(0.05)
    assert sorted(ledger.rows) == ["req_1", "req_2"]
    assert writer.pending == 0
    running.cancel()


async def test_close_waits_for_the_store() -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, 10.0)
    writer.record(usage(1))
    closing = asyncio.create_task(writer.close(5.0))
    await asyncio.sleep(0.1)
    ledger.error = None
    await closing
    assert sorted(ledger.rows) == ["req_1"]


async def test_what_the_store_never_takes_goes_to_the_log_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = MemoryLedger()
    ledger.error = BUSY
    writer = UsageWriter(ledger, 10.0)
    writer.record(usage(1))
    await writer.close(0.1)
    assert writer.pending == 0
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert '"request_id":"req_1"' in line and '"tariff_usd":"0.001"' in line


async def test_one_bad_row_does_not_hold_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    ledger = MemoryLedger()
    ledger.refused_ids = {"req_2"}
    writer = UsageWriter(ledger, 10.0)
    for number in range(5):
        writer.record(usage(number))
    assert await writer.flush()
    assert sorted(ledger.rows) == ["req_0", "req_1", "req_3", "req_4"]
    assert "req_2" in caplog.text and "a row breaks a rule" in caplog.text


async def test_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(usage_writer, "_MOST_PENDING", 3)
    writer = UsageWriter(MemoryLedger(), 10.0)
    for number in range(5):
        writer.record(usage(number))
    assert writer.pending == 3
    assert "req_0" in caplog.text and "req_1" in caplog.text and "req_2" not in caplog.text
