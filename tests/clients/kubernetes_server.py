"""A mock of the Kubernetes API server: it speaks the protocol, and runs nothing.

Objects of any kind under /api and /apis: resourceVersions and conflicts, lists in pages, label
selectors, watches with bookmarks, versions that are gone, service account tokens, failures on
demand.
"""

import asyncio
import copy
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

TOKEN = "a service account's token"
NAMESPACE = "serving"
NODES = "/api/v1/nodes"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
RAY_CLUSTERS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters"
_COLLECTIONS = (NODES, LEASES, EVENTS, PODS, RAY_CLUSTERS)
_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
}


@dataclass
class Change:
    version: int
    kind: str
    collection: str
    item: dict[str, Any]


@dataclass
class KubernetesServer:
    folder: Path
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By method (WATCH is one) and path."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    delay_s: float = 0.0
    """Before an answer, after the work is done."""
    page: int = 500
    gone_as_status: bool = False
    """A watch of a version that is gone is refused instead of ended by an event."""
    token: str = TOKEN
    url: str = ""
    _version: int = 100
    _oldest: int = 100
    _changes: list[Change] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _watches: set[asyncio.Task[Any]] = field(default_factory=set)
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls).start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            self.cut_watches()
            await self._runner.cleanup()
            self._runner = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def kubeconfig(self) -> Path:
        path = self.folder / "kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [
                {
                    "name": "here",
                    "context": {"cluster": "mock", "user": "us", "namespace": NAMESPACE},
                }
            ],
            "clusters": [{"name": "mock", "cluster": {"server": self.url}}],
            "users": [{"name": "us", "user": {"token": TOKEN}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    # What a test does to it

    def put(self, collection: str, name: str, **parts: Any) -> dict[str, Any]:
        """Creates or replaces, as somebody else would. `metadata` is merged."""
        known = self.objects.get((collection, name))
        metadata = {**(known or {}).get("metadata", {}), "name": name, **parts.pop("metadata", {})}
        return self._store(collection, {**parts, "metadata": metadata})

    def delete(self, collection: str, name: str) -> None:
        item = self.objects.pop((collection, name))
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._note("DELETED", collection, item)

    def bookmark(self, collection: str) -> None:
        """Tells watches the newest version without a change."""
        self._version += 1
        item = {"metadata": {"resourceVersion": str(self._version)}}
        self._note("BOOKMARK", collection, item)

    def compact(self) -> None:
        """Forgets how the present came about: earlier versions are gone."""
        self._changes.clear()
        self._version += 1
        self._oldest = self._version

    def cut_watches(self) -> None:
        for task in list(self._watches):
            task.cancel()

    @property
    def watches(self) -> int:
        return len(self._watches)

    # What clients see

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        is_watch = request.query.get("watch") in ("1", "true")
        self.requests["WATCH" if is_watch else method, path] += 1
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if (method, path) in self.forbidden:
            return _status(403, f"cannot {method} {path}")
        if self.failures:
            status = self.failures.pop(0)
            headers = {"Retry-After": "1"} if status == 429 else {}
            return _status(status, "on demand", headers)
        collection = next((c for c in _COLLECTIONS if path == c or path.startswith(f"{c}/")), None)
        if collection is None:
            return _status(404, f"the server could not find {path}")
        if is_watch:
            return await self._watch(request, collection)
        name = path[len(collection) + 1 :]
        body = await request.json() if request.can_read_body else {}
        response = self._do(request, method, collection, name, body)
        await asyncio.sleep(self.delay_s)
        return response

    def _do(
        self, request: web.Request, method: str, collection: str, name: str, body: dict[str, Any]
    ) -> web.Response:
        known = self.objects.get((collection, name))
        if method == "GET" and not name:
            return self._list(request, collection)
        if method == "POST":
            name = body["metadata"]["name"]
            if (collection, name) in self.objects:
                return _status(409, f'"{name}" already exists', reason="AlreadyExists")
            return web.json_response(self._store(collection, body), status=201)
        if known is None:
            return _status(404, f'"{name}" not found')
        if method == "GET":
            return web.json_response(known)
        if method == "PUT" or method == "PATCH":
            wanted = body if method == "PUT" else _merged(known, body)
            version = (body.get("metadata") or {}).get("resourceVersion")
            if version is not None and version != known["metadata"]["resourceVersion"]:
                return _status(
                    409, f'Operation cannot be fulfilled on "{name}": the object has been modified'
                )
            return web.json_response(self._store(collection, wanted))
        return _status(405, method)

    def _list(self, request: web.Request, collection: str) -> web.Response:
        found = [
            item
            for (where, _), item in sorted(self.objects.items())
            if where == collection and _selected(request, item)
        ]
        limit = min(int(request.query.get("limit", self.page)), self.page)
        start, _, version = request.query.get("continue", "0").partition(":")
        if version and int(version) < self._oldest:
            return _status(410, "The provided continue parameter is too old")
        page = found[int(start) : int(start) + limit]
        metadata = {"resourceVersion": version or str(self._version)}
        if int(start) + limit < len(found):
            metadata["continue"] = f"{int(start) + limit}:{version or self._version}"
        return web.json_response({"kind": "List", "metadata": metadata, "items": page})

    async def _watch(self, request: web.Request, collection: str) -> web.StreamResponse:
        version = int(request.query.get("resourceVersion", "0"))
        if version < self._oldest and self.gone_as_status:
            return _status(410, f"too old resource version: {version} ({self._oldest})")
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "1800"))):
                await self._stream(request, response, collection, version)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            return response
        finally:
            self._watches.discard(task)
        await response.write_eof()
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, collection: str, version: int
    ) -> None:
        while True:
            if version < self._oldest:
                status = _status_body(410, f"too old resource version: {version}")
                await _send(response, {"type": "ERROR", "object": status})
                return
            self._changed.clear()
            for change in self._changes:
                if change.version <= version or change.collection != collection:
                    continue
                wants_it = request.query.get("allowWatchBookmarks") == "true"
                if change.kind == "BOOKMARK" and not wants_it:
                    continue
                if change.kind != "BOOKMARK" and not _selected(request, change.item):
                    continue
                await _send(response, {"type": change.kind, "object": change.item})
            version = max(version, self._version)
            await self._changed.wait()

    def _store(self, collection: str, item: dict[str, Any]) -> dict[str, Any]:
        item = copy.deepcopy(item)
        metadata = item["metadata"]
        self._version += 1
        known = self.objects.get((collection, metadata["name"]))
        metadata["resourceVersion"] = str(self._version)
        metadata.setdefault("uid", f"uid-{metadata['name']}")
        self.objects[collection, metadata["name"]] = item
        self._note("MODIFIED" if known is not None else "ADDED", collection, item)
        return item

    def _note(self, kind: str, collection: str, item: dict[str, Any]) -> None:
        self._changes.append(Change(self._version, kind, collection, copy.deepcopy(item)))
        self._changed.set()


@asynccontextmanager
async def kubernetes_server(folder: Path) -> AsyncIterator[KubernetesServer]:
    server = KubernetesServer(folder)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


def _selected(request: web.Request, item: dict[str, Any]) -> bool:
    labels = item["metadata"].get("labels") or {}
    wanted = [part for part in request.query.get("labelSelector", "").split(",") if part]
    return all(
        labels.get(part.partition("=")[0]) == part.partition("=")[2]
        if "=" in part
        else part in labels
        for part in wanted
    )


def _merged(known: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(known)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merged(merged.get(key) or {}, value)
        else:
            merged[key] = value
    return merged


def _status_body(code: int, message: str, reason: str | None = None) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason or _REASONS.get(code, "Unknown"),
        "code": code,
    }


def _status(
    code: int, message: str, headers: dict[str, str] | None = None, reason: str | None = None
) -> web.Response:
    return web.json_response(_status_body(code, message, reason), status=code, headers=headers)
