"""Record decisions with all that they rest on, and read the last state back."""

import asyncio
import logging
from typing import Any, Protocol

import msgspec

from expertmesh.core.scaling.contract import Decision, ModelState
from expertmesh.core.scaling.explanation import explain
from expertmesh.core.scaling.replay import DecisionRecord, read_record

_log = logging.getLogger(__name__)

DECISION = "decision"
STARTED = "controller started"

_APPEND_TIMEOUT_S = 5.0
QUIET_S = 60.0
"""A decision that changes nothing is recorded this often."""
_LATER = 120
"""Entries after a decision in which it is looked for what became of it."""


class Entry(Protocol):
    @property
    def seq(self) -> int: ...
    @property
    def at_s(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def model(self) -> str | None: ...
    @property
    def payload(self) -> dict[str, Any]: ...


class JournalStore(Protocol):
    async def append(
        self, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int: ...

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> "tuple[Entry, ...]": ...


class DecisionJournal:
    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._written: dict[str, tuple[float, object]] = {}
        self._explaining = asyncio.Lock()

    def is_due(self, record: DecisionRecord) -> bool:
        decision = record.decision
        if decision.actions or decision.transitions:
            return True
        at_s, gist = self._written.get(decision.model, (float("-inf"), None))
        return gist != _gist(decision) or record.now_s - at_s >= QUIET_S

    async def write(self, record: DecisionRecord) -> int:
        async with asyncio.timeout(_APPEND_TIMEOUT_S):
            seq = await self._store.append(
                record.now_s, DECISION, record.decision.model, record.to_payload()
            )
        self._written[record.decision.model] = (record.now_s, _gist(record.decision))
        return seq

    async def write_started(self, now_s: float, adopted: list[str]) -> None:
        async with asyncio.timeout(_APPEND_TIMEOUT_S):
            await self._store.append(now_s, STARTED, None, {"groups": adopted})

    async def last(self, model: str) -> DecisionRecord | None:
        """None when there is none, or when another version wrote it in another form."""
        for entry in await self._store.read(limit=1, model=model, newest=True):
            try:
                return read_record(entry.payload)
            except msgspec.ValidationError as error:
                _log.warning(
                    "journal entry %d cannot be read (%s); the running groups of %s are adopted "
                    "as Serve shows them",
                    entry.seq,
                    error,
                    model,
                )
        return None

    async def newest(self, limit: int, model: str | None) -> list[dict[str, Any]]:
        """Decisions as the API shows them, newest first."""
        entries = await self._store.read(limit=limit, model=model, newest=True)
        return [
            _summary(entry)
            for entry in sorted(entries, key=lambda entry: -entry.seq)
            if entry.kind == DECISION
        ]

    async def explained(self, seq: int) -> dict[str, Any] | None:
        """The explanation of a decision, with what became of it; None when there is no such
        decision, or when another version wrote it in another form."""
        entries = await self._store.read(after=seq - 1, limit=1)
        found = next((e for e in entries if e.seq == seq and e.kind == DECISION), None)
        record = _readable(found) if found is not None else None
        if found is None or record is None:
            return None
        after = await self._store.read(after=seq, limit=_LATER, model=found.model)
        later = [each for each in map(_readable, after) if each is not None]
        # It decides a hundred times again: beside the loop, and only one at a time.
        async with self._explaining:
            explanation = await asyncio.to_thread(explain, record, later)
        shown = msgspec.to_builtins(explanation)
        return {"seq": seq, "at_s": found.at_s, **shown}


def _readable(entry: Entry) -> DecisionRecord | None:
    if entry.kind != DECISION:
        return None
    try:
        return read_record(entry.payload)
    except msgspec.ValidationError:
        return None


def _gist(decision: Decision) -> object:
    """What makes a decision worth recording when it differs."""
    state: ModelState = decision.state
    groups = tuple((record.spec.name, record.state, record.message) for record in state.groups)
    return (groups, state.wanted, decision.pending is None)


def _summary(entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"seq": entry.seq, "at_s": entry.at_s, "model": entry.model}
    record = _readable(entry)
    if record is None:
        # Another version wrote it: what it says of itself is still good.
        return {**shown, "reason": entry.payload.get("decision", {}).get("reason", "")}
    decision = record.decision
    for key in ("reason", "need", "pending", "demand", "binding", "actions", "transitions"):
        shown[key] = msgspec.to_builtins(getattr(decision, key))
    return {**shown, "wanted": decision.state.wanted}
