"""Make Serve run exactly the groups that were decided on."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from expertmesh.clients.ray_serve import Application, ApplicationStatus
from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.core.scaling.contract import ModelState
from expertmesh.errors import SetupError

_log = logging.getLogger(__name__)

_PUT_PATIENCE_S = 2.0
"""A first PUT starts Serve itself and takes long; the loop goes on meanwhile."""
_PUT_SETTLE_S = 10.0
"""After a PUT Serve's list is believed only after this long."""
_GROUP_PREFIX = "em-"


class ServeWriter(Protocol):
    async def put(self, specs: tuple[GroupSpec, ...]) -> None: ...


def wanted_specs(states: Iterable[ModelState]) -> tuple[GroupSpec, ...]:
    """Every group that was not taken out on purpose, whatever its state."""
    specs = [
        record.spec for state in states for record in state.groups if record.removed_at_s is None
    ]
    return tuple(sorted(specs, key=lambda spec: spec.name))


class Applier:
    """One PUT at a time, and only when the wanted set is not what Serve has or was told."""

    def __init__(self, serve: ServeWriter) -> None:
        self._serve = serve
        self._running: asyncio.Task[None] | None = None
        self._sent: tuple[GroupSpec, ...] | None = None
        self._sent_at_s = 0.0
        self._warned: frozenset[str] = frozenset()

    async def apply(
        self, states: Iterable[ModelState], applications: tuple[Application, ...], now_s: float
    ) -> None:
        """Raises what the PUT raised; it is tried again on the next call."""
        await self._finish_running(now_s)
        states = tuple(states)
        wanted = wanted_specs(states)
        if self._running is not None or self._is_settled(wanted, applications, now_s):
            return
        self._check_nothing_else_is_dropped(states, wanted, applications)
        self._sent = wanted
        self._running = asyncio.create_task(self._serve.put(wanted))
        await self._finish_running(now_s)

    async def close(self) -> None:
        """Lets a PUT that is under way come to its end; stopping in its middle helps nobody."""
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=_PUT_PATIENCE_S)
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def _finish_running(self, now_s: float) -> None:
        task = self._running
        if task is None:
            return
        await asyncio.wait({task}, timeout=_PUT_PATIENCE_S)
        if not task.done():
            return
        self._running = None
        self._sent_at_s = now_s
        try:
            task.result()
        except BaseException:
            self._sent = None
            raise

    def _is_settled(
        self, wanted: tuple[GroupSpec, ...], applications: tuple[Application, ...], now_s: float
    ) -> bool:
        if wanted == self._sent and now_s - self._sent_at_s < _PUT_SETTLE_S:
            return True
        running = tuple(
            sorted(
                (
                    app.spec
                    for app in applications
                    if app.spec is not None and app.status is not ApplicationStatus.DELETING
                ),
                key=lambda spec: spec.name,
            )
        )
        return wanted == running

    def _check_nothing_else_is_dropped(
        self,
        states: tuple[ModelState, ...],
        wanted: tuple[GroupSpec, ...],
        applications: tuple[Application, ...],
    ) -> None:
        """A PUT deletes what it does not name."""
        known = {spec.name for spec in wanted}
        known |= {record.spec.name for state in states for record in state.groups}
        strangers = {
            app.name
            for app in applications
            if app.name not in known and app.status is not ApplicationStatus.DELETING
        }
        groups = sorted(name for name in strangers if name.startswith(_GROUP_PREFIX))
        if groups:
            raise SetupError(
                f"Serve application {groups[0]}: looks like a group, but its arguments cannot be "
                "read, and applying a decision would delete it; delete it by hand, or run the "
                "controller version that started it"
            )
        others = frozenset(strangers)
        if others - self._warned:
            _log.warning(
                "Serve applications %s are not groups; the controller owns Serve and deletes them",
                ", ".join(sorted(others)),
            )
            self._warned |= others
