"""One call under way: waits, is asked of a rank, answered, tried again, broken off, settled."""

import asyncio
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.candidate import Attempt, Candidate
from expertmesh.core.routing.health import Evidence
from expertmesh.gateway.answers import (
    STREAM_LINES,
    Failure,
    error_lines,
    failure_of,
    id_lines,
    is_gone,
    unavailable,
)
from expertmesh.gateway.api import (
    Answer,
    ApiError,
    error_body,
    error_event,
    read_rank_error,
)
from expertmesh.gateway.call import Call
from expertmesh.gateway.client_connection import ClientConnection
from expertmesh.gateway.event_stream import EventStream
from expertmesh.gateway.rank_connection import AnswerHead, RankConnection
from expertmesh.gateway.usage import read_usage

if TYPE_CHECKING:
    from expertmesh.gateway.relay import Relay

CLIENT_CLOSED: Final = 499
"""In metrics and log only: nobody is there to get it."""
_MOST_ERROR_BYTES: Final = 64 * 1024
_NO_ROUTE: Final = "Not Found"
_COMMENT: Final = b": waiting for a group\n\n"


class State(IntEnum):
    NEW = 0
    QUEUED = 1
    CONNECTING = 2
    ASKED = 3
    """Nothing has gone to the client yet, so another rank may still take over."""
    STREAMING = 4
    FINISHING = 5
    """The client has everything; the end of the rank's body has not come."""
    DONE = 6


class _Mode(Enum):
    EVENTS = "events"
    WHOLE = "whole"
    REFUSAL = "refusal"


