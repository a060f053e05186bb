"""OpenTelemetry traces: decided at a request's start, made into spans at its end.

Off unless the standard variables name an endpoint. Attributes follow the GenAI semantic
conventions; none holds a prompt, a completion or a key.
"""

import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from expertmesh.errors import SetupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

ENDPOINT_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Base URL of an OTLP/HTTP collector, e.g. http://collector:4318."""
TRACES_ENDPOINT_VARIABLE: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""The same for traces alone, with its path."""
RATIO_VARIABLE: Final = "OTEL_TRACES_SAMPLER_ARG"
"""Share of requests without a sampling decision of their own that are traced: 0 to 1, default 1."""
SERVICE_VARIABLE: Final = "OTEL_SERVICE_NAME"
DISABLED_VARIABLE: Final = "OTEL_SDK_DISABLED"

_TRACEPARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?",
    re.DOTALL,
)
_SAMPLED: Final = 1
_EXPORT_TIMEOUT_S: Final = 5.0
_OPERATIONS: Final = {
    "chat_completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A W3C `traceparent` header."""

    trace_id: int
    span_id: int
    sampled: bool


def read_traceparent(value: bytes) -> TraceParent | None:
    """None when it is none, as the standard then wants it ignored."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None or (match[1] == b"00" and match[5] is not None):
        return None
    return TraceParent(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & _SAMPLED))


@dataclass(slots=True)
class TracedAttempt:
    """The request at one rank, or at an external provider. Unix times."""

    span_id: int
    group: str
    pool: str
    rank: int
    started_at_s: float
    ended_at_s: float | None = None
    error: str = ""


class CallTrace:
    """Of one request that is traced."""

    __slots__ = ("attempts", "id", "parent", "span_id", "trace_id")

    def __init__(self, trace_id: int, parent: TraceParent | None) -> None:
        self.trace_id: Final = trace_id
        self.parent: Final = parent
        self.span_id: Final = _span_id()
        self.id: Final = f"{trace_id:032x}"
        """For log lines and the examples of histograms."""
        self.attempts: Final[list[TracedAttempt]] = []

    def attempt(self, group: str, pool: str, rank: int, at_s: float) -> bytes:
        """Begins one; returns the `traceparent` that goes with it."""
        span_id = _span_id()
        self.attempts.append(TracedAttempt(span_id, group, pool, rank, at_s))
        return f"00-{self.id}-{span_id:016x}-01".encode()

    def attempt_ended(self, at_s: float, error: str = "") -> None:
        if self.attempts:
            self.attempts[-1].ended_at_s = at_s
            self.attempts[-1].error = error


@dataclass(frozen=True, slots=True)
class TracedCall:
    """What a request was and became. Unix times."""

    route: str
    """Path of the endpoint."""
    endpoint: str
    request_id: str
    tenant: str
    model: str
    stream: bool
    max_tokens: int | None
    status: int
    error: str
    accepted_at_s: float
    queue_s: float
    first_token_at_s: float | None
    ended_at_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Tracing:
    """Look at `on` first: all else costs something."""

    def __init__(
        self,
        exporter: "SpanExporter | None" = None,
        ratio: float = 1.0,
        service: str = "expertmesh-gateway",
        at_once: bool = False,
    ) -> None:
        """Off without an exporter. `at_once` exports each span when it ends, for tests."""
        self.on: Final = exporter is not None
        self._bound = round(ratio * (1 << 64))
        self._make_spans: Callable[[CallTrace, TracedCall], None] = _no_spans
        self._shut_down: Callable[[], None] | None = None
        if exporter is not None:
            maker = _SpanMaker(exporter, service, at_once)
            self._make_spans = maker.make
            self._shut_down = maker.shut_down

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Tracing":
        """As OpenTelemetry's own variables say. Raises SetupError."""
        endpoint = traces_endpoint(environment)
        if endpoint is None:
            return cls()
        text = environment.get(RATIO_VARIABLE, "").strip() or "1"
        try:
            ratio = float(text)
        except ValueError:
            ratio = -1.0
        if not 0.0 <= ratio <= 1.0:
            raise SetupError(f"{RATIO_VARIABLE}: {text!r}: write a number from 0 to 1")
        service = environment.get(SERVICE_VARIABLE, "") or "expertmesh-gateway"
        return cls(_exporter(endpoint), ratio, service)

    def begin(self, traceparent: bytes | None) -> CallTrace | None:
        """None when the request is not traced; its own `traceparent` then goes on untouched.

        A request that comes with a decision keeps it.
        """
        if not self.on:
            return None
        parent = read_traceparent(traceparent) if traceparent is not None else None
        if parent is not None:
            return CallTrace(parent.trace_id, parent) if parent.sampled else None
        trace_id = random.getrandbits(128)
        if trace_id & 0xFFFFFFFFFFFFFFFF >= self._bound:
            return None
        return CallTrace(trace_id or 1, None)

    def end(self, trace: CallTrace, call: TracedCall) -> None:
        """Once, when the answer has gone out. Some 0.1 ms; the export happens in a thread."""
        self._make_spans(trace, call)

    def close(self, timeout_s: float = _EXPORT_TIMEOUT_S) -> None:
        """Exports what is left, or gives up after the time."""
        if self._shut_down is not None:
            _within(self._shut_down, timeout_s)


