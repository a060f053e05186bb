"""The newest decisions for all pages that look on: only what is new is read from the journal."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

_KEPT = 50
_LOOK = 5
_LOOK_EVERY_S = 2.0

ReadDecisions = Callable[[int, str | None], Awaitable[list[dict[str, Any]]]]


class NewestDecisions:
    def __init__(self, read: ReadDecisions, now_s: Callable[[], float]) -> None:
        """`read`: so many decisions, newest first."""
        self._read = read
        self._now_s = now_s
        self._known: list[dict[str, Any]] = []
        self._looked_at_s = float("-inf")
        self._lock = asyncio.Lock()

    async def read(self) -> list[dict[str, Any]]:
        """Newest first; raises UpstreamUnavailable."""
        async with self._lock:
            now_s = self._now_s()
            if not 0 <= now_s - self._looked_at_s < _LOOK_EVERY_S:
                await self._look()
                self._looked_at_s = now_s
            return self._known

    async def _look(self) -> None:
        found = await self._read(_LOOK, None)
        known = {decision["seq"] for decision in self._known}
        if found and found[-1]["seq"] not in known:
            found = await self._read(_KEPT, None)
        new = [decision for decision in found if decision["seq"] not in known]
        if new:
            merged = {one["seq"]: one for one in (*self._known, *found)}
            self._known = [merged[seq] for seq in sorted(merged, reverse=True)[:_KEPT]]
