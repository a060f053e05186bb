"""A list of objects that is kept up to date by a watch, over reconnects and lost versions."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

_PAGE = "500"
_WATCH_S = 30
"""The server ends a watch after so long, and it is begun anew: a connection that has died without a
word is noticed by then."""
_SILENCE_S = _WATCH_S + 10.0
_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0
_SHORTEST_WATCH_S = 1.0

Kept = TypeVar("Kept")


class ListedAnswer(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> dict[str, Any]: ...


class ListWatchApi(Protocol):
    async def call(
        self, method: str, path: str, query: Mapping[str, str] | None = None
    ) -> ListedAnswer: ...

    def lines(
        self, path: str, query: Mapping[str, str], silence_s: float
    ) -> AsyncIterator[bytes]: ...


class _Gone(Exception):
    """The version to go on from is not kept by the server any more."""


class Watched(Generic[Kept]):
    """Objects by name, each reduced to what `keep` makes of it."""

    def __init__(
        self,
        api: ListWatchApi,
        path: str,
        keep: Callable[[dict[str, Any]], Kept],
        selector: str = "",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`path`: of the collection. `selector`: by label."""
        self._api = api
        self._path = path
        self._keep = keep
        self._selector = {"labelSelector": selector} if selector else {}
        self._now_s = now_s
        self._version: str | None = None
        self._objects: dict[str, Kept] = {}
        self.lists = 0
        """How often all were read."""
        self.is_known = False
        """Once all have been read."""
        self.problem: str | None = None
        """Why it is not up to date; None while the watch runs."""

    @property
    def objects(self) -> Mapping[str, Kept]:
        return self._objects

    async def run(self) -> None:
        """For ever."""
        retry_s = _FIRST_RETRY_S
        while True:
            began_s = self._now_s()
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
            except _Gone:
                self._version = None
                _log.info("%s: the watch fell behind; all are read again", self._path)
            except UpstreamUnavailable as error:
                if self.problem is None:
                    _log.warning("watch: %s", error)
                self.problem = str(error)
            if self._now_s() - began_s >= _SHORTEST_WATCH_S and self.problem is None:
                retry_s = _FIRST_RETRY_S
                continue
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    async def _list(self) -> None:
        found: dict[str, Kept] = {}
        page: dict[str, str] = {"limit": _PAGE, **self._selector}
        while True:
            answer = await self._api.call("GET", self._path, page)
            if answer.status == 410:
                raise _Gone
            if answer.status != 200:
                said = answer.body.get("message", "")
                raise UpstreamUnavailable(f"Kubernetes: {self._path}: {answer.status}: {said}")
            try:
                for item in answer.body.get("items") or []:
                    found[item["metadata"]["name"]] = self._keep(item)
                metadata = answer.body["metadata"]
                version = str(metadata["resourceVersion"])
            except (LookupError, TypeError, ValueError) as error:
                raise self._nonsense(error) from error
            if not metadata.get("continue"):
                break
            page["continue"] = metadata["continue"]
        self._objects = found
        self._version = version
        self.lists += 1
        self._is_up_to_date()

    async def _watch(self) -> None:
        assert self._version is not None
        query = {
            "watch": "1",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_S),
            **self._selector,
        }
        async for line in self._api.lines(self._path, query, _SILENCE_S):
            try:
                event = msgspec.json.decode(line)
                self._take(event["type"], event["object"])
            except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
                # What was missed is not known.
                self._version = None
                raise self._nonsense(error) from error
        self._is_up_to_date()

    def _take(self, kind: str, item: dict[str, Any]) -> None:
        if kind == "ERROR":
            if item.get("code") == 410:
                raise _Gone
            raise UpstreamUnavailable(f"Kubernetes: {self._path}: {item.get('message')}")
        metadata = item["metadata"]
        if kind in ("ADDED", "MODIFIED"):
            self._objects = {**self._objects, metadata["name"]: self._keep(item)}
        elif kind == "DELETED":
            self._objects = {
                name: kept for name, kept in self._objects.items() if name != metadata["name"]
            }
        self._version = str(metadata["resourceVersion"])
        self._is_up_to_date()

    def _is_up_to_date(self) -> None:
        if self.problem is not None:
            _log.info("watch: %s answers again", self._path)
        self.problem = None
        self.is_known = True

    def _nonsense(self, error: Exception) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"Kubernetes: {self._path}: sent what cannot be read: {type(error).__name__}: {error}"
        )
