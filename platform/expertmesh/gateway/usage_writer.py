"""Brings usage from the journal to the ledger in batches, however the store behaves in between."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from expertmesh.core.metering.rating import price
from expertmesh.core.metering.usage import UsageRecord
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway.usage_journal import (
    Closed,
    LeftJournal,
    OpenCall,
    UsageJournal,
    left_journals,
)

_log = logging.getLogger(__name__)

_BATCH = 256
"""Small, as the worker does nothing else while it reads and prices a batch: less than a
millisecond. The ledger takes so many in one statement."""
_RETRY_PAUSE_S = 0.2
_LEFT_PERIOD_S = 30.0
"""So soon another worker takes over what a killed one left."""


class UsageLedger(Protocol):
    async def add_usage(self, records: Sequence[UsageRecord]) -> int:
        """All or none; ids that are known already are ignored."""
        ...


class UsageWriter:
    def __init__(self, ledger: UsageLedger, journal: UsageJournal, period_s: float) -> None:
        self._ledger = ledger
        self._period_s = period_s
        self._journal = journal
        self._left: list[LeftJournal] = []
        self._one_at_a_time = asyncio.Lock()
        self._failing = False
        self._look_again_s = 0.0
        self._given_up_ids: set[str] = set()
        """Of the batch that is tried."""
        self.given_up = 0
        """Records that went to the log instead of the ledger."""
        self.open_call = self._journal.open_call
        """Before the first byte of a stream goes to the client."""

    @property
    def pending(self) -> int:
        return self._journal.pending

    def record(self, usage: Closed, call: OpenCall | None = None) -> None:
        """Once for each request, before the last byte of its answer goes out; never raises."""
        try:
            if self._journal.close_call(usage, call):
                return
            reason = "too many records wait for the store"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._give_up(usage, reason)

    async def run(self) -> None:
        while True:
            self._journal.alive(time.time())
            await asyncio.to_thread(self._journal.maintain)
            await self.flush()
            if self._left or time.monotonic() >= self._look_again_s:
                await self.recover()
            await asyncio.sleep(self._period_s)

    async def flush(self) -> bool:
        """False when the store did not take all; what is left is tried again."""
        async with self._one_at_a_time:
            while batch := self._journal.unwritten(_BATCH):
                if not await self._add(batch.records):
                    return False
                self._journal.written(batch)
            return True

    async def close(self, timeout_s: float) -> None:
        """Writes everything. What the store refuses until the time-out stays in the journal for
        the next worker; what lies in no file goes to the log."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if await self.flush():
                        break
                    await asyncio.sleep(_RETRY_PAUSE_S)
        except TimeoutError:
            pass
        pending = self._journal.pending
        lost = self._journal.close()
        for usage in lost:
            self._give_up(usage, "the store did not answer until the shutdown")
        if pending > len(lost):
            _log.warning(
                "usage: %d records stay in %s for the next worker",
                pending - len(lost),
                self._journal.folder,
            )
        for journal in self._left:
            journal.release()
        self._left.clear()

    async def recover(self) -> bool:
        """Writes what workers left that were killed. False when the store did not take all; `run`
        goes on with it."""
        self._look_again_s = time.monotonic() + _LEFT_PERIOD_S
        if self._journal.root is not None:
            self._left += await asyncio.to_thread(left_journals, self._journal.root)
        while self._left:
            journal = self._left[0]
            try:
                if not await self._write_left(journal):
                    return False
            except OSError as error:
                _log.error("usage: %s: cannot be read: %s", journal.folder, error)
                journal.release()
            else:
                journal.delete()
            self._left.pop(0)
        return True

    async def _write_left(self, journal: LeftJournal) -> bool:
        batches: Iterator[list[Closed]] = journal.batches(_BATCH)
        taken = 0
        while batch := await asyncio.to_thread(next, batches, None):
            if not await self._add(batch):
                return False
            taken += len(batch)
        _log.info("usage: %s: took %d records of a worker that ended", journal.folder, taken)
        return True

    async def _add(self, batch: list[Closed]) -> bool:
        records = []
        for usage in batch:
            if usage.request_id not in self._given_up_ids:
                try:
                    records.append(_priced(usage))
                except ValueError as error:
                    self._give_up(usage, str(error))
                    self._given_up_ids.add(usage.request_id)
        await asyncio.sleep(0)  # requests go first; what follows takes as long again
        added = await self._add_records(records)
        if added:
            self._given_up_ids.clear()
        return added

    async def _add_records(self, records: list[UsageRecord]) -> bool:
        try:
            if records:
                await self._ledger.add_usage(records)
        except UpstreamUnavailable as error:
            if not self._failing:
                waiting = max(self.pending, len(records))
                _log.warning("usage: %d records wait for the store: %s", waiting, error)
            self._failing = True
            return False
        except Exception as error:
            # Not a matter of waiting: one row may be at fault, and must not hold up the others.
            if len(records) == 1:
                self._give_up(records[0], f"{type(error).__name__}: {error}")
                self._given_up_ids.add(records[0].request_id)
                return True
            results = [await self._add_records([record]) for record in records]
            return all(results)
        if self._failing:
            _log.info("usage: the store answers again")
        self._failing = False
        return True

    def _give_up(self, usage: Closed | UsageRecord, reason: str) -> None:
        """The log line holds the whole record, so that it can be entered by hand."""
        self.given_up += 1
        fields = msgspec.structs.asdict(usage) if isinstance(usage, Closed) else usage
        record = msgspec.json.encode(fields).decode()
        _log.error("usage: not written (%s): %s", reason, record)


def _priced(usage: Closed) -> UsageRecord:
    """By position, which takes a quarter of the time: both have their fields in one order."""
    return UsageRecord(
        usage.request_id,
        usage.at_s,
        usage.tenant,
        usage.key_id,
        usage.model,
        usage.group,
        usage.pool,
        usage.endpoint,
        usage.outcome,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        usage.queue_s,
        usage.ttft_s,
        usage.duration_s,
        price(usage, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
    )
