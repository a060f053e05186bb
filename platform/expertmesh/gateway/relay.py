"""Takes a request to a rank and the answer back: retries, streams, watches and gives up."""

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import aiohttp
from yarl import URL

from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.policy import Attempt, Candidate
from expertmesh.gateway.api import (
    Answer,
    ApiError,
    Endpoint,
    Protocol,
    error_body,
    error_event,
    read_rank_error,
)
from expertmesh.gateway.call import Call
from expertmesh.gateway.event_stream import EventStream
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.gate import Gate
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.usage import read_usage

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""In metrics and log only: nobody is there to get it."""
_SWEEP_PERIOD_S = 0.25
_RETRY_AFTER_S = 1.0
_LARGE_BODY_BYTES = 1024 * 1024
_MOST_ERROR_BYTES = 64 * 1024
_END_GRACE_S = 0.5
_NO_ROUTE = "Not Found"
_MESH_TOKEN_HEADER = "X-EM-Mesh-Token"
# Another group may do better, as with every 5xx but 501, which the model cannot do anywhere. With
# 401 and 403 a rank refuses the mesh token, never the client's key, which it does not see.
_RETRIED_STATUSES = frozenset((401, 403, 408, 429))


class _Cut(Enum):
    """Why a request was interrupted from outside its own task."""

    CLIENT_GONE = "the client went away"
    STALLED = "sent nothing for too long"
    LOST = "is lost and sent nothing"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An attempt that came to nothing before the client got anything."""

    status: int
    """What the client gets when no other attempt is left."""
    reason: str
    connection_failed: bool = False
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer whose beginning is good."""

    response: aiohttp.ClientResponse
    body: bytes
    """The first events, or the whole body when it is not a stream."""
    events: EventStream | None


class _Flight:
    """A call under way, with what the watchers need to interrupt it."""

    def __init__(self, call: Call, task: "asyncio.Task[Any]") -> None:
        self.call = call
        self.task = task
        self.cut: _Cut | None = None
        self.finished = False
        """The client has everything; its leaving means nothing any more."""
        self.headers_sent = False
        self.awaits_rank = False
        self.awaits_client = False
        self.since_s = 0.0
        self.limit_s = 0.0

    def interrupt(self, cut: _Cut) -> None:
        if self.finished or self.cut is _Cut.CLIENT_GONE:
            return
        if self.cut is None or cut is _Cut.CLIENT_GONE:
            self.cut = cut
            self.task.cancel()

    def resume(self) -> None:
        """The interruption has been taken note of."""
        while self.task.cancelling():
            self.task.uncancel()


class Relay:
    def __init__(
        self,
        http: aiohttp.ClientSession,
        mesh_token: str,
        view: FleetView,
        gate: Gate,
        metrics: GatewayMetrics,
        limits: GatewayLimits,
        now_s: Callable[[], float],
    ) -> None:
        """`now_s` is a monotonic clock."""
        self._http = http
        self._mesh_token = mesh_token
        self._view = view
        self._gate = gate
        self._metrics = metrics
        self._limits = limits
        self._now_s = now_s
        self._flights: set[_Flight] = set()
        self._urls: dict[tuple[str, str], URL] = {}

    async def serve(self, call: Call, receive: Receive, send: Send) -> None:
        """Answers the client, whatever happens; the call then holds what there is to settle."""
        task = asyncio.current_task()
        assert task is not None
        flight = _Flight(call, task)
        self._flights.add(flight)
        watcher = asyncio.create_task(_watch(receive, flight))
        try:
            await self._answer(flight, send)
        except asyncio.CancelledError:
            flight.resume()
            if flight.cut is not _Cut.CLIENT_GONE:
                await self._shut_down(flight, send)
                return
            call.outcome = Outcome.ABORTED
            call.status = call.status or CLIENT_CLOSED
            call.error = call.error or _Cut.CLIENT_GONE.value
        except Exception:
            # A fault of this program: the client gets its protocol's error, the log the trace.
            _log.exception("request %s: the gateway failed", call.id)
            await self._fail(flight, send)
        finally:
            flight.finished = True
            self._flights.discard(flight)
            watcher.cancel()

    async def sweep(self) -> None:
        """Interrupts what waits for too long: one task for all, instead of a timer for each."""
        while True:
            await asyncio.sleep(_SWEEP_PERIOD_S)
            now_s = self._now_s()
            lost = self._view.lost
            for flight in list(self._flights):
                silent_s = now_s - flight.since_s
                if flight.awaits_client:
                    if silent_s > self._limits.client_stall_timeout_s:
                        flight.interrupt(_Cut.CLIENT_GONE)
                elif flight.awaits_rank:
                    candidate = flight.call.candidate
                    if silent_s > flight.limit_s:
                        flight.interrupt(_Cut.STALLED)
                    elif (
                        candidate is not None
                        and candidate.group in lost
                        and silent_s > self._limits.lost_grace_s
                    ):
                        flight.interrupt(_Cut.LOST)

    async def _answer(self, flight: _Flight, send: Send) -> None:
        call = flight.call
        failure: _Failure | None = None
        while True:
            if not call.failed:
                refusal = await self._wait(call)
                if refusal is not None:
                    await self._refuse(flight, send, refusal)
                    return
            candidate = self._view.choose(call.model.name, call.failed)
            if candidate is None:
                if failure is None:
                    continue  # the group has gone in the moment since the wait ended
                break
            if call.failed:
                self._metrics.retries.labels(call.model.name).inc()
            call.candidate = candidate
            failed = True
            self._view.begin(candidate, call.model.name, call.tokens)
            try:
                result = await self._open(flight, candidate)
                if isinstance(result, _Failure):
                    failure = result
                    call.failed.append(Attempt(candidate, result.connection_failed))
                    continue
                failed = False
                if isinstance(result, ApiError):
                    call.rejected = True
                    await self._refuse(flight, send, result)
                    return
                failed = not await self._deliver(flight, result, send)
                return
            except asyncio.CancelledError:
                # What the sweeper cuts is handled below this; the rest is not the group's fault.
                failed = False
                raise
            finally:
                self._view.end(candidate, call.tokens, failed)
        assert failure is not None
        call.outcome = Outcome.ERROR
        call.error = failure.reason
        await self._refuse(flight, send, _unavailable(call, failure))

    async def _wait(self, call: Call) -> ApiError | None:
        if self._view.is_ready(call.model.name):
            return None
        since_s = self._now_s()
        call.waited = True
        try:
            return await self._gate.wait(
                call.model, call.headers.read_timeout_s, call.tokens, len(call.question.body)
            )
        finally:
            call.queue_s += self._now_s() - since_s

    async def _open(self, flight: _Flight, candidate: Candidate) -> _Opened | _Failure | ApiError:
        """Sends the request and takes the answer up to its first event, or whole."""
        call = flight.call
        response: aiohttp.ClientResponse | None = None
        kept = False
        flight.limit_s = (
            self._limits.first_byte_timeout_s
            if call.question.stream
            else self._limits.whole_answer_timeout_s
        )
        flight.since_s = self._now_s()
        flight.awaits_rank = True
        try:
            response = await self._post(call, candidate)
            if response.status >= 300:
                return await self._read_refusal(call, response, candidate)
            streams = response.content_type == "text/event-stream"
            if not streams or call.endpoint.answer is Answer.WHOLE:
                body = await response.read()
                call.first_byte_s = self._now_s()
                call.usage = read_usage(body) if call.endpoint.metered else None
                return _Opened(response, body, None)
            result = await self._first_events(call, response, candidate)
            kept = isinstance(result, _Opened)
            return result
        except asyncio.CancelledError:
            if flight.cut not in (_Cut.STALLED, _Cut.LOST):
                raise
            reason = flight.cut.value
            flight.cut = None
            flight.resume()
            return _Failure(504, f"{candidate.group}: {reason}")
        except aiohttp.ClientConnectorError as error:
            return _Failure(502, f"{candidate.group}: no connection: {error}", True)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            return _Failure(502, f"{candidate.group}: broke off: {reason}", True)
        finally:
            flight.awaits_rank = False
            if response is not None and not kept:
                # Closes the connection unless the answer was read to its end.
                response.release()

    async def _post(self, call: Call, candidate: Candidate) -> aiohttp.ClientResponse:
        body = call.question.body
        return await self._http.post(
            self._url(candidate, call.endpoint),
            data=body if len(body) < _LARGE_BODY_BYTES else io.BytesIO(body),
            headers={
                **call.headers.forwarded,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
                "X-Request-Id": call.request_id,
                _MESH_TOKEN_HEADER: self._mesh_token,
            },
            allow_redirects=False,
        )

    def _url(self, candidate: Candidate, endpoint: Endpoint) -> URL:
        key = (candidate.base_url, endpoint.path)
        url = self._urls.get(key)
        if url is None:
            if len(self._urls) > 10_000:
                self._urls.clear()
            url = self._urls[key] = URL(candidate.base_url.rstrip("/") + endpoint.path)
        return url

    async def _read_refusal(
        self, call: Call, response: aiohttp.ClientResponse, candidate: Candidate
    ) -> _Failure | ApiError:
        status = response.status
        body = b""
        while len(body) < _MOST_ERROR_BYTES and (chunk := await response.content.readany()):
            body += chunk
        error = read_rank_error(status, body)
        # A path that Ray Serve does not know is answered in plain text: the group has gone.
        gone = status < 400 or (status == 404 and response.content_type == "text/plain")
        if gone or status in _RETRIED_STATUSES or (status >= 500 and status != 501):
            return _failure_of(candidate, status, error, response)
        if status == 404 and error.message == _NO_ROUTE:
            # vLLM has the routes of the model's kind only.
            return ApiError(
                404,
                f"The model '{call.model.name}' does not offer {call.endpoint.path}.",
                code="endpoint_not_offered",
            )
        return error

    async def _first_events(
        self, call: Call, response: aiohttp.ClientResponse, candidate: Candidate
    ) -> _Opened | _Failure | ApiError:
        events = EventStream(call.endpoint.answer, call.question.asks_usage)
        held = b""
        while True:
            chunk = await response.content.readany()
            if not chunk:
                return _Failure(502, f"{candidate.group}: ended without an answer", True)
            held += events.feed(chunk)
            if events.started:
                call.first_byte_s = self._now_s()
                call.events = events
                return _Opened(response, held, events)
            if events.error is not None:
                error = read_rank_error(500, events.error)
                if error.status >= 500:
                    return _failure_of(candidate, error.status, error, response)
                return error
            if events.ended:
                return _Failure(502, f"{candidate.group}: ended without an answer")

    async def _deliver(self, flight: _Flight, opened: _Opened, send: Send) -> bool:
        """False when the rank broke off on the way."""
        call = flight.call
        group = call.candidate.group if call.candidate is not None else ""
        call.status = opened.response.status
        if opened.events is None:
            flight.finished = True
            await _send_whole(
                send, call, call.status, opened.body, opened.response.headers.get("Content-Type")
            )
            return True
        try:
            await self._pump(flight, opened.response, opened.events, opened.body, send)
        except asyncio.CancelledError:
            if flight.cut not in (_Cut.STALLED, _Cut.LOST):
                raise
            call.error = f"{group}: {flight.cut.value}"
            flight.cut = None
            flight.resume()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            call.error = f"{group}: broke off: {str(error) or type(error).__name__}"
        else:
            if opened.events.ended:
                await _reach_end(opened.response)
                return True
            told = opened.events.error
            reason = "ended too early" if told is None else read_rank_error(500, told).message
            call.error = f"{group}: {reason}"
        finally:
            flight.awaits_rank = flight.awaits_client = False
            opened.response.release()
        call.outcome = Outcome.ERROR
        await self._break_off(flight, send)
        return False

    async def _pump(
        self,
        flight: _Flight,
        response: aiohttp.ClientResponse,
        events: EventStream,
        out: bytes,
        send: Send,
    ) -> None:
        """Returns at the end of the stream, or where an error event stands in place of it."""
        now_s, content = self._now_s, response.content
        flight.limit_s = self._limits.stall_timeout_s
        flight.headers_sent = True
        await send(_start(flight.call, response.status, _STREAM_HEADERS))
        while True:
            if events.ended:
                flight.finished = True
                await send({"type": "http.response.body", "body": out, "more_body": False})
                return
            if out:
                flight.since_s = now_s()
                flight.awaits_client = True
                await send({"type": "http.response.body", "body": out, "more_body": True})
                flight.awaits_client = False
            if events.error is not None:
                return
            flight.since_s = now_s()
            flight.awaits_rank = True
            chunk = await content.readany()
            flight.awaits_rank = False
            if not chunk:
                return
            out = events.feed(chunk)

    async def _refuse(self, flight: _Flight, send: Send, error: ApiError) -> None:
        call = flight.call
        call.status = error.status
        call.error = call.error or error.message
        flight.finished = True
        await send_error(send, call.endpoint.protocol, error, call.request_id)

    async def _break_off(self, flight: _Flight, send: Send) -> None:
        """The client has seen a beginning: tell it that no end comes, in the stream."""
        call = flight.call
        error = ApiError(
            502, f"The stream broke off: {call.error.rstrip('.')}.", code="upstream_failed"
        )
        flight.finished = True
        await send(
            {
                "type": "http.response.body",
                "body": error_event(call.endpoint.answer, error, call.request_id),
                "more_body": False,
            }
        )

    async def _fail(self, flight: _Flight, send: Send) -> None:
        call = flight.call
        call.outcome = Outcome.ERROR
        call.error = "the gateway failed"
        if flight.finished:
            return
        if flight.headers_sent:
            await self._break_off(flight, send)
        else:
            await self._refuse(flight, send, ApiError(500, "The gateway failed."))

    async def _shut_down(self, flight: _Flight, send: Send) -> None:
        """The server ends before the request does."""
        call = flight.call
        call.outcome = Outcome.ERROR
        call.error = "the gateway shuts down"
        if flight.finished:
            return
        if flight.headers_sent:
            await self._break_off(flight, send)
        else:
            error = ApiError(503, "The gateway shuts down.", retry_after_s=_RETRY_AFTER_S)
            await self._refuse(flight, send, error)


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx and its kin would buffer the events otherwise.
    (b"x-accel-buffering", b"no"),
]


async def _watch(receive: Receive, flight: _Flight) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    flight.interrupt(_Cut.CLIENT_GONE)


async def _reach_end(response: aiohttp.ClientResponse) -> None:
    """A moment for the end of the body to arrive, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_END_GRACE_S):
            while await response.content.readany():
                pass
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass


