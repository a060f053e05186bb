"""What became of a call, told once to all who need it: limits, ledger, metrics, log, traces."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from expertmesh.core.metering.rating import PICO_USD_PER_USD
from expertmesh.core.metering.usage import Outcome
from expertmesh.gateway.access_log import AccessLine, AccessLog
from expertmesh.gateway.admission import Admission
from expertmesh.gateway.call import Call
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.flight import CLIENT_CLOSED
from expertmesh.gateway.limiter import Limiter
from expertmesh.gateway.metrics import GatewayMetrics
from expertmesh.gateway.prices import PriceBook
from expertmesh.gateway.usage import PromptSizes, TokenCount
from expertmesh.gateway.usage_journal import Closed, Opened
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.telemetry.traces import CallTrace, TracedCall, Tracing

_NOTHING: Final = TokenCount(0, 0, 0)
_FOR_WANT_OF_ROOM: Final = frozenset({"queue_full", "queue_timeout", "no_capacity", "draining"})
_REFUSED: Final = "refused"
"""In the log: by a limit, for want of room, or by the rank as a faulty request."""


class Settlement:
    def __init__(
        self,
        limiter: Limiter,
        admission: Admission,
        view: FleetView,
        writer: UsageWriter,
        metrics: GatewayMetrics,
        access_log: AccessLog,
        tracing: Tracing,
        sizes: PromptSizes,
        prices: PriceBook,
        now_s: Callable[[], float],
    ) -> None:
        """`now_s` is a monotonic clock."""
        self._limiter: Final = limiter
        self._admission: Final = admission
        self._view: Final = view
        self._writer: Final = writer
        self._metrics: Final = metrics
        self._access_log: Final = access_log
        self._tracing: Final = tracing
        self._sizes: Final = sizes
        self._prices: Final = prices
        self._now_s: Final = now_s

    def stream_began(self, call: Call) -> None:
        """The first event goes out next: from now on somebody has to pay, whatever happens."""
        candidate = call.candidate
        if candidate is None or not call.endpoint.metered:
            return
        model = call.model
        call.journaled = self._writer.open_call(
            Opened(
                call.id,
                call.accepted_at_s,
                call.caller.tenant,
                call.caller.key_id,
                model.name,
                candidate.group,
                candidate.pool,
                call.endpoint.name,
                call.prompt_guess,
                call.queue_s,
                self._ttft_s(call),
                model.usd_per_mtok_in,
                model.usd_per_mtok_cached,
                model.usd_per_mtok_out,
            )
        )

    def stream_went_on(self, call: Call) -> None:
        events, journaled = call.events, call.journaled
        if journaled is not None and events is not None:
            journaled.progress(events.tokens_seen)

    def settle(self, call: Call) -> None:
        """Before the last byte goes to the client: what was answered is in the journal then."""
        if call.settled:
            return
        call.settled = True
        ended_s = self._now_s()
        duration_s = ended_s - call.started_s
        aborted = call.outcome is Outcome.ABORTED
        model, candidate, metrics = call.model, call.candidate, self._metrics
        name = model.name
        metrics.answered(name, call.endpoint.name, CLIENT_CLOSED if aborted else call.status)
        if aborted:
            metrics.aborted(name)
        if call.waited:
            metrics.waited(name, call.caller.priority.value, call.queue_s)
        count = _NOTHING
        if candidate is not None and call.endpoint.metered and not call.rejected:
            count = self._count(call)
            price = self._prices.of(model)
            call.cost_pico_usd = price.pico_usd(count.prompt, count.cached, count.completion)
            self._writer.record(
                Closed(
                    call.id,
                    call.accepted_at_s,
                    call.caller.tenant,
                    call.caller.key_id,
                    name,
                    candidate.group,
                    candidate.pool,
                    call.endpoint.name,
                    call.outcome,
                    count.prompt,
                    count.cached,
                    count.completion,
                    call.queue_s,
                    self._ttft_s(call),
                    duration_s,
                    model.usd_per_mtok_in,
                    model.usd_per_mtok_cached,
                    model.usd_per_mtok_out,
                ),
                call.journaled,
            )
            self._measure(call, count, duration_s)
            self._admission.served(call, count.prompt + count.completion)
        if call.endpoint.metered and not aborted:
            self._judge(call, count, duration_s)
        if call.reserved:
            call.reserved = False
            self._limiter.settle(
                call.id, count.prompt + count.completion, call.cost_pico_usd, time.time()
            )
        self._log(call, count, duration_s)
        if call.trace is not None:
            self._trace(call, call.trace, count, duration_s)

    def _count(self, call: Call) -> TokenCount:
        """What the engine told, else what has been seen of it."""
        if call.outcome is Outcome.ERROR and call.first_byte_s is None:
            return _NOTHING  # the client has seen nothing of what was done for it
        usage = call.usage
        if call.events is not None:
            usage = call.events.usage()
            if usage is None:
                return TokenCount(call.prompt_guess, 0, call.events.tokens_seen)
        if usage is None:
            return _NOTHING
        self._sizes.learn(call.model.name, len(call.question.body), usage.prompt)
        return usage

    def _measure(self, call: Call, count: TokenCount, duration_s: float) -> None:
        candidate = call.candidate
        assert candidate is not None
        trace_id = call.trace.id if call.trace is not None else ""
        if count is not _NOTHING:
            self._view.answered_with(call, count)
        served = self._metrics.served(call.model.name, candidate.pool)
        served.duration.observe(duration_s, trace_id)
        served.prompt_tokens.value += count.prompt - count.cached
        served.cached_tokens.value += count.cached
        served.completion_tokens.value += count.completion
        usd = call.cost_pico_usd / PICO_USD_PER_USD
        served.revenue_usd.value += usd
        tenant = self._metrics.tenant(call.caller.tenant)
        tenant.requests.value += 1
        tenant.prompt_tokens.value += count.prompt - count.cached
        tenant.cached_tokens.value += count.cached
        tenant.completion_tokens.value += count.completion
        tenant.revenue_usd.value += usd
        # A whole answer's first byte comes at its end and says nothing about latency targets.
        if call.events is None or call.first_byte_s is None:
            return
        ttft_s = call.first_byte_s - call.started_s
        served.ttft.observe(ttft_s, trace_id)
        tpot_s = None
        if count.completion > 1:
            tpot_s = (duration_s - ttft_s) / (count.completion - 1)
            served.tpot.observe(tpot_s, trace_id)
        self._view.timed(candidate.group, call.first_byte_s - call.asked_s, tpot_s)

    def _judge(self, call: Call, count: TokenCount, duration_s: float) -> None:
        """Whether the model kept its targets. What the client did wrong or may not do says nothing
        about that: those requests count nowhere."""
        failed = call.outcome is Outcome.ERROR or call.status >= 500
        if failed or call.dropped_reason in _FOR_WANT_OF_ROOM:
            self._metrics.judged(call.model.name, "failed")
            return
        if call.status >= 400:
            return
        slo = call.model.slo
        more_tokens = max(0, count.completion - 1)
        if call.events is None or call.first_byte_s is None:
            # Nobody sees when a whole answer begins: both times together are its target.
            met = duration_s <= slo.ttft_s + slo.tpot_s * more_tokens
            self._metrics.judged(call.model.name, "met" if met else "slow_tokens")
            return
        ttft_s = call.first_byte_s - call.started_s
        result = "met"
        if ttft_s > slo.ttft_s:
            result = "slow_start"
        elif duration_s - ttft_s > slo.tpot_s * more_tokens and more_tokens:
            result = "slow_tokens"
        self._metrics.judged(call.model.name, result)

    def _log(self, call: Call, count: TokenCount, duration_s: float) -> None:
        candidate = call.candidate
        ttft_s = self._ttft_s(call)
        self._access_log.write(
            AccessLine(
                datetime.now(UTC),
                call.request_id,
                call.id,
                call.caller.tenant,
                call.caller.key_id,
                call.endpoint.name,
                call.model.name,
                call.question.stream,
                CLIENT_CLOSED if call.outcome is Outcome.ABORTED else call.status,
                _REFUSED
                if call.outcome is Outcome.OK and call.status >= 400
                else call.outcome.value,
                None if candidate is None else candidate.group,
                None if candidate is None else candidate.rank,
                call.attempts_failed,
                count.prompt,
                count.cached,
                count.completion,
                round(call.queue_s, 6),
                None if ttft_s is None else round(ttft_s, 6),
                round(duration_s, 6),
                call.error[:500],
                "" if call.trace is None else call.trace.id,
            )
        )

    def _trace(self, call: Call, trace: CallTrace, count: TokenCount, duration_s: float) -> None:
        ttft_s = self._ttft_s(call) if call.events is not None else None
        at_s = call.accepted_at_s
        self._tracing.end(
            trace,
            TracedCall(
                route=call.endpoint.path,
                endpoint=call.endpoint.name,
                request_id=call.request_id,
                tenant=call.caller.tenant,
                model=call.model.name,
                stream=call.question.stream,
                max_tokens=call.question.max_tokens,
                status=call.status,
                error=call.error,
                accepted_at_s=at_s,
                queue_s=call.queue_s,
                first_token_at_s=None if ttft_s is None else at_s + ttft_s,
                ended_at_s=at_s + duration_s,
                prompt_tokens=count.prompt,
                cached_tokens=count.cached,
                completion_tokens=count.completion,
            ),
        )

    @staticmethod
    def _ttft_s(call: Call) -> float | None:
        return None if call.first_byte_s is None else call.first_byte_s - call.started_s
