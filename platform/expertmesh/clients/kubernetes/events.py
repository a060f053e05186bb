"""Events about one object, so that `kubectl describe` shows why the controller scaled.

As client-go's recorder does: what is said again counts up the event that is there, and a budget
keeps a busy controller from filling the cluster's store.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

_MERGE_PATCH = "application/merge-patch+json"
_COMPONENT = "expertmesh-controller"
_BURST = 25
_REFILL_S = 300.0
"""One more event of an object in so much time, once the burst is spent; client-go's figures."""
_REMEMBERED = 256
_FORGET_S = 3000.0
"""The server keeps events for an hour: an older one is written anew."""
_WAITING = 100
_LONGEST_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class About:
    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Saying:
    reason: str
    """One word in CamelCase."""
    message: str
    is_warning: bool = False


@dataclass(slots=True)
class _Written:
    event: str
    count: int
    at_s: float


class EventAnswer(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> dict[str, Any]: ...


class EventApi(Protocol):
    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = ...,
    ) -> EventAnswer: ...


class EventRecorder:
    """Never in the way: what cannot be told is dropped and counted."""

    def __init__(
        self,
        api: EventApi,
        find: Callable[[], Awaitable[About | None]],
        reporter: str,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`find`: the object that the events are about; asked until there is one. `reporter`:
        which of several controllers says it."""
        self._api = api
        self._find = find
        self._about: About | None = None
        self._reporter = reporter
        self._now_s = now_s
        self._queue: asyncio.Queue[Saying] = asyncio.Queue(_WAITING)
        self._written: OrderedDict[Saying, _Written] = OrderedDict()
        self._budget = float(_BURST)
        self._budget_at_s = now_s()
        self._failing = False
        self.dropped = 0

    def say(self, saying: Saying) -> None:
        try:
            self._queue.put_nowait(saying)
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.write(await self._queue.get())

    async def write(self, saying: Saying) -> None:
        now_s = self._now_s()
        if not self._has_budget(now_s):
            self.dropped += 1
            return
        try:
            self._about = self._about or await self._find()
            if self._about is None:
                self.dropped += 1
                return
            await self._write(self._about, saying, now_s)
        except UpstreamUnavailable as error:
            self.dropped += 1
            if not self._failing:
                _log.warning("events: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _has_budget(self, now_s: float) -> bool:
        passed_s = max(0.0, now_s - self._budget_at_s)
        self._budget = min(float(_BURST), self._budget + passed_s / _REFILL_S)
        self._budget_at_s = now_s
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    async def _write(self, about: About, saying: Saying, now_s: float) -> None:
        path = f"/api/v1/namespaces/{about.namespace}/events"
        known = self._written.get(saying)
        if known is not None and now_s - known.at_s < _FORGET_S:
            patch = {"count": known.count + 1, "lastTimestamp": _stamp(now_s)}
            answer = await self._api.call(
                "PATCH", f"{path}/{known.event}", body=patch, content_type=_MERGE_PATCH
            )
            if 200 <= answer.status < 300:
                known.count, known.at_s = known.count + 1, now_s
                return
            # The server has forgotten it.
        name = f"{about.name}.{secrets.token_hex(8)}"
        body = self._event(about, name, saying, now_s)
        answer = await self._api.call("POST", path, body=body)
        if not 200 <= answer.status < 300:
            said = answer.body.get("message", "")
            raise UpstreamUnavailable(f"Kubernetes: POST {path}: {answer.status}: {said}")
        self._written[saying] = _Written(name, 1, now_s)
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)

    def _event(self, about: About, name: str, saying: Saying, now_s: float) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": about.namespace},
            "involvedObject": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
            },
            "reason": saying.reason,
            "message": saying.message[:_LONGEST_MESSAGE],
            "type": "Warning" if saying.is_warning else "Normal",
            "count": 1,
            "firstTimestamp": _stamp(now_s),
            "lastTimestamp": _stamp(now_s),
            "source": {"component": _COMPONENT, "host": self._reporter},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._reporter,
        }


def _stamp(now_s: float) -> str:
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