class DecisionTracing:
    """Spans of a controller's decisions, each a trace of its own."""

    def __init__(
        self,
        exporter: "SpanExporter | None" = None,
        service: str = "expertmesh-controller",
        at_once: bool = False,
    ) -> None:
        """As `Tracing`."""
        self.on: Final = exporter is not None
        self._maker = None if exporter is None else _SpanMaker(exporter, service, at_once)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "DecisionTracing":
        """As `Tracing.from_environment`; all decisions, whatever the share of requests is."""
        endpoint = traces_endpoint(environment)
        return cls() if endpoint is None else cls(_exporter(endpoint))

    def decided(
        self,
        model: str,
        began_at_s: float,
        ended_at_s: float,
        attributes: "Mapping[str, AttributeValue]",
        actions: "Sequence[Mapping[str, AttributeValue]]",
    ) -> None:
        """Each action is an event of the span. Times are Unix times."""
        if self._maker is not None:
            self._maker.make_decision(model, began_at_s, ended_at_s, attributes, actions)

    def close(self, timeout_s: float = _EXPORT_TIMEOUT_S) -> None:
        """Exports what is left, or gives up after the time."""
        if self._maker is not None:
            _within(self._maker.shut_down, timeout_s)


def traces_endpoint(environment: Mapping[str, str]) -> str | None:
    """Where traces go, by OpenTelemetry's variables; None: nowhere. Raises SetupError."""
    endpoint = environment.get(TRACES_ENDPOINT_VARIABLE, "").strip()
    base = environment.get(ENDPOINT_VARIABLE, "").strip()
    if not endpoint and base:
        endpoint = f"{base.rstrip('/')}/v1/traces"
    if not endpoint or environment.get(DISABLED_VARIABLE, "").strip().lower() == "true":
        return None
    if not endpoint.startswith(("http://", "https://")):
        variable = ENDPOINT_VARIABLE if base else TRACES_ENDPOINT_VARIABLE
        raise SetupError(f"{variable}: {endpoint!r}: write it as http://host:port")
    return endpoint


def _exporter(endpoint: str) -> "SpanExporter":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise SetupError(
            f"traces go to {endpoint}, but OpenTelemetry is not installed ({error}); install "
            "expertmesh[traces], or unset the variable that names the endpoint"
        ) from error
    return OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)


def _within(shut_down: Callable[[], None], timeout_s: float) -> None:
    last = threading.Thread(target=shut_down, name="last traces", daemon=True)
    last.start()
    last.join(timeout_s)


