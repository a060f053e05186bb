"""Who goes next: calls that find no sound rank with room wait here, fairly and within bounds."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from expertmesh.core.admission.drain_rate import DrainRate
from expertmesh.core.admission.fair_queue import FairQueue, Full, QueueBounds, Waiting
from expertmesh.core.domain.fleet import Group, ServedModel
from expertmesh.core.domain.traffic import ModelTraffic
from expertmesh.gateway.api import ApiError
from expertmesh.gateway.call import Call
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.flight import Flight, State
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.gateway.metrics import GatewayMetrics

_log = logging.getLogger(__name__)

_CLIENT_MARGIN_S: Final = 5.0
"""The answer must reach the client before its own time-out, or it sees a broken connection."""
_UNKNOWN_WAIT_S: Final = 5.0


class Admission:
    def __init__(
        self,
        view: FleetView,
        metrics: GatewayMetrics,
        limits: GatewayLimits,
        wake: Callable[[], None],
        now_s: Callable[[], float],
    ) -> None:
        """`wake` makes the controller hear at once that a model without a group is asked for.
        `now_s` is a monotonic clock."""
        self._limits = limits
        self._view: Final = view
        self._metrics: Final = metrics
        self._wake: Final = wake
        self._now_s: Final = now_s
        self._queues: dict[str, FairQueue] = {}
        self._rates: dict[str, DrainRate] = {}
        self._closed = False

    def use(self, limits: GatewayLimits) -> None:
        """New bounds, for queues as they are."""
        self._limits = limits
        for queue in self._queues.values():
            queue.bounds = _bounds(limits)

    def enter(self, flight: Flight) -> None:
        """Launches the flight, queues it or turns it away."""
        call = flight.call
        self._view.arrived(call)
        queue = self._queues.get(call.model.name)
        if queue is None or not queue.requests:
            candidate = self._view.choose(call)
            if candidate is not None:
                flight.launch(candidate)
                return
        self._queue(flight, call.started_s)

    def enter_again(self, flight: Flight) -> bool:
        """After a failed attempt. False when the call has no time left, or no place."""
        call = flight.call
        if self._closed or self._deadline_s(call) <= self._now_s():
            return False
        call.failed = []
        return self._queue(flight, self._now_s(), refuse=False)

    def leave(self, flight: Flight) -> None:
        """The client has gone."""
        waiting = flight.waiting
        flight.waiting = None
        if isinstance(waiting, Waiting):
            self._queues[flight.call.model.name].remove(waiting)
            self._left(flight)

    def freed(self, call: Call) -> None:
        """A rank has one request less."""
        queue = self._queues.get(call.model.name)
        if queue is not None and queue.requests:
            self._pump(call.model.name, queue)

    def served(self, call: Call, tokens: int) -> None:
        """For fairness and for the rate at which the queue drains."""
        name = call.model.name
        rate = self._rates.get(name)
        if rate is None:
            rate = self._rates[name] = DrainRate(self._now_s())
        rate.served(tokens, self._now_s())
        if call.waited:
            queue = self._queues.get(name)
            if queue is not None and call.candidate is not None:
                queue.charge(call.caller.tenant, tokens - call.tokens, call.caller.weight)

    def fleet_changed(self) -> None:
        for name, queue in list(self._queues.items()):
            if queue.requests:
                self._pump(name, queue)

    def sweep(self, now_s: float) -> None:
        for name, queue in list(self._queues.items()):
            for waiting in queue.expire(now_s):
                self._turn_away(waiting.call, "queue_timeout")
            if queue.requests:
                self._pump(name, queue)

    def close(self) -> None:
        """This worker shuts down: what waits for a group is refused, another worker may serve
        it."""
        self._closed = True
        for name, queue in list(self._queues.items()):
            if not self._view.is_ready(name):
                while queue.requests:
                    self._turn_away(queue.pop().call, "draining")

    def queued(self, model: str) -> int:
        queue = self._queues.get(model)
        return queue.requests if queue is not None else 0

    def queued_tokens(self, model: str) -> int:
        queue = self._queues.get(model)
        return queue.tokens if queue is not None else 0

    def traffic(self) -> dict[str, ModelTraffic]:
        names = {*self._view.names, *self._queues, *self._view.counts}
        return {name: self._traffic(name) for name in sorted(names)}

    def _traffic(self, model: str) -> ModelTraffic:
        count = self._view.count_of(model)
        traffic = ModelTraffic(
            arrivals_total=count.arrivals,
            arrived_prompt_tokens_total=count.arrived_prompt_tokens,
            finished_total=count.finished,
            uncached_prompt_tokens_total=count.uncached_prompt_tokens,
            output_tokens_total=count.output_tokens,
            external_requests_total=count.external_requests,
            external_prompt_tokens_total=count.external_prompt_tokens,
            external_output_tokens_total=count.external_output_tokens,
        )
        queue = self._queues.get(model)
        if queue is None or not queue.requests:
            return traffic
        oldest_s = queue.oldest_at_s
        return replace(
            traffic,
            queued_requests=queue.requests,
            queued_tokens=queue.tokens,
            queued_prompt_tokens=count.queued_prompt_tokens,
            oldest_wait_s=0.0 if oldest_s is None else self._now_s() - oldest_s,
            wake_requests=0 if self._view.is_ready(model) else queue.requests,
        )

    def _queue(self, flight: Flight, since_s: float, refuse: bool = True) -> bool:
        call = flight.call
        name = call.model.name
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = FairQueue(_bounds(self._limits))
        if call.model.external:
            choice = self._view.choose_external(call, self._expected_wait_s(name, queue), False)
            if choice.candidate is not None:
                flight.launch(choice.candidate)
                return True
        now_s = self._now_s()
        deadline_s = self._deadline_s(call)
        if deadline_s <= now_s or (self._closed and not self._view.is_ready(name)):
            if refuse:
                self._turn_away(flight, "draining" if self._closed else "queue_timeout")
            return False
        caller = call.caller
        waiting = Waiting(
            flight,
            caller.tenant,
            caller.weight,
            caller.priority,
            call.tokens,
            len(call.question.body),
            since_s,
            deadline_s,
        )
        was_empty = not queue.requests
        pushed = queue.push(waiting, now_s)
        if isinstance(pushed, Full):
            if refuse:
                self._turn_away(flight, "queue_full")
            return False
        self._count_queued(call, call.prompt_guess)
        flight.state = State.QUEUED
        flight.since_s = now_s
        flight.waiting = waiting
        call.waited = True
        for out in pushed:
            self._turn_away(out.call, "queue_full")
        if was_empty and not self._view.is_ready(name):
            self._wake()
        return True

    def _pump(self, name: str, queue: FairQueue) -> None:
        """Launch as many as find a rank, in the queue's order."""
        while (head := queue.head()) is not None:
            flight: Flight = head.call
            call = flight.call
            candidate = self._view.choose(call)
            if candidate is None and call.model.external:
                # It came before its groups failed, or when no provider could take it.
                candidate = self._view.choose_external(call, 0.0, False).candidate
            if candidate is None:
                return
            queue.pop()
            self._left(flight)
            try:
                flight.launch(candidate)
            except Exception:
                _log.exception("request %s: the gateway failed", flight.call.id)
                flight.fail()

    def _left(self, flight: Flight) -> None:
        flight.waiting = None
        flight.state = State.NEW
        call = flight.call
        call.queue_s += self._now_s() - flight.since_s
        self._count_queued(call, -call.prompt_guess)

    def _count_queued(self, call: Call, prompt_tokens: int) -> None:
        if call.endpoint.metered:
            self._view.count_of(call.model.name).queued_prompt_tokens += prompt_tokens

    def _turn_away(self, flight: Flight, reason: str) -> None:
        call = flight.call
        if flight.state is State.QUEUED:
            self._left(flight)
        model = call.model
        ready = self._view.answers(model.name)
        if not ready and reason == "queue_timeout":
            reason = "no_capacity"
        call.dropped_reason = reason
        self._metrics.rejected(model.name, reason)
        flight.turn_away(self._error(model, reason, ready))

    def _error(self, model: ServedModel, reason: str, ready: bool) -> ApiError:
        if reason == "draining":
            return ApiError(503, "The gateway shuts down.", "shutting_down", retry_after_s=1.0)
        if reason == "no_capacity":
            return ApiError(
                503,
                f"{self._state(model)}; try again later.",
                code="model_not_ready",
                retry_after_s=self._ready_in_s(model),
            )
        queue = self._queues[model.name]
        waited = "waited too long" if reason == "queue_timeout" else "cannot wait"
        return ApiError(
            429,
            f"The model '{model.name}' has more requests than it can take: {queue.requests} wait "
            f"already, and this one {waited}; try again later.",
            code=reason,
            retry_after_s=self._expected_wait_s(model.name, queue)
            if ready
            else self._ready_in_s(model),
        )

    def _expected_wait_s(self, name: str, queue: FairQueue) -> float:
        """Backlog over drain rate; 0 without a backlog."""
        if not queue.requests:
            return 0.0  # nobody is in the way
        rate = self._rates.get(name)
        if rate is None:
            return _UNKNOWN_WAIT_S
        return rate.retry_after_s(queue.tokens, self._now_s())

    def _deadline_s(self, call: Call) -> float:
        limit_s = call.model.max_wait_s
        if self._limits.most_wait_s is not None:
            limit_s = min(limit_s, self._limits.most_wait_s)
        client_s = call.headers.read_timeout_s
        if client_s is not None and client_s - _CLIENT_MARGIN_S < limit_s:
            limit_s = client_s - _CLIENT_MARGIN_S
        return call.started_s + limit_s

    def _state(self, model: ServedModel) -> str:
        groups = self._view.groups_of(model.name)
        if not groups:
            return f"The model '{model.name}' has no group yet"
        if self._view.is_ready(model.name):
            return f"The groups of the model '{model.name}' do not answer"
        return f"The model '{model.name}' has no ready group: {', '.join(map(_describe, groups))}"

    def _ready_in_s(self, model: ServedModel) -> float:
        times = [
            group.expected_ready_at_s
            for group in self._view.groups_of(model.name)
            if group.expected_ready_at_s is not None
        ]
        return min(times) - time.time() if times else _UNKNOWN_WAIT_S


def _bounds(limits: GatewayLimits) -> QueueBounds:
    return QueueBounds(limits.waiting_requests, limits.waiting_tokens, limits.waiting_bytes)


def _describe(group: Group) -> str:
    state = f"{group.name} is {group.state.value}"
    return f"{state} ({group.message})" if group.message else state
