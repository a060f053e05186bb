"""Where it is announced that nodes will be taken away: Kubernetes, a file, an HTTP endpoint.

All answer, by a node's name or address, the Unix time at which it will be lost. A notice that is
not there any more has been withdrawn.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import yaml

from expertmesh.clients.kubernetes.nodes import KubernetesNode, LossNotice
from expertmesh.clients.kubernetes.pods import PlacedPod
from expertmesh.controller.observe import SpotNotices
from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 20
_UNIX_FROM_S = 1e9
"""A number below is a span in seconds, one from here on a Unix time."""
_POLL_EVERY_S = 5.0
_POLL_TIMEOUT_S = 2.0


class FileNotices:
    """JSON or YAML: node → Unix time, ISO time, or seconds from the file's last change.

    No file means no notices. What cannot be read is named once in the log, and the last notices
    stay until the file is written anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._notices: dict[str, float] = {}

    async def read(self) -> Mapping[str, float]:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Mapping[str, float]:
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._seen = seen
                self._notices = _loss_times(self._text(status.st_size), status.st_mtime)
        except FileNotFoundError:
            self._seen, self._notices = None, {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            _log.error("spot notices: %s: %s; the earlier ones stay", self._path, said)
        return self._notices

    def _text(self, size: int) -> str:
        if size > _MOST_BYTES:
            raise ValueError(f"{size} bytes are too many; at most {_MOST_BYTES}")
        return self._path.read_text()


class HttpNotices:
    """An endpoint that answers GET with JSON: node → Unix time, ISO time, or seconds from now."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        every_s: float = _POLL_EVERY_S,
        timeout_s: float = _POLL_TIMEOUT_S,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._http = http
        self._url = url
        self._every_s = every_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._now_s = now_s
        self._asked_at_s = -math.inf
        self._notices: dict[str, float] = {}
        self._problem: str | None = None

    async def read(self) -> Mapping[str, float]:
        """Asks once in a while; raises UpstreamUnavailable while the endpoint gives no answer."""
        now_s = self._now_s()
        if not 0 <= now_s - self._asked_at_s < self._every_s:
            self._asked_at_s = now_s
            await self._ask(now_s)
        if self._problem is not None:
            raise UpstreamUnavailable(f"spot notices: {self._url}: {self._problem}")
        return self._notices

    async def _ask(self, now_s: float) -> None:
        self._problem = None
        try:
            async with self._http.get(self._url, timeout=self._timeout) as response:
                if response.status != 200:
                    self._problem = f"answered with status {response.status}"
                    return
                text = await response.content.read(_MOST_BYTES + 1)
            found = _loss_times(text.decode(), now_s)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._problem = f"no answer: {str(error) or type(error).__name__}"
        except (ValueError, yaml.YAMLError) as error:
            self._problem = " ".join(str(error).split())
        else:
            # A span that is said again and again does not begin anew each time.
            self._notices = {
                node: min(at_s, self._notices.get(node, math.inf)) for node, at_s in found.items()
            }


class NodeList(Protocol):
    """As `Watched` of nodes."""

    @property
    def objects(self) -> Mapping[str, KubernetesNode]: ...
    @property
    def is_known(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...


class PodList(Protocol):
    @property
    def objects(self) -> Mapping[str, PlacedPod]: ...


class KubernetesNotices:
    """Taints, labels and conditions of nodes, told of the node and of the Ray pods on it."""

    def __init__(
        self, nodes: NodeList, pods: PodList, now_s: Callable[[], float] = time.time
    ) -> None:
        self._nodes = nodes
        self._pods = pods
        self._now_s = now_s
        self._first_seen_at_s: dict[tuple[str, str], float] = {}

    async def read(self) -> Mapping[str, float]:
        if self._nodes.problem is not None or not self._nodes.is_known:
            raise UpstreamUnavailable(self._nodes.problem or "Kubernetes: no nodes read yet")
        now_s = self._now_s()
        seen: dict[tuple[str, str], float] = {}
        lost_at_s: dict[str, float] = {}
        for node in self._nodes.objects.values():
            for notice in node.notices:
                key = (node.name, notice.source)
                seen[key] = self._first_seen_at_s.get(key, now_s)
                at_s = _lost_at_s(notice, seen[key])
                lost_at_s[node.name] = min(at_s, lost_at_s.get(node.name, math.inf))
        self._first_seen_at_s = seen
        found = dict(lost_at_s)
        for name, at_s in lost_at_s.items():
            found |= dict.fromkeys(self._nodes.objects[name].addresses, at_s)
        for pod in self._pods.objects.values():
            if pod.node in lost_at_s:
                found |= dict.fromkeys((pod.name, *pod.addresses), lost_at_s[pod.node])
        return found


class AllNotices:
    """Several sources: the earliest time counts. One that fails keeps its last notices."""

    def __init__(self, sources: Iterable[SpotNotices]) -> None:
        self._sources = tuple(sources)
        self._last: list[Mapping[str, float]] = [{} for _ in self._sources]
        self._failing: list[str | None] = [None for _ in self._sources]

    async def read(self) -> Mapping[str, float]:
        """Raises UpstreamUnavailable when no source answers."""
        answers = await asyncio.gather(
            *(source.read() for source in self._sources), return_exceptions=True
        )
        problems = []
        for index, answer in enumerate(answers):
            if isinstance(answer, UpstreamUnavailable):
                problems.append(str(answer))
                if self._failing[index] is None:
                    _log.warning("%s", answer)
                self._failing[index] = str(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._last[index], self._failing[index] = answer, None
        if self._sources and len(problems) == len(self._sources):
            raise UpstreamUnavailable("; ".join(problems))
        found: dict[str, float] = {}
        for notices in self._last:
            for node, at_s in notices.items():
                found[node] = min(at_s, found.get(node, math.inf))
        return found


def _lost_at_s(notice: LossNotice, first_seen_at_s: float) -> float:
    if notice.lost_at_s is not None:
        return notice.lost_at_s
    # A notice that is told late leaves less time, never more.
    given_at_s = min(notice.given_at_s or math.inf, first_seen_at_s)
    return given_at_s + notice.lead_s


def _loss_times(text: str, since_s: float) -> dict[str, float]:
    """Raises ValueError or YAMLError. YAML reads JSON too."""
    if len(text) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    try:
        content = msgspec.json.decode(text)
    except msgspec.DecodeError:
        content = yaml.safe_load(text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"write node: time lines, not {type(content).__name__}")
    return {str(node): _unix_s(str(node), value, since_s) for node, value in content.items()}


def _unix_s(node: str, value: Any, since_s: float) -> float:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{node}: {value!r} is no time; write ISO 8601 or seconds") from None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool | date) or not isinstance(value, int | float):
        raise ValueError(f"{node}: {value!r} is no time; write ISO 8601 or seconds")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{node}: {value!r} is no time; write ISO 8601 or seconds")
    return float(value) if value >= _UNIX_FROM_S else since_s + value
