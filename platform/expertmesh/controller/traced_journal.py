"""Recorded decisions as spans, with what bound them and why."""

import time
from collections.abc import Callable
from typing import Any

from expertmesh.controller.journal import DECISION, Entry, JournalStore
from expertmesh.telemetry.traces import DecisionTracing


class TracedJournal:
    def __init__(
        self, store: JournalStore, tracing: DecisionTracing, now_s: Callable[[], float] = time.time
    ) -> None:
        """`now_s`: Unix time."""
        self._store = store
        self._tracing = tracing
        self._now_s = now_s

    async def append(
        self, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int:
        seq = await self._store.append(at_s, kind, model, payload)
        if kind == DECISION and self._tracing.on:
            decision = payload["decision"]
            self._tracing.decided(
                str(model),
                at_s,
                max(at_s, self._now_s()),
                {
                    "expertmesh.decision": seq,
                    "expertmesh.model": str(model),
                    "expertmesh.reason": str(decision.get("reason", "")),
                    "expertmesh.binding": str(decision.get("binding", "")),
                    "expertmesh.needed_groups": int(decision.get("need", 0)),
                },
                [
                    {
                        "expertmesh.action": str(action.get("kind", "")),
                        "expertmesh.group": str(action.get("group", "")),
                        "expertmesh.why": str(action.get("why", "")),
                    }
                    for action in decision.get("actions", ())
                ],
            )
        return seq

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> "tuple[Entry, ...]":
        return await self._store.read(after, limit, model, newest)
