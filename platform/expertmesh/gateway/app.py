"""The gateway's ASGI application: routes, checks in order of their cost, and settlement."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from expertmesh.core.metering.rating import price
from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.gateway.api import (
    ENDPOINTS,
    GET_PATHS,
    MODELS_PATH,
    ApiError,
    Endpoint,
    Protocol,
)
from expertmesh.gateway.auth import Key, KeyRing
from expertmesh.gateway.call import Call, ClientHeaders, new_id, read_headers, read_question
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.gate import Gate
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.relay import (
    CLIENT_CLOSED,
    Message,
    Receive,
    Relay,
    Send,
    id_headers,
    send_error,
)
from expertmesh.gateway.usage import PromptSizes, TokenCount
from expertmesh.gateway.usage_writer import UsageWriter

_log = logging.getLogger(__name__)
access_log = logging.getLogger("expertmesh.gateway.access")
"""One JSON object per request; never a prompt, a completion or a key."""

_REFUSED_BODY_BYTES = 32 * 1024 * 1024
_REFUSED_BODY_S = 2.0
"""So much of a body that is too large is still taken off the wire: a client that is cut off while
it sends does not get to see the answer."""


class Gateway:
    def __init__(
        self,
        ring: KeyRing,
        view: FleetView,
        gate: Gate,
        relay: Relay,
        writer: UsageWriter,
        metrics: GatewayMetrics,
        mesh_token: str,
        limits: GatewayLimits,
        now_s: Callable[[], float],
    ) -> None:
        """`now_s` is a monotonic clock."""
        self._ring: Final = ring
        self._view: Final = view
        self._gate: Final = gate
        self._relay: Final = relay
        self._writer: Final = writer
        self._metrics: Final = metrics
        self._mesh_token: Final = mesh_token.encode()
        self._limits: Final = limits
        self._now_s: Final = now_s
        self._sizes: Final = PromptSizes()
        self._started_at_s: Final = int(time.time())
        self.draining = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        headers = read_headers(scope["headers"])
        endpoint = ENDPOINTS.get(path)
        if endpoint is not None:
            await self._serve(endpoint, scope, headers, receive, send)
        else:
            await self._get(path, scope["method"], headers, send)

    async def _serve(
        self,
        endpoint: Endpoint,
        scope: Message,
        headers: ClientHeaders,
        receive: Receive,
        send: Send,
    ) -> None:
        accepted_at_s, started_s = time.time(), self._now_s()
        call_id = new_id()
        request_id = headers.request_id or call_id
        checked = self._check(scope, headers, accepted_at_s)
        if isinstance(checked, ApiError):
            await self._refuse(endpoint, checked, request_id, started_s, send)
            return
        body = await self._read_body(headers, receive)
        if body is None:
            return  # the client has gone
        if isinstance(body, ApiError):
            refusal: ApiError | Call = body
            if body.status == 413:
                send = _until_taken(receive, send)
        else:
            refusal = self._accept(
                endpoint, body, headers, checked, call_id, request_id, accepted_at_s, started_s
            )
        if isinstance(refusal, ApiError):
            await self._refuse(endpoint, refusal, request_id, started_s, send)
            return
        try:
            await self._relay.serve(refusal, receive, send)
        finally:
            self._settle(refusal)

    def _check(self, scope: Message, headers: ClientHeaders, now_s: float) -> Key | ApiError:
        """What the header alone decides, before any of the body is read."""
        if scope["method"] != "POST":
            return ApiError(405, f"Use POST for {scope['path']}.", allow="POST")
        if len(scope["headers"]) > self._limits.headers:
            return ApiError(
                431,
                f"The request has {len(scope['headers'])} header fields; "
                f"at most {self._limits.headers} are accepted.",
            )
        key = self._authenticate(headers, now_s)
        if isinstance(key, ApiError):
            return key
        if headers.content_encoding not in (None, b"identity"):
            return ApiError(415, "The request body must not be compressed; drop Content-Encoding.")
        return key

    def _authenticate(self, headers: ClientHeaders, now_s: float) -> Key | ApiError:
        if headers.secret is None:
            return ApiError(
                401,
                "The request has no API key; send it as 'Authorization: Bearer …' or 'x-api-key'.",
                code="invalid_api_key",
            )
        key = self._ring.find(headers.secret, now_s)
        if key is not None:
            return key
        if not self._ring.loaded:
            return ApiError(
                503, "The gateway starts and has not loaded its keys yet.", retry_after_s=1.0
            )
        return ApiError(401, "The API key is unknown, revoked or expired.", code="invalid_api_key")

    async def _read_body(self, headers: ClientHeaders, receive: Receive) -> bytes | ApiError | None:
        most = self._limits.body_bytes
        too_large = ApiError(
            413,
            f"The request body is over the limit of {most} bytes; send a shorter one.",
            code="request_too_large",
        )
        if headers.content_length is not None and headers.content_length > most:
            return too_large
        message = await receive()
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            return body if message["type"] == "http.request" else None
        parts, size = [body], len(body)
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while message.get("more_body"):
                    if size > most:
                        return too_large
                    message = await receive()
                    part: bytes = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
        except TimeoutError:
            return ApiError(
                408, f"The request body was not whole after {self._limits.body_timeout_s:g} s."
            )
        if message["type"] != "http.request":
            return None
        return too_large if size > most else b"".join(parts)

    def _accept(
        self,
        endpoint: Endpoint,
        body: bytes,
        headers: ClientHeaders,
        key: Key,
        call_id: str,
        request_id: str,
        accepted_at_s: float,
        started_s: float,
    ) -> Call | ApiError:
        if len(body) > self._limits.body_bytes:
            return ApiError(
                413,
                f"The request body is over the limit of {self._limits.body_bytes} bytes.",
                code="request_too_large",
            )
        question = read_question(endpoint, body)
        if isinstance(question, ApiError):
            return question
        if self._view.fleet is None:
            return ApiError(
                503, "The gateway starts and does not know the fleet yet.", retry_after_s=1.0
            )
        model = self._view.models.get(question.model)
        if model is None:
            return self._unknown_model(question.model)
        if self.draining and not self._view.is_ready(model.name):
            return ApiError(503, "The gateway shuts down.", retry_after_s=1.0)
        self._view.arrived(model.name)
        guess = self._sizes.guess(model.name, len(body), model.max_model_len)
        return Call(
            id=call_id,
            request_id=request_id,
            endpoint=endpoint,
            accepted_at_s=accepted_at_s,
            started_s=started_s,
            headers=headers,
            key=key,
            question=question,
            model=model,
            prompt_guess=guess,
        )

    def _unknown_model(self, name: str) -> ApiError:
        known = ", ".join(sorted(self._view.models)) or "none"
        return ApiError(
            404,
            f"The model '{name[:200]}' does not exist; there are: {known}.",
            code="model_not_found",
            param="model",
        )

    async def _refuse(
        self,
        endpoint: Endpoint,
        error: ApiError,
        request_id: str,
        started_s: float,
        send: Send,
    ) -> None:
        self._metrics.requests.labels("", endpoint.name, str(error.status)).inc()
        access_log.info(
            "%s",
            _line(
                {
                    "request_id": request_id,
                    "endpoint": endpoint.name,
                    "status": error.status,
                    "duration_s": round(self._now_s() - started_s, 6),
                    "error": error.message,
                }
            ),
        )
        await send_error(send, endpoint.protocol, error, request_id)

    def _settle(self, call: Call) -> None:
        ended_s = self._now_s()
        duration_s = ended_s - call.started_s
        count = self._count(call)
        aborted = call.outcome is Outcome.ABORTED
        status = CLIENT_CLOSED if aborted else call.status
        model, candidate = call.model.name, call.candidate
        self._metrics.requests.labels(model, call.endpoint.name, str(status)).inc()
        if call.waited:
            self._metrics.queue_wait.labels(model).observe(call.queue_s)
        ttft_s = None if call.first_byte_s is None else call.first_byte_s - call.started_s
        if candidate is not None and call.endpoint.metered and not call.rejected:
            tariff_usd = price(call.model, count.prompt, count.cached, count.completion)
            self._writer.record(
                UsageRecord(
                    request_id=call.id,
                    at_s=call.accepted_at_s,
                    tenant=call.key.tenant,
                    key_id=call.key.id,
                    model=model,
                    group=candidate.group,
                    pool=candidate.pool,
                    endpoint=call.endpoint.name,
                    outcome=call.outcome,
                    prompt_tokens=count.prompt,
                    cached_tokens=count.cached,
                    completion_tokens=count.completion,
                    queue_s=call.queue_s,
                    ttft_s=ttft_s,
                    duration_s=duration_s,
                    tariff_usd=tariff_usd,
                )
            )
            self._measure(call, count, float(tariff_usd), ended_s)
        if access_log.isEnabledFor(logging.INFO):
            access_log.info(
                "%s",
                _line(
                    {
                        "request_id": call.request_id,
                        "usage_id": call.id,
                        "tenant": call.key.tenant,
                        "key_id": call.key.id,
                        "endpoint": call.endpoint.name,
                        "model": model,
                        "stream": call.question.stream,
                        "status": status,
                        "outcome": call.outcome.value,
                        "group": None if candidate is None else candidate.group,
                        "rank": None if candidate is None else candidate.rank,
                        "failed_attempts": len(call.failed),
                        "prompt_tokens": count.prompt,
                        "cached_tokens": count.cached,
                        "completion_tokens": count.completion,
                        "queue_s": round(call.queue_s, 6),
                        "ttft_s": None if ttft_s is None else round(ttft_s, 6),
                        "duration_s": round(duration_s, 6),
                        "error": call.error,
                    }
                ),
            )

    def _count(self, call: Call) -> TokenCount:
        """What the engine told, else what has been seen of it."""
        usage = call.usage
        if call.events is not None:
            usage = call.events.usage()
            if usage is None:
                return TokenCount(call.prompt_guess, 0, call.events.tokens_seen)
        if usage is None:
            return TokenCount(0, 0, 0)
        self._sizes.learn(call.model.name, len(call.question.body), usage.prompt)
        return usage

    def _measure(self, call: Call, count: TokenCount, tariff_usd: float, ended_s: float) -> None:
        metrics, model = self._metrics, call.model.name
        pool = call.candidate.pool if call.candidate is not None else ""
        metrics.duration.labels(model, pool).observe(ended_s - call.started_s)
        metrics.tokens.labels(model, pool, "in").inc(count.prompt - count.cached)
        metrics.tokens.labels(model, pool, "cached").inc(count.cached)
        metrics.tokens.labels(model, pool, "out").inc(count.completion)
        metrics.revenue_usd.labels(model, pool).inc(tariff_usd)
        # A whole answer's first byte comes at its end and says nothing about latency targets.
        if call.events is not None and call.first_byte_s is not None:
            metrics.ttft.labels(model, pool).observe(call.first_byte_s - call.started_s)
            if count.completion > 1:
                per_token_s = (ended_s - call.first_byte_s) / (count.completion - 1)
                metrics.tpot.labels(model, pool).observe(per_token_s)

    async def _get(self, path: str, method: str, headers: ClientHeaders, send: Send) -> None:
        protocol = (
            Protocol.ANTHROPIC
            if headers.anthropic or path.startswith("/v1/messages")
            else Protocol.OPENAI
        )
        request_id = headers.request_id or new_id()
        known = path in GET_PATHS or path.startswith(MODELS_PATH + "/")
        if not known:
            error = ApiError(404, f"There is no {path[:200]} here.", code="not_found")
        elif method not in ("GET", "HEAD"):
            error = ApiError(405, f"Use GET for {path[:200]}.", allow="GET, HEAD")
        elif path == "/healthz":
            await _send_json(send, 200, {"status": "ok"}, [])
            return
        elif path == "/readyz":
            missing = self._missing()
            status = 503 if missing else 200
            await _send_json(
                send, status, {"status": "not ready" if missing else "ok", "missing": missing}, []
            )
            return
        elif path == "/metrics":
            if hmac.compare_digest(headers.secret or b"", self._mesh_token):
                await _send(send, 200, self._exposition(), CONTENT_TYPE_LATEST, [])
                return
            error = ApiError(401, "/metrics wants the mesh token as 'Authorization: Bearer …'.")
        else:
            answer = self._models(path, headers, protocol)
            if not isinstance(answer, ApiError):
                await _send_json(send, 200, answer, id_headers(protocol, request_id))
                return
            error = answer
        await send_error(send, protocol, error, request_id)

    def _missing(self) -> list[str]:
        missing = []
        if self.draining:
            missing.append("the gateway shuts down")
        if not self._ring.loaded:
            missing.append("the keys have not been loaded from the store")
        if self._view.fleet is None:
            missing.append("the controller has not sent a fleet")
        return missing

    def _exposition(self) -> bytes:
        self._metrics.in_flight.clear()
        for name, count in self._view.groups.items():
            self._metrics.in_flight.labels(count.model, name, count.pool).set(count.in_flight)
        self._metrics.queued.clear()
        for model in self._view.models:
            self._metrics.queued.labels(model).set(self._gate.queued(model))
        return generate_latest(self._metrics.registry)

    def _models(
        self, path: str, headers: ClientHeaders, protocol: Protocol
    ) -> dict[str, Any] | ApiError:
        """All models of the fleet: a sleeping one is woken by asking it."""
        key = self._authenticate(headers, time.time())
        if isinstance(key, ApiError):
            return key
        if self._view.fleet is None:
            return ApiError(
                503, "The gateway starts and does not know the fleet yet.", retry_after_s=1.0
            )
        describe = self._anthropic_model if protocol is Protocol.ANTHROPIC else self._openai_model
        if path != MODELS_PATH:
            name = path.removeprefix(MODELS_PATH + "/")
            return describe(name) if name in self._view.models else self._unknown_model(name)
        models = [describe(name) for name in sorted(self._view.models)]
        if protocol is Protocol.OPENAI:
            return {"object": "list", "data": models}
        return {
            "data": models,
            "has_more": False,
            "first_id": models[0]["id"] if models else None,
            "last_id": models[-1]["id"] if models else None,
        }

    def _openai_model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_at_s,
            "owned_by": "expertmesh",
            "max_model_len": self._view.models[name].max_model_len,
        }

    def _anthropic_model(self, name: str) -> dict[str, Any]:
        created = datetime.fromtimestamp(self._started_at_s, UTC)
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def _line(fields: dict[str, Any]) -> str:
    return msgspec.json.encode({"at": datetime.now(UTC), **fields}).decode()


async def _send_json(
    send: Send, status: int, value: Any, headers: list[tuple[bytes, bytes]]
) -> None:
    await _send(send, status, msgspec.json.encode(value), "application/json", headers)


async def _send(
    send: Send, status: int, body: bytes, content_type: str, headers: list[tuple[bytes, bytes]]
) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type.encode()),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _until_taken(receive: Receive, send: Send) -> Send:
    """Sends an answer at once, then ends it after the rest of the body, and the connection too."""

    async def send_and_take(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)
            return
        await send({**message, "more_body": True})
        taken = 0
        try:
            async with asyncio.timeout(_REFUSED_BODY_S):
                while taken < _REFUSED_BODY_BYTES:
                    part = await receive()
                    if not part.get("more_body"):
                        break
                    taken += len(part["body"])
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return send_and_take
