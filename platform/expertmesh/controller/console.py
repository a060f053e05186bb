"""The console: a web page of the controller that shows the fleet, its cost and its decisions.

The page itself is open, as it holds nothing; its data wants the mesh token or an admin key, which
it exchanges for a session. It changes nothing: what it computes, it computes from the journal.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from expertmesh.controller.console_access import ConsoleAccess
from expertmesh.controller.newest_decisions import NewestDecisions
from expertmesh.controller.overview import ControllerState, Overview
from expertmesh.controller.picture import ExpertHeat, Picture
from expertmesh.controller.today import Today
from expertmesh.core.scaling.contract import Decision
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.core.scaling.what_if import KEYS, changed
from expertmesh.errors import ExpertMeshError

_log = logging.getLogger(__name__)

PREFIX: Final = "/console"
_API: Final = f"{PREFIX}/api"
_FILES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_BODY_LIMIT_BYTES: Final = 16_384
_STREAMS: Final = 64
"""Pages that may look on at once."""
_EVERY_S: Final = 1.0
_HEAT_EVERY: Final = 5
"""Turns between two pictures of the experts; ranks count them as often."""
_ADMIT_AGAIN_S: Final = 30.0
_WRITE_TIMEOUT_S: Final = 30.0
_SETTINGS: Final = 30
_SETTING_LENGTH: Final = 200
_JSON: Final = "application/json"
_SEQ: Final = "{seq:[0-9]{1,15}}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ConsoleView(Protocol):
    """What the console needs of the controller."""

    def picture(self) -> Picture | None: ...
    def heat(self) -> dict[str, ExpertHeat]: ...
    async def decisions(self, limit: int, model: str | None) -> list[dict[str, Any]]: ...
    async def explained(self, seq: int) -> dict[str, Any] | None: ...
    async def last_record(self, model: str) -> DecisionRecord | None: ...
    def not_ready(self) -> dict[str, str]: ...
    def is_stuck(self) -> bool: ...


class RoleView(Protocol):
    @property
    def leads(self) -> bool: ...
    @property
    def leader_url(self) -> str | None: ...


class TodayView(Protocol):
    async def read(self) -> Today:
        """Raises UpstreamUnavailable."""
        ...


class Console:
    def __init__(
        self,
        view: ConsoleView,
        access: ConsoleAccess,
        *,
        name: str,
        gateway_url: str | None = None,
        today: TodayView | None = None,
        role: RoleView | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`name`: of the platform. `gateway_url`: as a browser reaches the gateway, for the chat;
        the page asks it directly, so it must allow the page's origin."""
        self._view = view
        self._access = access
        self._name = name
        self._gateway_url = gateway_url
        self._today = today
        self._role = role
        self._now_s = now_s
        self._decisions = NewestDecisions(view.decisions, now_s)
        self._deciding = asyncio.Lock()
        self._streams = 0
        self._ending = asyncio.Event()
        self._files = _read_files()
        self._policy = _policy(gateway_url)
        self._state_text = _SharedText(self._state, _EVERY_S / 2)
        self._heat_text = _SharedText(view.heat, _EVERY_S * _HEAT_EVERY / 2)

    def add_to(self, app: web.Application) -> None:
        """All below `/console`; the application's own checks must let these paths pass."""
        app.router.add_get(PREFIX, self._redirect)
        app.router.add_get(f"{PREFIX}/", self._file)
        app.router.add_post(f"{_API}/session", self._enter)
        app.router.add_get(f"{_API}/overview", self._admitted(self._overview))
        app.router.add_get(f"{_API}/stream", self._admitted(self._stream))
        app.router.add_get(f"{_API}/decisions/{_SEQ}", self._admitted(self._explained))
        app.router.add_get(f"{_API}/what-if", self._admitted(self._what_can_change))
        app.router.add_post(f"{_API}/what-if", self._admitted(self._what_if))
        app.router.add_get(f"{PREFIX}/{{name}}", self._file)
        app.on_shutdown.append(self._end)

    async def _end(self, app: web.Application) -> None:
        self._ending.set()

    # The page

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=308, headers={"Location": f"{PREFIX}/"})

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index.html")
        body = self._files.get(name)
        if body is None:
            raise web.HTTPNotFound
        return web.Response(
            body=body,
            content_type=_FILES[PurePosixPath(name).suffix],
            charset="utf-8",
            headers={**_HEADERS, "Content-Security-Policy": self._policy},
        )

    # Who may look

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        secret = body.get("secret") if body is not None else None
        if not isinstance(secret, str):
            return _error(400, "bad_request", 'send {"secret": "…"}')
        session = await self._access.enter(secret)
        if session is None:
            return _error(
                401,
                "not_admitted",
                "neither the mesh token nor an active admin key, or a link that was used or is old",
            )
        return _json({"session": session.text, "expires_at_s": session.expires_at_s})

    def _admitted(self, handler: Handler) -> Handler:
        async def check(request: web.Request) -> web.StreamResponse:
            if not await self._access.admits(_credential(request)):
                response = _error(401, "session_required", "sign in again")
                response.headers["WWW-Authenticate"] = "Bearer"
                return response
            return await handler(request)

        return check

    # What it shows

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: `state` each second, `heat` now and then, `decisions` when there is
        a new one, `today` when it was read again; all of them at the start."""
        if self._streams >= _STREAMS:
            return _error(503, "too_many", f"{_STREAMS} pages look on already; close one")
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._streams += 1
        try:
            await self._send_all(response, _credential(request))
        except (ConnectionError, TimeoutError):
            _log.debug("a page that looked on is gone")
        finally:
            self._streams -= 1
        return response

    async def _send_all(self, response: web.StreamResponse, credential: str) -> None:
        sent: dict[str, bytes] = {}
        turn = 0
        admitted_at_s = self._now_s()
        while not self._ending.is_set():
            if self._now_s() - admitted_at_s >= _ADMIT_AGAIN_S:
                if not await self._access.admits(credential):
                    await response.write(_event("ended", b"{}"))
                    return
                admitted_at_s = self._now_s()
            events = {"state": self._state_text.read()}
            if turn % _HEAT_EVERY == 0:
                events["heat"] = self._heat_text.read()
            events["decisions"] = msgspec.json.encode(await _or_error(self._decisions.read()))
            if self._today is not None:
                events["today"] = msgspec.json.encode(await _or_error(self._today.read()))
            for name, data in events.items():
                # The state also says that the controller is there.
                if name == "state" or sent.get(name) != data:
                    async with asyncio.timeout(_WRITE_TIMEOUT_S):
                        await response.write(_event(name, data))
                    sent[name] = data
            turn += 1
            try:
                async with asyncio.timeout(_EVERY_S):
                    await self._ending.wait()
            except TimeoutError:
                continue

    async def _explained(self, request: web.Request) -> web.StreamResponse:
        seq = int(request.match_info["seq"])
        found = await self._view.explained(seq)
        if found is None:
            return _error(404, "no_such_decision", f"decision {seq} cannot be explained")
        return _json(found)

    async def _what_can_change(self, request: web.Request) -> web.StreamResponse:
        return _json({"keys": KEYS})

    async def _what_if(self, request: web.Request) -> web.StreamResponse:
        """The newest recorded decision of a model, decided again with settings as `queue=2x`."""
        body = await _body(request) or {}
        model, settings = body.get("model"), _settings(body.get("settings"))
        if not isinstance(model, str) or settings is None:
            return _error(
                400, "bad_request", 'send {"model": "…", "settings": ["queue=2x", …]}, not too long'
            )
        record = await self._view.last_record(model)
        if record is None:
            return _error(404, "no_decision", f"{model[:_SETTING_LENGTH]}: no decision is recorded")
        try:
            async with self._deciding:
                after = await asyncio.to_thread(changed, record, *settings)
        except ValueError as error:
            return _error(400, "bad_setting", str(error))
        return _json(
            {
                "at_s": record.now_s,
                "before": _gist(record.decision),
                "after": _gist(after.decision),
            }
        )

    async def _overview(self, request: web.Request) -> web.StreamResponse:
        """All of it at once."""
        today = None if self._today is None else await _or_error(self._today.read())
        decisions = await _or_error(self._decisions.read())
        return _json(Overview(self._state(), decisions, today, self._view.heat()))

    def _state(self) -> ControllerState:
        leads = self._role is None or self._role.leads
        return ControllerState(
            at_s=self._now_s(),
            platform=self._name,
            gateway_url=self._gateway_url,
            problems=self._view.not_ready(),
            stuck=self._view.is_stuck(),
            leads=leads,
            leader_url=None if self._role is None or leads else self._role.leader_url,
            picture=self._view.picture(),
        )


class _SharedText:
    """JSON that is made once for all pages that ask within a moment."""

    def __init__(self, make: Callable[[], Any], for_s: float) -> None:
        self._make = make
        self._for_s = for_s
        self._made: tuple[float, bytes] | None = None

    def read(self) -> bytes:
        now_s = asyncio.get_running_loop().time()
        if self._made is None or now_s - self._made[0] >= self._for_s:
            self._made = now_s, msgspec.json.encode(self._make())
        return self._made[1]


_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _policy(gateway_url: str | None) -> str:
    connect = "'self'" if gateway_url is None else f"'self' {gateway_url}"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _read_files() -> dict[str, bytes]:
    folder = resources.files("expertmesh.controller") / "console"
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if PurePosixPath(file.name).suffix in _FILES
    }


def _settings(given: Any) -> tuple[str, ...] | None:
    if not isinstance(given, list) or len(given) > _SETTINGS:
        return None
    texts = tuple(one for one in given if isinstance(one, str) and len(one) <= _SETTING_LENGTH)
    return texts if len(texts) == len(given) else None


def _gist(decision: Decision) -> dict[str, Any]:
    return {
        "reason": decision.reason,
        "need": decision.need,
        "wanted": decision.state.wanted,
        "target": {option: n for option, n in decision.target.items() if n},
        "binding": decision.binding.value,
        "pending": decision.pending,
        "actions": [f"{one.kind.value} {one.group}: {one.why}" for one in decision.actions],
        "advice": [f"{one.kind.value} {one.group}: {one.why}" for one in decision.advice],
    }


def _credential(request: web.Request) -> str:
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


async def _body(request: web.Request) -> dict[str, Any] | None:
    if (request.content_length or 0) > _BODY_LIMIT_BYTES:
        return None
    data = await request.read()
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
    return body if isinstance(body, dict) and len(data) <= _BODY_LIMIT_BYTES else None


async def _or_error(question: Awaitable[Any]) -> Any:
    """What the store cannot tell now must not end the stream."""
    try:
        return await question
    except ExpertMeshError as error:
        return {"error": str(error)}
    except Exception as error:
        _log.debug("the console cannot read", exc_info=True)
        return {"error": f"{type(error).__name__}: {error}"}


def _event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type=_JSON, headers=_HEADERS
    )


def _error(status: int, code: str, message: str) -> web.Response:
    return _json({"error": {"code": code, "message": message}}, status)
