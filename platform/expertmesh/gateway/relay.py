"""Takes calls to ranks: which, with what bytes, how often; and watches all that are under way."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from expertmesh.core.metering.rating import usd_text
from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.health import Evidence
from expertmesh.core.routing.retry_budget import RetryBudget
from expertmesh.gateway.admission import Admission
from expertmesh.gateway.api import Endpoint
from expertmesh.gateway.call import Call, with_model
from expertmesh.gateway.client_connection import ClientConnection
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.flight import Flight, State
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.rank_connection import Origin, RankPool

if TYPE_CHECKING:
    from expertmesh.gateway.settlement import Settlement

_log = logging.getLogger(__name__)

_MOST_TARGETS: Final = 10_000


class Target(msgspec.Struct, frozen=True, gc=False):
    """One endpoint of one rank."""

    origin: Origin
    head: bytes
    """Request line and the header lines that never change."""


class Relay:
    def __init__(
        self,
        pool: RankPool,
        view: FleetView,
        admission: Admission,
        budget: RetryBudget,
        metrics: GatewayMetrics,
        limits: GatewayLimits,
        mesh_token: str,
        environment: Mapping[str, str],
        now_s: Callable[[], float],
    ) -> None:
        """`environment` holds the keys of external providers. `now_s` is a monotonic clock."""
        self.pool: Final = pool
        self.limits = limits
        self.now_s: Final = now_s
        self.admission: Final = admission
        self.settlement: Settlement
        """Set once, before the first call."""
        self._view: Final = view
        self._budget: Final = budget
        self._metrics: Final = metrics
        self._mesh_token: Final = mesh_token.encode()
        self._environment: Final = environment
        self._flights: set[Flight] = set()
        self._targets: dict[tuple[str, str], Target] = {}

    @property
    def open_calls(self) -> int:
        return len(self._flights)

    def held_streams(self) -> dict[str, int]:
        """By model: waiting calls whose stream has begun, with comments only."""
        counts: dict[str, int] = {}
        for flight in self._flights:
            if flight.state is State.QUEUED and flight.head_sent:
                name = flight.call.model.name
                counts[name] = counts.get(name, 0) + 1
        return counts

    def begin(self, call: Call, client: ClientConnection) -> Flight:
        flight = Flight(self, call, client)
        self._flights.add(flight)
        client.watcher = flight
        self._budget.request(call.started_s)
        return flight

    def sweep(self, now_s: float) -> None:
        """Ends what waits for too long: one look at all, instead of a timer for each."""
        limits, lost = self.limits, self._view.lost
        for flight in list(self._flights):
            state = flight.state
            silent_s = now_s - flight.since_s
            if state is State.QUEUED:
                if (
                    flight.call.question.stream
                    and silent_s > limits.hold_silent_s
                    and now_s >= flight.comment_at_s
                ):
                    flight.hold_comment(now_s)
            elif state is State.ASKED or state is State.STREAMING:
                candidate = flight.call.candidate
                if flight.client.full:
                    pass  # the client is slow, not the rank; its connection has a limit for that
                elif silent_s > flight.limit_s:
                    flight.give_up_on_rank("sent nothing for too long", Evidence.STALL)
                elif (
                    candidate is not None
                    and silent_s > limits.lost_grace_s
                    and candidate.group in lost
                ):
                    flight.give_up_on_rank("is lost and sent nothing", Evidence.STALL)
            elif state is State.FINISHING and silent_s > limits.end_grace_s:
                flight.give_up_on_rank("", Evidence.STALL)

    def shut_down(self) -> None:
        for flight in list(self._flights):
            flight.shut_down()

    # Flights call these.

    def forget(self, flight: Flight) -> None:
        self._flights.discard(flight)

    def began(self, flight: Flight, candidate: Candidate) -> None:
        call = flight.call
        self._view.begin(candidate, call)
        if call.attempts_failed:
            self._metrics.retried(call.model.name, call.failure_kind)
        if candidate.external is not None:
            self._metrics.sent_out(call.model.name, candidate.pool)
        if call.trace is not None:
            call.traceparent = call.trace.attempt(
                candidate.group, candidate.pool, candidate.rank, time.time()
            )

    def ended(self, flight: Flight, evidence: Evidence | None) -> None:
        call = flight.call
        self._view.end(call, evidence)
        if evidence is not None:
            call.failure_kind = evidence.value
        if call.trace is not None:
            call.trace.attempt_ended(time.time(), "" if evidence is None else evidence.value)
        self.admission.freed(call)

    def may_try_again(self, flight: Flight) -> bool:
        return flight.attempts < self.limits.max_attempts and self._budget.may_retry(self.now_s())

    def choose_again(self, flight: Flight) -> Candidate | None:
        return self._view.choose_again(flight.call)

    def wait_again(self, flight: Flight) -> bool:
        """Nothing sound is left: wait for it within the call's time. False when that is over."""
        return self.admission.enter_again(flight)

    def answered(self, call: Call) -> None:
        """A good answer has begun, or the request was found at fault."""
        if self._view.answered(call):
            self.admission.freed(call)  # others may have waited for this sign

    def stream_began(self, call: Call) -> None:
        self.answered(call)
        self.settlement.stream_began(call)

    def stream_went_on(self, call: Call) -> None:
        self.settlement.stream_went_on(call)

    def settle(self, call: Call) -> None:
        try:
            self.settlement.settle(call)
        except Exception:
            # Whatever is wrong with the books, the client gets its answer.
            _log.exception("request %s: could not be settled", call.id)

    def cost_line(self, call: Call) -> bytes:
        if not call.endpoint.metered:
            return b""
        return b"x-em-cost-usd: %b\r\n" % usd_text(call.cost_pico_usd)

    def target(self, candidate: Candidate, endpoint: Endpoint) -> Target:
        key = (candidate.base_url, endpoint.path)
        target = self._targets.get(key)
        if target is None:
            if len(self._targets) >= _MOST_TARGETS:
                self._targets.clear()
            target = self._targets[key] = self._make_target(candidate, endpoint)
        return target

    def request_bytes(self, call: Call, candidate: Candidate) -> bytes:
        body = call.question.body
        if candidate.external is not None:
            body = with_model(body, candidate.external.model)
        elif call.question.model != call.model.name:
            body = with_model(body, call.model.name)
        traceparent = call.traceparent or call.headers.traceparent
        return b"%b%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            self.target(candidate, call.endpoint).head,
            call.headers.forwarded,
            call.request_id.encode(),
            b"traceparent: %b\r\n" % traceparent if traceparent else b"",
            len(body),
            body,
        )

    def _make_target(self, candidate: Candidate, endpoint: Endpoint) -> Target:
        base_url = candidate.base_url.rstrip("/")
        origin = Origin.of(base_url)
        prefix = "/" + base_url.split("://", 1)[1].partition("/")[2]
        path = prefix.rstrip("/") + endpoint.path
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        if candidate.external is None:
            secret = b"x-em-mesh-token: " + self._mesh_token
        else:
            key = self._environment.get(candidate.external.key_variable, "")
            secret = b"authorization: Bearer " + key.encode()
        return Target(
            origin,
            b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
            b"accept-encoding: identity\r\n%b\r\n"
            % (path.encode(), f"{host}:{origin.port}".encode(), secret),
        )
