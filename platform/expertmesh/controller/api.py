"""The controller's HTTP API. Everything but health wants the mesh token."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from expertmesh.controller.console import PREFIX as CONSOLE
from expertmesh.controller.console import Console
from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.domain.mesh_token import MeshToken
from expertmesh.core.domain.traffic import GatewayReport
from expertmesh.core.scaling.demand import Flow, GroupDoing
from expertmesh.errors import ExpertMeshError

_log = logging.getLogger(__name__)

_BODY_LIMIT_BYTES = 1 << 20
"""A report of a thousand groups is about 200 kB."""
_NAME_LIMIT = 200
_DECISIONS_LIMIT = 1000
_LARGEST = 2**53
"""Of a count or a sum: differences of larger ones could not be told as JSON numbers."""
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_JSON = "application/json"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MetricsText(Protocol):
    def text(self) -> bytes: ...


class RoleView(Protocol):
    """Whether this process leads; without one it always does."""

    @property
    def leads(self) -> bool: ...
    @property
    def leader_url(self) -> str | None:
        """Of another process that leads, as far as is known."""
        ...


class ControllerView(Protocol):
    """What the API needs of the controller."""

    @property
    def fleet(self) -> Fleet | None: ...
    @property
    def metrics(self) -> MetricsText: ...
    def exchange(self, report: GatewayReport) -> Fleet | None: ...
    def summaries(self) -> dict[str, dict[str, Any]]: ...
    async def decisions(self, limit: int, model: str | None) -> list[dict[str, Any]]: ...
    async def explained(self, seq: int) -> dict[str, Any] | None: ...
    def doing(self) -> dict[str, GroupDoing]: ...
    def flows(self) -> dict[str, Flow]: ...
    def not_ready(self) -> dict[str, str]: ...
    def is_stuck(self) -> bool: ...


def build_api(
    controller: ControllerView,
    mesh_token: str,
    role: RoleView | None = None,
    console: Console | None = None,
) -> web.Application:
    api = _Api(controller, mesh_token, role)
    app = web.Application(
        middlewares=[api.answer_errors, api.check_token], client_max_size=_BODY_LIMIT_BYTES
    )
    app.router.add_post("/v1/exchange", api.exchange)
    app.router.add_get("/v1/fleet", api.fleet)
    app.router.add_get("/v1/decisions", api.decisions)
    app.router.add_get("/v1/decisions/{seq}", api.decision)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_get("/healthz", api.healthz)
    app.router.add_get("/readyz", api.readyz)
    if console is not None:
        console.add_to(app)
    return app


class _Api:
    def __init__(self, controller: ControllerView, mesh_token: str, role: RoleView | None) -> None:
        self._controller = controller
        self._role = role
        self._token = MeshToken(mesh_token)

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _error(413, "body_too_large", f"send at most {_BODY_LIMIT_BYTES} bytes")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            response = _error(
                405, "method_not_allowed", f"{request.method} {request.path}: use {allowed}"
            )
            response.headers["Allow"] = allowed
            return response
        except web.HTTPNotFound:
            return _error(404, "not_found", f"{request.path}: no such path")
        except web.HTTPException:
            raise
        except ExpertMeshError as error:
            return _error(503, "unavailable", str(error))
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _error(500, "internal_error", "the controller failed; see its log")

    @web.middleware
    async def check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_open(request.path) and not self._has_token(request):
            response = _error(
                401, "mesh_token_required", "send the header Authorization: Bearer <mesh token>"
            )
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return self._token.admits(given) and scheme.lower() == "bearer"

    async def exchange(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            report = msgspec.json.decode(body, type=GatewayReport)
        except msgspec.ValidationError as error:
            return _error(400, "bad_report", f"{error}; see GatewayReport")
        except msgspec.DecodeError as error:
            return _error(400, "bad_json", f"the body is no JSON: {error}")
        fault = _fault(report)
        if fault is not None:
            return _error(400, "bad_report", fault)
        fleet = self._controller.exchange(report)
        if fleet is None:
            elsewhere = self._not_leader()
            if elsewhere is not None:
                return elsewhere
            response = _error(503, "starting", "no decision yet; keep the last fleet, ask again")
            response.headers["Retry-After"] = "1"
            return response
        return web.Response(body=msgspec.json.encode(fleet), content_type=_JSON)

    async def fleet(self, request: web.Request) -> web.Response:
        """The fleet with its loads, what groups do and what gateways take per second, and the
        newest decision of each model in words."""
        controller = self._controller
        fleet = controller.fleet
        if fleet is None:
            return self._not_leader() or _error(503, "starting", "no decision yet; ask again")
        shown = {
            **msgspec.to_builtins(fleet),
            "doing": controller.doing(),
            "flows": controller.flows(),
            "decisions": controller.summaries(),
        }
        return web.Response(body=msgspec.json.encode(shown), content_type=_JSON)

    async def decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "20")
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _DECISIONS_LIMIT):
            return _error(400, "bad_limit", f"limit={text!r}: write 1 to {_DECISIONS_LIMIT}")
        found = await self._controller.decisions(int(text), request.query.get("model"))
        return web.Response(body=msgspec.json.encode({"decisions": found}), content_type=_JSON)

    async def decision(self, request: web.Request) -> web.Response:
        """One decision explained: what it saw, the candidates, and what became of it."""
        text = request.match_info["seq"]
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:18]) <= _LARGEST):
            return _error(400, "bad_number", f"{text!r}: write the number of a decision")
        found = await self._controller.explained(int(text))
        if found is None:
            return _error(
                404, "no_such_decision", f"{text}: no such decision; see GET /v1/decisions"
            )
        return web.Response(body=msgspec.json.encode(found), content_type=_JSON)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._controller.metrics.text(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def healthz(self, request: web.Request) -> web.Response:
        if self._controller.is_stuck():
            return _error(503, "stuck", "the control loop does not turn")
        return web.Response(body=b'{"status":"ok"}', content_type=_JSON)

    async def readyz(self, request: web.Request) -> web.Response:
        """Everybody may see which steps fail; why they fail is for those with the token."""
        problems = self._controller.not_ready()
        if not problems:
            follows = self._role is not None and not self._role.leads
            shown = {"status": "ready"} | ({"role": "follower"} if follows else {})
            return web.Response(body=msgspec.json.encode(shown), content_type=_JSON)
        failing: Any = problems if self._has_token(request) else sorted(problems)
        body = msgspec.json.encode({"status": "not ready", "failing": failing})
        return web.Response(status=503, body=body, content_type=_JSON)

    def _not_leader(self) -> web.Response | None:
        if self._role is None or self._role.leads or self._role.leader_url is None:
            return None
        leader = self._role.leader_url
        error = {
            "code": "not_leader",
            "message": f"this controller follows; ask the leader, {leader}",
            "leader": leader,
        }
        return web.Response(
            status=503, body=msgspec.json.encode({"error": error}), content_type=_JSON
        )


def _is_open(path: str) -> bool:
    """The console asks for its own sessions."""
    return path in _OPEN_PATHS or path == CONSOLE or path.startswith(f"{CONSOLE}/")


def _fault(report: GatewayReport) -> str | None:
    """What JSON's types cannot say about a report."""
    if not 0 < len(report.gateway) <= _NAME_LIMIT:
        return f"gateway: write a name of 1 to {_NAME_LIMIT} characters"
    if report.number < 0:
        return f"number: {report.number} is negative"
    if report.fleet_version < 0:
        return f"fleet_version: {report.fleet_version} is negative"
    for kind, counts in (("models", report.models), ("groups", report.groups)):
        for name, values in counts.items():
            for field, value in msgspec.to_builtins(values).items():
                if value < 0:
                    return f"{kind}.{name}.{field}: {value} is negative"
                if value > _LARGEST:
                    return f"{kind}.{name}.{field}: {value} is above 2**53"
    return None


def _error(status: int, code: str, message: str) -> web.Response:
    body = msgspec.json.encode({"error": {"code": code, "message": message}})
    return web.Response(status=status, body=body, content_type=_JSON)
