"""Decisions told to those who look at the cluster, as soon as they are in the journal."""

from collections.abc import Callable
from typing import Any

from expertmesh.clients.kubernetes.events import Saying
from expertmesh.controller.journal import DECISION, Entry, JournalStore


class AnnouncedJournal:
    """Says each action of a decision that was recorded."""

    def __init__(self, store: JournalStore, say: Callable[[Saying], None]) -> None:
        """`say` returns at once."""
        self._store = store
        self._say = say

    async def append(
        self, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int:
        seq = await self._store.append(at_s, kind, model, payload)
        if kind == DECISION:
            decision = payload["decision"]
            for action in decision.get("actions", ()):
                why = action.get("why") or decision.get("reason", "")
                self._say(_saying(seq, model, why, action))
        return seq

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> "tuple[Entry, ...]":
        return await self._store.read(after, limit, model, newest)


def _saying(seq: int, model: str | None, why: str, action: dict[str, Any]) -> Saying:
    verb = str(action.get("kind", "scale")).replace("_", "-").title().replace("-", "")
    group = action.get("group", "a group")
    return Saying(f"{verb}Group", f"{group} of {model}: {why} (decision {seq})")