class _SpanMaker:
    """All that needs the OpenTelemetry SDK."""

    def __init__(self, exporter: "SpanExporter", service: str, at_once: bool) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.id_generator import IdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class GivenIds(IdGenerator):
            """Ids are given out before the spans are made, as ranks have to know them."""

            trace_id = 0
            span_id = 0

            def generate_span_id(self) -> int:
                return self.span_id

            def generate_trace_id(self) -> int:
                return self.trace_id

        self._trace = trace
        self._ids = GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({SERVICE_NAME: service}),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        processor = SimpleSpanProcessor if at_once else BatchSpanProcessor
        self._provider.add_span_processor(processor(exporter))
        self._tracer = self._provider.get_tracer("expertmesh.gateway")

    def make(self, trace: CallTrace, call: TracedCall) -> None:
        api = self._trace
        operation = _OPERATIONS.get(call.endpoint)
        model = _model_attributes(call, operation)
        parent = api.INVALID_SPAN
        if trace.parent is not None:
            flags = api.TraceFlags(_SAMPLED)
            remote = api.SpanContext(trace.trace_id, trace.parent.span_id, True, flags)
            parent = api.NonRecordingSpan(remote)
        self._ids.trace_id = trace.trace_id
        server = self._start(
            f"POST {call.route}",
            trace.span_id,
            parent,
            api.SpanKind.SERVER,
            call.accepted_at_s,
            {
                **model,
                "http.request.method": "POST",
                "http.route": call.route,
                "http.response.status_code": call.status,
                "expertmesh.request_id": call.request_id,
                "expertmesh.tenant": call.tenant,
            },
        )
        if call.queue_s > 0:
            queued = self._start(
                "queue", _span_id(), server, api.SpanKind.INTERNAL, call.accepted_at_s, {}
            )
            queued.end(_ns(call.accepted_at_s + call.queue_s))
        for attempt in trace.attempts:
            is_last = attempt is trace.attempts[-1]
            span = self._start(
                f"{operation} {call.model}" if operation else f"POST {call.route}",
                attempt.span_id,
                server,
                api.SpanKind.CLIENT,
                attempt.started_at_s,
                {
                    **(model if is_last else _asked(call, operation)),
                    "expertmesh.group": attempt.group,
                    "expertmesh.pool": attempt.pool,
                    "expertmesh.rank": attempt.rank,
                },
            )
            if is_last and call.first_token_at_s is not None:
                span.add_event("first token", timestamp=_ns(call.first_token_at_s))
            if attempt.error:
                self._fail(span, "upstream_failed", attempt.error)
            span.end(_ns(attempt.ended_at_s or call.ended_at_s))
        if call.first_token_at_s is not None:
            server.add_event("first token", timestamp=_ns(call.first_token_at_s))
        if call.status >= 500 or (call.error and call.status < 400):
            self._fail(server, str(call.status), call.error)
        server.end(_ns(call.ended_at_s))

    def make_decision(
        self,
        model: str,
        began_at_s: float,
        ended_at_s: float,
        attributes: "Mapping[str, AttributeValue]",
        actions: "Sequence[Mapping[str, AttributeValue]]",
    ) -> None:
        self._ids.trace_id = random.getrandbits(128) or 1
        span = self._start(
            f"decide {model}",
            _span_id(),
            self._trace.INVALID_SPAN,
            self._trace.SpanKind.INTERNAL,
            began_at_s,
            attributes,
        )
        for action in actions:
            span.add_event("action", action, timestamp=_ns(began_at_s))
        span.end(_ns(ended_at_s))

    def shut_down(self) -> None:
        self._provider.shutdown()

    def _start(
        self,
        name: str,
        span_id: int,
        parent: "Span",
        kind: object,
        at_s: float,
        attributes: "Mapping[str, AttributeValue]",
    ) -> "Span":
        self._ids.span_id = span_id
        return self._tracer.start_span(
            name,
            context=self._trace.set_span_in_context(parent),
            kind=kind,  # type: ignore[arg-type]
            attributes=attributes,
            start_time=_ns(at_s),
        )

    def _fail(self, span: "Span", kind: str, description: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, description or None))


def _asked(call: TracedCall, operation: str | None) -> "dict[str, AttributeValue]":
    attributes: dict[str, AttributeValue] = {
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": call.model,
        "gen_ai.request.stream": call.stream,
    }
    if operation is not None:
        attributes["gen_ai.operation.name"] = operation
    if call.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = call.max_tokens
    return attributes


def _model_attributes(call: TracedCall, operation: str | None) -> "dict[str, AttributeValue]":
    attributes = _asked(call, operation)
    attributes["gen_ai.usage.input_tokens"] = call.prompt_tokens
    attributes["gen_ai.usage.cache_read.input_tokens"] = call.cached_tokens
    attributes["gen_ai.usage.output_tokens"] = call.completion_tokens
    if call.first_token_at_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = (
            call.first_token_at_s - call.accepted_at_s
        )
    return attributes


def _no_spans(trace: CallTrace, call: TracedCall) -> None:
    pass


def _span_id() -> int:
    return random.getrandbits(64) or 1


def _ns(at_s: float) -> int:
    return int(at_s * 1e9)