class Flight:
    """Called back by the client's connection, the rank's connection, the queue and the sweeper; it
    never waits itself."""

    __slots__ = (
        "_connecting",
        "_connection",
        "_head",
        "_held",
        "_mode",
        "_reconnected",
        "_relay",
        "_size",
        "attempts",
        "call",
        "client",
        "comment_at_s",
        "head_sent",
        "limit_s",
        "since_s",
        "state",
        "waiting",
    )

    def __init__(self, relay: "Relay", call: Call, client: ClientConnection) -> None:
        self._relay = relay
        self.call = call
        self.client = client
        self.state = State.NEW
        self.attempts = 0
        self.since_s = call.started_s
        """Since when the rank has been silent, or the call has waited."""
        self.limit_s = 0.0
        self.comment_at_s = 0.0
        self.waiting: object | None = None
        """The queue's entry."""
        self._connection: RankConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._reconnected = False
        self._head: AnswerHead | None = None
        self.head_sent = False
        self._mode = _Mode.WHOLE
        self._held: list[bytes] = []
        self._size = 0

    # The queue and the relay call these.

    def launch(self, candidate: Candidate) -> None:
        """Ask this rank."""
        call, relay = self.call, self._relay
        call.candidate = candidate
        self.attempts += 1
        self._reconnected = False
        relay.began(self, candidate)
        self._ask(candidate, True)

    def turn_away(self, error: ApiError) -> None:
        """No rank will see it."""
        call = self.call
        if call.outcome is Outcome.OK and call.attempts_failed:
            call.outcome = Outcome.ERROR
        self._answer_error(error)

    def hold_comment(self, now_s: float) -> None:
        """Show a client that waits for a stream that its connection lives."""
        if not self.head_sent:
            self._send_head()
        if not self.client.full:
            self.client.send(_COMMENT)
        self.comment_at_s = now_s + self._relay.limits.hold_comment_s

    def give_up_on_rank(self, reason: str, evidence: Evidence) -> None:
        """The rank has been silent for too long."""
        candidate = self.call.candidate
        assert candidate is not None
        if self.state is State.FINISHING:
            self._drop_connection()
            self._done()
            return
        self._drop_connection()
        message = f"{candidate.group}: {reason}"
        if self.state is State.STREAMING:
            self._break_off(message, evidence)
        else:
            self._attempt_failed(Failure(504, message), evidence)

    def shut_down(self) -> None:
        """The server ends before the request does."""
        if self.state in (State.DONE, State.FINISHING):
            self._drop_connection()
            self._done()
            return
        self._leave_queue()
        self._end_attempt(None)
        self._drop_connection()
        self.call.outcome = Outcome.ERROR
        self.call.error = "the gateway shuts down"
        self._answer_error(
            ApiError(503, "The gateway shuts down.", code="shutting_down", retry_after_s=1.0)
        )

    def fail(self) -> None:
        """A fault of this program: the client gets its protocol's error, the log the trace."""
        if self.state in (State.DONE, State.FINISHING):
            return
        self._leave_queue()
        self._end_attempt(None)
        self._drop_connection()
        self.call.outcome = Outcome.ERROR
        self.call.error = "the gateway failed"
        self._answer_error(ApiError(500, "The gateway failed; its log says why."))

    # The client's connection calls these.

    def client_gone(self) -> None:
        if self.state in (State.DONE, State.FINISHING):
            return
        call = self.call
        self._leave_queue()
        self._end_attempt(None)
        self._drop_connection()
        call.outcome = Outcome.ABORTED
        call.status = call.status or CLIENT_CLOSED
        call.error = call.error or "the client went away"
        self._done()
        self._relay.settle(call)

    def client_full(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def client_drained(self) -> None:
        self.since_s = self._relay.now_s()
        if self._connection is not None:
            self._connection.resume()

    # The rank's connection calls these.

    def connected(self, connection: RankConnection) -> None:
        self._connecting = None
        if self.state is not State.CONNECTING:
            connection.drop()
            return
        candidate = self.call.candidate
        assert candidate is not None
        self._send_request(connection, candidate, False)

    def not_connected(self, reason: str) -> None:
        self._connecting = None
        if self.state is State.CONNECTING:
            group = self.call.candidate.group if self.call.candidate is not None else ""
            self._attempt_failed(Failure(502, f"{group}: {reason}", True), Evidence.REFUSED)

    def answer_began(self, head: AnswerHead) -> None:
        self._head = head
        self.since_s = self._relay.now_s()
        if head.status >= 300:
            self._mode = _Mode.REFUSAL
        elif (
            head.content_type.startswith(b"text/event-stream")
            and self.call.endpoint.answer is not Answer.WHOLE
        ):
            self._mode = _Mode.EVENTS
            self.call.events = EventStream(self.call.endpoint.answer, self.call.question.asks_usage)
        else:
            self._mode = _Mode.WHOLE

    def answer_part(self, data: bytes) -> None:
        if self.state is State.STREAMING:
            self._pass_on(data)
        elif self.state is State.ASKED:
            if self._mode is _Mode.EVENTS:
                self._first_events(data)
                return
            self.since_s = self._relay.now_s()
            self._size += len(data)
            if self._mode is _Mode.REFUSAL and self._size > _MOST_ERROR_BYTES:
                return  # the beginning says enough
            if self._size > self._relay.limits.whole_answer_bytes:
                self._drop_connection()
                group = self.call.candidate.group if self.call.candidate is not None else ""
                self._attempt_failed(
                    Failure(502, f"{group}: sent an answer that is too long"), Evidence.BAD_ANSWER
                )
                return
            self._held.append(data)

    def answer_ended(self) -> None:
        self._connection = None
        candidate = self.call.candidate
        if self.state is State.FINISHING:
            self._done()
        elif self.state is State.STREAMING:
            assert candidate is not None
            self._break_off(f"{candidate.group}: ended too early", Evidence.BAD_ANSWER)
        elif self.state is State.ASKED:
            assert candidate is not None
            if self._mode is _Mode.WHOLE:
                self._deliver_whole()
            elif self._mode is _Mode.REFUSAL:
                self._read_refusal(candidate)
            else:
                self._attempt_failed(
                    Failure(502, f"{candidate.group}: ended without an answer"),
                    Evidence.BAD_ANSWER,
                )

    def answer_lost(self, reason: str, fresh: bool) -> None:
        self._connection = None
        candidate = self.call.candidate
        if self.state is State.FINISHING:
            self._done()
        elif self.state is State.STREAMING:
            assert candidate is not None
            self._break_off(f"{candidate.group}: broke off: {reason}", Evidence.RESET)
        elif self.state is State.ASKED:
            assert candidate is not None
            if fresh and not self._reconnected:
                self._reconnected = True
                self._ask(candidate, False)
            else:
                self._attempt_failed(
                    Failure(502, f"{candidate.group}: broke off: {reason}", True), Evidence.RESET
                )

    # Inside: one attempt.

    def _ask(self, candidate: Candidate, may_reuse: bool) -> None:
        relay = self._relay
        self._held = []
        self._size = 0
        self._head = None
        self._mode = _Mode.WHOLE
        self.call.events = None
        limits = relay.limits
        self.call.asked_s = self.since_s = relay.now_s()
        self.limit_s = (
            limits.first_byte_timeout_s
            if self.call.question.stream
            else limits.whole_answer_timeout_s
        )
        target = relay.target(candidate, self.call.endpoint)
        connection = relay.pool.take(target.origin) if may_reuse else None
        if connection is not None:
            self._send_request(connection, candidate, True)
        else:
            self.state = State.CONNECTING
            self._connecting = relay.pool.connect(target.origin, self)

    def _send_request(self, connection: RankConnection, candidate: Candidate, reused: bool) -> None:
        self._connection = connection
        self.state = State.ASKED
        connection.ask(self, self._relay.request_bytes(self.call, candidate), reused)

    def _attempt_failed(self, failure: Failure, evidence: Evidence) -> None:
        """Nothing has gone to the client: another rank may take over, now or later."""
        call, relay = self.call, self._relay
        candidate = call.candidate
        assert candidate is not None
        self._end_attempt(evidence)
        call.failed.append(Attempt(candidate, failure.connection_failed))
        call.attempts_failed += 1
        if relay.may_try_again(self):
            other = relay.choose_again(self)
            if other is not None:
                self.launch(other)
                return
            if relay.wait_again(self):
                return
        call.outcome = Outcome.ERROR
        call.error = failure.reason
        self._answer_error(unavailable(call.model.name, failure))

    def _end_attempt(self, evidence: Evidence | None) -> None:
        """Takes the call off the rank's load, once."""
        if State.CONNECTING <= self.state <= State.STREAMING:
            self._relay.ended(self, evidence)
            self.state = State.NEW

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()

    def _read_refusal(self, candidate: Candidate) -> None:
        call, head = self.call, self._head
        assert head is not None
        error = read_rank_error(head.status, b"".join(self._held))
        if candidate.external is not None and head.status in (400, 404, 413, 422):
            pass  # the request itself is at fault
        elif is_gone(head, error):
            failure = failure_of(candidate.group, head, error)
            busy = head.status in (408, 429, 503)
            self._attempt_failed(failure, Evidence.BUSY if busy else Evidence.SERVER_ERROR)
            return
        if head.status == 404 and error.message == _NO_ROUTE:
            # vLLM has the routes of the model's kind only.
            error = ApiError(
                404,
                f"The model '{call.model.name}' does not offer {call.endpoint.path}.",
                code="endpoint_not_offered",
            )
        self._reject(error)

    def _reject(self, error: ApiError) -> None:
        """The rank found fault with the request itself."""
        self.call.rejected = True
        self._relay.answered(self.call)
        self._end_attempt(None)
        self._answer_error(error)

    def _first_events(self, data: bytes) -> None:
        call, relay = self.call, self._relay
        events, candidate = call.events, call.candidate
        assert events is not None and candidate is not None
        out = events.feed(data)
        if out:
            self._held.append(out)
        if events.started:
            call.first_byte_s = self.since_s = relay.now_s()
            call.status = 200
            relay.stream_began(call)
            if not self.head_sent:
                self._send_head()
            self.state = State.STREAMING
            self.limit_s = relay.limits.stall_timeout_s
            first = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            self._held = []
            self._after(events, first)
        elif events.error is not None:
            error = read_rank_error(500, events.error)
            self._drop_connection()
            if error.status >= 500:
                failure = Failure(502, f"{candidate.group}: {error.message}")
                self._attempt_failed(failure, Evidence.SERVER_ERROR)
            else:
                self._reject(error)
        elif events.ended:
            self._drop_connection()
            self._attempt_failed(
                Failure(502, f"{candidate.group}: ended without an answer"), Evidence.BAD_ANSWER
            )
        else:
            self.since_s = relay.now_s()

    def _pass_on(self, data: bytes) -> None:
        events = self.call.events
        assert events is not None
        self.since_s = self._relay.now_s()
        self._after(events, events.feed(data))

    def _after(self, events: EventStream, out: bytes) -> None:
        """`out` goes to the client; the stream may have come to its end with it."""
        if events.ended:
            self._end_attempt(None)
            self.state = State.FINISHING
            # The ledger's row comes first: nothing that was answered may be lost.
            self._relay.settle(self.call)
            self.client.end_stream(out)
        elif events.error is not None:
            if out:
                self.client.send(out)
            group = self.call.candidate.group if self.call.candidate is not None else ""
            reason = read_rank_error(500, events.error).message
            self._drop_connection()
            self._break_off(f"{group}: {reason}", Evidence.SERVER_ERROR)
        elif out:
            self.client.send(out)
            self._relay.stream_went_on(self.call)

    def _deliver_whole(self) -> None:
        call, head = self.call, self._head
        assert head is not None
        body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held = []
        call.first_byte_s = self._relay.now_s()
        call.status = head.status
        if call.endpoint.metered:
            call.usage = read_usage(body)
        self._relay.answered(call)
        self._end_attempt(None)
        self._done()
        self._relay.settle(call)
        if self.head_sent:
            # A stream was asked for and promised, and the rank has answered with a whole body.
            self.client.end_stream(b"data: " + body + b"\n\n")
            return
        self.client.send_whole(
            head.status,
            b"content-type: %b\r\n%b%b%b"
            % (
                head.content_type or b"application/json",
                id_lines(call.endpoint.protocol, call.request_id),
                call.limit_lines,
                self._relay.cost_line(call),
            ),
            body,
        )

    # Inside: the client.

    def _send_head(self) -> None:
        call = self.call
        self.head_sent = True
        self.client.begin_stream(
            STREAM_LINES + id_lines(call.endpoint.protocol, call.request_id) + call.limit_lines
        )

    def _break_off(self, message: str, evidence: Evidence) -> None:
        """The client has seen a beginning: tell it, in the stream, that no end comes."""
        call = self.call
        self._end_attempt(evidence)
        call.outcome = Outcome.ERROR
        call.error = message
        self._answer_error(
            ApiError(502, f"The stream broke off: {message.rstrip('.')}.", code="upstream_failed")
        )

    def _answer_error(self, error: ApiError) -> None:
        call, client = self.call, self.client
        protocol = call.endpoint.protocol
        call.status = call.status or error.status
        call.error = call.error or error.message
        self._done()
        self._relay.settle(call)
        if self.head_sent:
            client.end_stream(error_event(call.endpoint.answer, error, call.request_id))
            return
        client.send_whole(
            error.status,
            error_lines(protocol, error, call.request_id, call.dropped_reason) + call.limit_lines,
            error_body(protocol, error, call.request_id),
        )

    def _leave_queue(self) -> None:
        if self.state is State.QUEUED:
            self._relay.admission.leave(self)

    def _done(self) -> None:
        self.state = State.DONE
        self._relay.forget(self)
