"""Brings usage records to the ledger in batches, however the store behaves in between."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import msgspec

from expertmesh.core.metering.usage import UsageRecord
from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

_BATCH = 500
_MOST_PENDING = 100_000
"""Some 50 MB; a store that stays away for longer than that must not end the worker."""
_RETRY_PAUSE_S = 0.2


class UsageLedger(Protocol):
    async def add_usage(self, records: Sequence[UsageRecord]) -> int:
        """All or none; ids that are known already are ignored."""
        ...


class UsageWriter:
    def __init__(self, ledger: UsageLedger, period_s: float) -> None:
        self._ledger = ledger
        self._period_s = period_s
        self._pending: deque[UsageRecord] = deque()
        self._one_at_a_time = asyncio.Lock()
        self._failing = False

    @property
    def pending(self) -> int:
        return len(self._pending)

    def record(self, usage: UsageRecord) -> None:
        if len(self._pending) >= _MOST_PENDING:
            _give_up(self._pending.popleft(), "too many records wait for the store")
        self._pending.append(usage)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self.flush()

    async def flush(self) -> bool:
        """False when the store did not take all; what is left is tried again."""
        async with self._one_at_a_time:
            while self._pending:
                batch = list(islice(self._pending, _BATCH))
                if not await self._add(batch):
                    return False
                # `record` may have dropped the oldest meanwhile.
                added = set(map(id, batch))
                while self._pending and id(self._pending[0]) in added:
                    self._pending.popleft()
            return True

    async def close(self, timeout_s: float) -> None:
        """Writes everything; what the store refuses until the time-out goes to the log instead."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if await self.flush():
                        break
                    await asyncio.sleep(_RETRY_PAUSE_S)
        except TimeoutError:
            pass
        while self._pending:
            _give_up(self._pending.popleft(), "the store did not answer until the shutdown")

    async def _add(self, batch: list[UsageRecord]) -> bool:
        try:
            await self._ledger.add_usage(batch)
        except UpstreamUnavailable as error:
            if not self._failing:
                _log.warning("usage: %d records wait for the store: %s", self.pending, error)
            self._failing = True
            return False
        except Exception as error:
            # Not a matter of waiting: one row may be at fault, and must not hold up the others.
            if len(batch) == 1:
                _give_up(batch[0], f"{type(error).__name__}: {error}")
                return True
            results = [await self._add([record]) for record in batch]
            return all(results)
        if self._failing:
            _log.info("usage: the store answers again")
        self._failing = False
        return True


def _give_up(usage: UsageRecord, reason: str) -> None:
    """The log line holds the whole record, so that it can be entered by hand."""
    record = msgspec.json.encode(usage).decode()
    _log.error("usage: not written (%s): %s", reason, record)
