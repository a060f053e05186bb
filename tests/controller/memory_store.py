"""Journal and capacity ledger in memory; they can be made to fail, as a database out of reach."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.providers import ProviderTariff
from expertmesh.errors import UpstreamUnavailable


@dataclass(frozen=True)
class Entry:
    seq: int
    at_s: float
    kind: str
    model: str | None
    payload: dict[str, Any]


class MemoryJournal:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.is_down = False

    async def append(
        self, at_s: float, kind: str, model: str | None, payload: Mapping[str, Any]
    ) -> int:
        self._answer()
        text = json.dumps(payload, allow_nan=False)
        self.entries.append(Entry(len(self.entries) + 1, at_s, kind, model, json.loads(text)))
        return len(self.entries)

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> tuple[Entry, ...]:
        self._answer()
        found = [
            entry
            for entry in self.entries
            if entry.seq > after and (model is None or entry.model == model)
        ]
        return tuple(found[-limit:] if newest else found[:limit])

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")


class MemoryLedger:
    def __init__(self) -> None:
        self.holds: dict[str, CapacityHold] = {}
        self.writes = 0
        self.is_down = False

    async def hold_capacity(
        self, holds: Sequence[CapacityHold], nodes: Sequence[NodeHold] = ()
    ) -> None:
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")
        self.writes += 1
        for hold in holds:
            known = self.holds.get(hold.group)
            if known is None or known.ended_at_s is None:
                self.holds[hold.group] = hold

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]:
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")
        return tuple(self.holds.values())

    async def open_nodes(self) -> tuple[NodeHold, ...]:
        return ()

    async def set_provider_tariffs(self, tariffs: Sequence[ProviderTariff]) -> None:
        """Tests of the real ledger look at these."""
