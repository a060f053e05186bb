"""The gateway's application: routes, checks in the order of their cost, and the way in."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from expertmesh.core.admission.limit_book import Estimate, Refused, Reserved
from expertmesh.core.domain.mesh_token import MeshToken
from expertmesh.core.domain.tenant import Caller
from expertmesh.gateway.access_log import AccessLog
from expertmesh.gateway.admission import Admission
from expertmesh.gateway.answers import JSON_LINE, error_lines, id_lines
from expertmesh.gateway.api import (
    ENDPOINTS,
    GET_PATHS,
    MODELS_PATH,
    ApiError,
    Endpoint,
    Protocol,
    error_body,
)
from expertmesh.gateway.asgi_bridge import AsgiBridge
from expertmesh.gateway.auth import KeyRing
from expertmesh.gateway.call import Call, read_question
from expertmesh.gateway.client_connection import ClientConnection, Request
from expertmesh.gateway.cors import Cors
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.flight import Flight, State
from expertmesh.gateway.limit_answers import limit_error, limit_lines
from expertmesh.gateway.limiter import Limiter
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.model_list import ModelList
from expertmesh.gateway.prices import PriceBook
from expertmesh.gateway.relay import Relay
from expertmesh.gateway.request_ids import RequestIds
from expertmesh.gateway.usage import PromptSizes
from expertmesh.telemetry.traces import Tracing

_log = logging.getLogger(__name__)

ADMIN_PATH: Final = "/admin/v1"
_NO_KEY: Final = ApiError(
    401,
    "The request has no API key; send it as 'Authorization: Bearer …' or 'x-api-key'.",
    code="invalid_api_key",
)
_BAD_KEY: Final = ApiError(
    401, "The API key is unknown, revoked or expired.", code="invalid_api_key"
)
_NO_KEYS_YET: Final = ApiError(
    503, "The gateway starts and has not loaded its keys yet.", retry_after_s=1.0
)
_NO_FLEET_YET: Final = ApiError(
    503, "The gateway starts and does not know the fleet yet.", retry_after_s=1.0
)
GATEWAY_FAILED: Final = ApiError(500, "The gateway failed; its log says why.")
_ADMIN_KEY: Final = ApiError(
    403,
    f"This key is for {ADMIN_PATH} only; create another one for the models.",
    code="permission_denied",
)


class Gateway:
    def __init__(
        self,
        ring: KeyRing,
        view: FleetView,
        limiter: Limiter,
        admission: Admission,
        relay: Relay,
        metrics: GatewayMetrics,
        exposition: Callable[[bytes], tuple[bytes, bytes]],
        access_log: AccessLog,
        sizes: PromptSizes,
        prices: PriceBook,
        tracing: Tracing,
        admin: AsgiBridge,
        cors: Cors,
        mesh_token: str,
        now_s: Callable[[], float],
    ) -> None:
        """`exposition` gives content type and text of the metrics for an Accept header. `now_s` is
        a monotonic clock."""
        self._ring: Final = ring
        self._view: Final = view
        self._limiter: Final = limiter
        self._admission: Final = admission
        self._relay: Final = relay
        self._metrics: Final = metrics
        self._exposition: Final = exposition
        self._access_log: Final = access_log
        self._sizes: Final = sizes
        self._prices: Final = prices
        self._tracing: Final = tracing
        self._admin: Final = admin
        self.cors = cors
        self._mesh_token: Final = MeshToken(mesh_token)
        self._ids: Final = RequestIds()
        self._models: Final = ModelList(view, int(time.time()))
        self._now_s: Final = now_s
        self.draining = False

    # The connection calls these.

    def screen(self, request: Request) -> ApiError | asyncio.Future[None] | None:
        endpoint = ENDPOINTS.get(request.path)
        if endpoint is None and not request.path.startswith(ADMIN_PATH):
            return self._wrong_path(request) or ApiError(
                413, "This request has no use for a body of that size.", code="request_too_large"
            )
        caller = self._head_check(request, time.time())
        if isinstance(caller, ApiError):
            return self._look(request, caller) or caller
        return None

    def handle(self, request: Request, client: ClientConnection) -> None:
        try:
            if request.headers.origin is not None and self._preflight(request, client):
                return
            endpoint = ENDPOINTS.get(request.path)
            if endpoint is not None:
                self._serve(endpoint, request, client)
            else:
                self._other(request, client)
        except Exception:
            _log.exception("the gateway failed at %s", request.path[:200])
            watcher = client.watcher
            if isinstance(watcher, Flight):
                watcher.fail()
            else:
                self.refuse(request, client, GATEWAY_FAILED)

    def refuse(self, request: Request, client: ClientConnection, error: ApiError) -> None:
        endpoint = ENDPOINTS.get(request.path)
        name = endpoint.name if endpoint is not None else "other"
        if request.headers.origin is not None:
            request.extra_lines = self.cors.lines(request.headers.origin)
        request_id = request.headers.request_id or self._ids.new()
        self._metrics.refused(name, error.status)
        self._access_log.refused(request_id, name, error.status, error.message)
        protocol = _protocol(request, endpoint)
        client.send_whole(
            error.status,
            error_lines(protocol, error, request_id),
            error_body(protocol, error, request_id),
        )

    def _refuse_caller(self, request: Request, client: ClientConnection, error: ApiError) -> None:
        """At once, or when the store does not know the key either."""
        look = self._look(request, error)
        if look is None:
            self.refuse(request, client, error)
        else:
            _Undecided(self, request, client).wait(look)

    def _look(self, request: Request, error: ApiError) -> asyncio.Future[None] | None:
        """One for each request: the store may know a key that is new."""
        if error is not _BAD_KEY:
            return None
        if request.look is None:
            request.look = self._ring.next_look(request.headers.secret or b"")
        look = request.look
        return None if look is None or look.done() else look

    # Calls to a model.

    def _serve(self, endpoint: Endpoint, request: Request, client: ClientConnection) -> None:
        accepted_at_s, started_s = time.time(), self._now_s()
        caller = self._head_check(request, accepted_at_s)
        if isinstance(caller, ApiError):
            self._refuse_caller(request, client, caller)
            return
        question = read_question(endpoint, request.body, request.headers.session)
        if isinstance(question, ApiError):
            self.refuse(request, client, question)
            return
        view = self._view
        model = view.models.get(question.model)
        if model is None or not (caller.may_use(model.name) or caller.may_use(question.model)):
            error = (
                _NO_FLEET_YET
                if view.fleet is None
                else self._models.unknown(question.model, caller)
            )
            self.refuse(request, client, error)
            return
        if self.draining and not view.is_ready(model.name):
            self.refuse(request, client, ApiError(503, "The gateway shuts down.", retry_after_s=1))
            return
        most = model.max_model_len
        prompt_guess = self._sizes.guess(model.name, len(question.body), most * question.prompts)
        call_id = self._ids.new()
        call = Call(
            call_id,
            request.headers.request_id or call_id,
            endpoint,
            accepted_at_s,
            started_s,
            request.headers,
            caller,
            question,
            model,
            prompt_guess,
            prompt_guess + question.guessed_completion_tokens(most),
        )
        if self._tracing.on:
            call.trace = self._tracing.begin(request.headers.traceparent)
        flight = self._relay.begin(call, client)
        if caller.accounts:
            self._reserve(flight)
        else:
            self._admission.enter(flight)

    def _reserve(self, flight: Flight) -> None:
        call = flight.call
        price = self._prices.of(call.model)
        estimate = Estimate(
            call.tokens,
            price.most_pico_usd(call.most_prompt_tokens, call.most_completion_tokens)
            if call.endpoint.metered
            else 0,
        )
        result = self._limiter.reserve(call.id, call.caller.accounts, estimate, call.accepted_at_s)
        if isinstance(result, (Reserved, Refused)):
            self._reserved(flight, result)
        else:
            result.add_done_callback(lambda done: self._reserved_later(flight, done))

    def _reserved_later(self, flight: Flight, done: "asyncio.Future[Reserved | Refused]") -> None:
        try:
            result = done.result()
            if flight.state is State.DONE:
                # The client has gone meanwhile.
                if isinstance(result, Reserved):
                    self._limiter.settle(flight.call.id, 0, 0, time.time())
                return
            self._reserved(flight, result)
        except Exception:
            _log.exception("request %s: the gateway failed", flight.call.id)
            flight.fail()

    def _reserved(self, flight: Flight, result: Reserved | Refused) -> None:
        call = flight.call
        protocol = call.endpoint.protocol
        if result.headroom is not None:
            call.limit_lines = limit_lines(protocol, result.headroom, call.accepted_at_s)
        if isinstance(result, Reserved):
            call.reserved = True
            self._admission.enter(flight)
            return
        call.dropped_reason = result.kind.value
        self._metrics.limited(call.model.name, result.kind.value)
        flight.turn_away(limit_error(result))

    # Everything else.

    def _preflight(self, request: Request, client: ClientConnection) -> bool:
        """True when a browser has asked what it may ask, and has been told."""
        origin = request.headers.origin
        assert origin is not None
        request.extra_lines = self.cors.lines(origin)
        preflight = self.cors.preflight(origin) if request.method == b"OPTIONS" else b""
        if preflight:
            client.send_whole(204, preflight, b"")
        return bool(preflight)

    def _other(self, request: Request, client: ClientConnection) -> None:
        path = request.path
        if path == ADMIN_PATH or path.startswith(ADMIN_PATH + "/"):
            self._administer(request, client)
            return
        error = self._wrong_path(request)
        if error is not None:
            self.refuse(request, client, error)
        elif path == "/healthz":
            self._send_json(client, 200, {"status": "ok"})
        elif path == "/readyz":
            missing = self._missing()
            status = "not ready" if missing else "ok"
            self._send_json(client, 503 if missing else 200, {"status": status, "missing": missing})
        elif path == "/metrics":
            self._show_metrics(request, client)
        else:
            self._show_models(request, client)

    def _administer(self, request: Request, client: ClientConnection) -> None:
        caller = self._authenticate(request, time.time())
        if isinstance(caller, ApiError):
            self._refuse_caller(request, client, caller)
        elif not caller.admin:
            error = ApiError(
                403,
                f"{ADMIN_PATH} wants a key that was created for it: "
                "`expertmesh keys create --admin`.",
                code="permission_denied",
            )
            self.refuse(request, client, error)
        else:
            self._ask_admin(request, client, caller)

    def _ask_admin(self, request: Request, client: ClientConnection, caller: Caller) -> None:
        request_id = request.headers.request_id or self._ids.new()
        started_s = self._now_s()

        def answered(status: int) -> None:
            self._access_log.administered(
                request_id,
                caller.tenant,
                caller.key_id,
                request.method.decode(),
                request.path,
                status,
                self._now_s() - started_s,
            )

        self._admin.serve(request, client, caller, request_id, answered)

    def _show_metrics(self, request: Request, client: ClientConnection) -> None:
        if not self._mesh_token.admits(request.headers.secret or b""):
            error = ApiError(401, "/metrics wants the mesh token as 'Authorization: Bearer …'.")
            self.refuse(request, client, error)
            return
        content_type, text = self._exposition(request.headers.accept)
        client.send_whole(200, b"content-type: %b\r\n" % content_type, text)

    def _show_models(self, request: Request, client: ClientConnection) -> None:
        caller = self._authenticate(request, time.time())
        if isinstance(caller, ApiError):
            self._refuse_caller(request, client, caller)
            return
        if self._view.fleet is None:
            self.refuse(request, client, _NO_FLEET_YET)
            return
        protocol = _protocol(request, None)
        if request.path == MODELS_PATH:
            answer: dict[str, Any] | ApiError = self._models.listed(protocol, caller)
        else:
            name = unquote(request.path.removeprefix(MODELS_PATH + "/"))
            answer = self._models.one(protocol, name, caller)
        if isinstance(answer, ApiError):
            self.refuse(request, client, answer)
            return
        request_id = request.headers.request_id or self._ids.new()
        lines = JSON_LINE + id_lines(protocol, request_id)
        client.send_whole(200, lines, msgspec.json.encode(answer))

    def _wrong_path(self, request: Request) -> ApiError | None:
        path, method = request.path, request.method
        if path.startswith("/v1/responses/"):
            return ApiError(
                404,
                "Responses are not stored here; send the whole conversation with each request.",
                code="not_found",
            )
        if path not in GET_PATHS and not path.startswith(MODELS_PATH + "/"):
            return ApiError(404, f"There is no {path[:200]} here.", code="not_found")
        if method not in (b"GET", b"HEAD"):
            return ApiError(405, f"Use GET for {path[:200]}.", allow="GET, HEAD")
        return None

    def _missing(self) -> list[str]:
        missing = []
        if self.draining:
            missing.append("the gateway shuts down")
        if not self._ring.loaded:
            missing.append("the keys have not been loaded from the store")
        if self._view.fleet is None:
            missing.append("the controller has not sent a fleet")
        return missing

    def _head_check(self, request: Request, now_s: float) -> Caller | ApiError:
        """What the head alone decides."""
        admin = request.path.startswith(ADMIN_PATH)
        if request.method != b"POST" and not admin:
            return ApiError(405, f"Use POST for {request.path}.", allow="POST")
        caller = self._authenticate(request, now_s)
        if isinstance(caller, ApiError):
            return caller
        if caller.admin and not admin:
            return _ADMIN_KEY
        encoding = request.headers.content_encoding
        if encoding is not None and encoding != b"identity":
            return ApiError(415, "The request body must not be compressed; drop Content-Encoding.")
        return caller

    def _authenticate(self, request: Request, now_s: float) -> Caller | ApiError:
        secret = request.headers.secret
        if not secret:
            return _NO_KEY
        caller = self._ring.find(secret, now_s)
        if caller is not None:
            return caller
        return _BAD_KEY if self._ring.loaded else _NO_KEYS_YET

    @staticmethod
    def _send_json(client: ClientConnection, status: int, value: Any) -> None:
        client.send_whole(status, JSON_LINE, msgspec.json.encode(value))


class _Undecided:
    """A request whose key may be new: answered, or refused, after one more look at the store."""

    def __init__(self, gateway: Gateway, request: Request, client: ClientConnection) -> None:
        self._gateway = gateway
        self._request = request
        self._client = client

    def wait(self, look: asyncio.Future[None]) -> None:
        # What comes behind it waits in the kernel: nobody has shown a key for it yet.
        self._client.hold()
        self._client.watcher = self
        look.add_done_callback(self._decide)

    def _decide(self, _: asyncio.Future[None]) -> None:
        client = self._client
        if client.watcher is self:
            client.watcher = None
            client.release()
            self._gateway.handle(self._request, client)

    def client_gone(self) -> None: ...

    def client_full(self) -> None: ...

    def client_drained(self) -> None: ...


def _protocol(request: Request, endpoint: Endpoint | None) -> Protocol:
    if endpoint is not None:
        return endpoint.protocol
    if request.headers.anthropic or request.path.startswith("/v1/messages"):
        return Protocol.ANTHROPIC
    return Protocol.OPENAI
