"""The store as the gateway sees it, in memory."""

import hashlib
from collections.abc import Sequence
from typing import Any

from expertmesh.core.domain.tenant import Caller
from expertmesh.core.metering.usage import UsageRecord


class MemoryKeys:
    def __init__(self) -> None:
        self.keys: dict[str, Caller] = {}
        """By SHA-256 hex digest; tests change it as they like."""
        self.error: Exception | None = None
        self.reads = 0
        self._version = 0
        self._seen: dict[str, Caller] = {}
        self._versions: dict[str, int] = {}

    def add(
        self, secret: str, tenant: str, expires_at_s: float | None = None, **fields: Any
    ) -> Caller:
        """`fields` as those of Caller."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        key_id = fields.pop("key_id", f"key_{len(self.keys)}")
        caller = Caller(key_id, tenant, expires_at_s=expires_at_s, **fields)
        self.keys[digest] = caller
        return caller

    async def version(self) -> int:
        self.reads += 1
        if self.error is not None:
            raise self.error
        before, self._seen = self._seen, dict(self.keys)
        changed = {key for key in before | self._seen if before.get(key) != self._seen.get(key)}
        self._version += bool(changed)
        self._versions |= dict.fromkeys(changed, self._version)
        return self._version

    async def active(self, now_s: float) -> dict[str, Caller]:
        if self.error is not None:
            raise self.error
        return dict(self.keys)

    async def changed(self, after: int, now_s: float) -> dict[str, Caller | None]:
        if self.error is not None:
            raise self.error
        changed = (key for key, version in self._versions.items() if version > after)
        return {key: self.keys.get(key) for key in changed}


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
