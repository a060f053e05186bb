"""The store as the gateway sees it, in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.core.metering.usage import UsageRecord


@dataclass(frozen=True, slots=True)
class MemoryKey:
    id: str
    tenant: str
    expires_at_s: float | None = None


class MemoryKeys:
    def __init__(self) -> None:
        self.keys: dict[str, MemoryKey] = {}
        self.error: Exception | None = None
        self.reads = 0

    def add(self, secret: str, tenant: str, expires_at_s: float | None = None) -> None:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        self.keys[digest] = MemoryKey(f"key_{len(self.keys)}", tenant, expires_at_s)

    async def active(self, now_s: float) -> dict[str, MemoryKey]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return dict(self.keys)


class MemoryLedger:
    def __init__(self) -> None:
        self.rows: dict[str, UsageRecord] = {}
        self.error: Exception | None = None
        self.refused_ids: set[str] = set()
        """Ids of which a batch fails, as when a row breaks a rule of the schema."""
        self.batches: list[int] = []

    async def add_usage(self, records: Sequence[UsageRecord]) -> int:
        if self.error is not None:
            raise self.error
        if any(record.request_id in self.refused_ids for record in records):
            raise ValueError("a row breaks a rule")
        before = len(self.rows)
        for record in records:
            self.rows.setdefault(record.request_id, record)
        self.batches.append(len(records))
        return len(self.rows) - before