def _failure_of(
    candidate: Candidate, status: int, error: ApiError, response: aiohttp.ClientResponse
) -> _Failure:
    if status in (401, 403):
        return _Failure(502, f"{candidate.group}: refused the gateway's mesh token")
    after = response.headers.get("Retry-After", "")
    return _Failure(
        status=status if status in (429, 503, 504) else 502,
        reason=f"{candidate.group}: answered with status {status}: {error.message}",
        retry_after_s=float(after) if after.isdigit() else None,
    )


def _unavailable(call: Call, failure: _Failure) -> ApiError:
    return ApiError(
        failure.status,
        f"The model '{call.model.name}' could not answer: {failure.reason.rstrip('.')}.",
        code="upstream_unavailable",
        retry_after_s=failure.retry_after_s or _RETRY_AFTER_S,
    )


def _start(call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [*headers, *id_headers(call.endpoint.protocol, call.request_id)],
    }


def id_headers(protocol: Protocol, request_id: str) -> list[tuple[bytes, bytes]]:
    encoded = request_id.encode()
    if protocol is Protocol.ANTHROPIC:
        return [(b"x-request-id", encoded), (b"request-id", encoded)]
    return [(b"x-request-id", encoded)]


async def _send_whole(
    send: Send, call: Call, status: int, body: bytes, content_type: str | None
) -> None:
    headers = [
        (b"content-type", (content_type or "application/json").encode("latin-1")),
        (b"content-length", str(len(body)).encode()),
    ]
    await send(_start(call, status, headers))
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, protocol: Protocol, error: ApiError, request_id: str) -> None:
    body = error_body(protocol, error, request_id)
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *error.headers(),
                *id_headers(protocol, request_id),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
