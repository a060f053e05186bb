"""Holds requests while their model has no ready group, within bounds."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.core.domain.fleet import Group, ServedModel
from expertmesh.core.domain.traffic import ModelTraffic
from expertmesh.gateway.api import ApiError
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.limits import GatewayLimits

_CLIENT_MARGIN_S = 5.0
"""The answer must reach the client before its own time-out, or it sees a broken connection."""
_UNKNOWN_WAIT_S = 5.0


@dataclass(eq=False, slots=True)
class _Waiter:
    released: asyncio.Future[None]
    since_s: float
    tokens: int


class Gate:
    def __init__(self, view: FleetView, limits: GatewayLimits, now_s: Callable[[], float]) -> None:
        """`now_s` is a monotonic clock."""
        self._view = view
        self._limits = limits
        self._now_s = now_s
        self._waiters: dict[str, dict[_Waiter, None]] = {}
        self._count = 0
        self._bytes = 0
        self._closed = False

    async def wait(
        self, model: ServedModel, client_timeout_s: float | None, tokens: int, size_bytes: int
    ) -> ApiError | None:
        """None when the model has a ready group; at once when it has one already."""
        started_s = self._now_s()
        limit_s = model.max_wait_s
        if client_timeout_s is not None:
            limit_s = min(limit_s, client_timeout_s - _CLIENT_MARGIN_S)
        deadline_s = started_s + limit_s
        while not self._view.is_ready(model.name):
            left_s = deadline_s - self._now_s()
            if self._closed or left_s <= 0:
                return self._unavailable(model)
            if (
                self._count >= self._limits.waiting_requests
                or self._bytes + size_bytes > self._limits.waiting_bytes
            ):
                return ApiError(
                    429,
                    f"Too many requests wait for a group ({self._count} of all models); "
                    f"{self._state(model)}.",
                    code="waiting_room_full",
                    retry_after_s=self._ready_in_s(model),
                )
            await self._hold(model.name, started_s, tokens, size_bytes, left_s)
        return None

    def release_ready(self) -> None:
        """Let go, in order of arrival, all that wait for a model that now has a ready group."""
        for model, waiters in self._waiters.items():
            if self._closed or self._view.is_ready(model):
                for waiter in waiters:
                    if not waiter.released.done():
                        waiter.released.set_result(None)

    def close(self) -> None:
        """Refuse all that wait: this worker shuts down, another one may serve them."""
        self._closed = True
        self.release_ready()

    def queued(self, model: str) -> int:
        return len(self._waiters.get(model, ()))

    def traffic(self) -> dict[str, ModelTraffic]:
        names = self._view.models.keys() | self._waiters.keys() | self._view.arrivals.keys()
        return {name: self._traffic(name) for name in sorted(names)}

    def _traffic(self, model: str) -> ModelTraffic:
        waiters = self._waiters.get(model, {})
        oldest_s = min((waiter.since_s for waiter in waiters), default=None)
        return ModelTraffic(
            queued_requests=len(waiters),
            queued_tokens=sum(waiter.tokens for waiter in waiters),
            oldest_wait_s=0.0 if oldest_s is None else self._now_s() - oldest_s,
            arrivals_total=self._view.arrivals.get(model, 0),
            wake_requests=0 if self._view.is_ready(model) else len(waiters),
        )

    async def _hold(
        self, model: str, since_s: float, tokens: int, size_bytes: int, limit_s: float
    ) -> None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), since_s, tokens)
        waiters = self._waiters.setdefault(model, {})
        waiters[waiter] = None
        self._count += 1
        self._bytes += size_bytes
        try:
            await asyncio.wait((waiter.released,), timeout=limit_s)
        finally:
            self._count -= 1
            self._bytes -= size_bytes
            del waiters[waiter]
            if not waiters and self._waiters.get(model) is waiters:
                del self._waiters[model]

    def _unavailable(self, model: ServedModel) -> ApiError:
        return ApiError(
            503,
            f"{self._state(model)}; try again later.",
            code="model_not_ready",
            retry_after_s=self._ready_in_s(model),
        )

    def _state(self, model: ServedModel) -> str:
        groups = self._view.groups_of(model.name)
        if not groups:
            return f"The model '{model.name}' has no group yet"
        return f"The model '{model.name}' has no ready group: {', '.join(map(_describe, groups))}"

    def _ready_in_s(self, model: ServedModel) -> float:
        times = [
            group.expected_ready_at_s
            for group in self._view.groups_of(model.name)
            if group.expected_ready_at_s is not None
        ]
        return min(times) - time.time() if times else _UNKNOWN_WAIT_S


def _describe(group: Group) -> str:
    state = f"{group.name} is {group.state.value}"
    return f"{state} ({group.message})" if group.message else state
