"""One request from acceptance to settlement: what was asked, and what became of it."""

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.policy import Attempt, Candidate
from expertmesh.gateway.api import ApiError, Endpoint
from expertmesh.gateway.auth import Key
from expertmesh.gateway.event_stream import EventStream
from expertmesh.gateway.usage import TokenCount

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_GUESSED_COMPLETION_TOKENS = 256
"""For load figures only, where a request names no limit."""

# What a rank gets of a client's headers; no other one, as some headers steer vLLM's scheduler.
FORWARDED = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"traceparent", b"tracestate")
)


@dataclass(slots=True)
class ClientHeaders:
    """The few header fields that matter, found in one pass."""

    secret: bytes | None = None
    request_id: str = ""
    content_length: int | None = None
    content_encoding: bytes | None = None
    read_timeout_s: float | None = None
    anthropic: bool = False
    forwarded: dict[str, str] = field(default_factory=dict)


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> ClientHeaders:
    found = ClientHeaders()
    for name, value in headers:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                found.secret = value[7:].strip()
        elif name == b"x-api-key":
            if found.secret is None:
                found.secret = value.strip()
        elif name == b"x-request-id":
            if _SANE_ID.fullmatch(value):
                found.request_id = value.decode()
        elif name == b"content-length":
            found.content_length = int(value) if value.isdigit() else None
        elif name == b"content-encoding":
            found.content_encoding = value.strip().lower()
        elif name == b"x-stainless-read-timeout":
            found.read_timeout_s = _positive(value)
        elif name in FORWARDED:
            if name == b"anthropic-version":
                found.anthropic = True
            found.forwarded[name.decode()] = value.decode("latin-1")
    return found


def _positive(value: bytes) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number > 0 else None


def new_id() -> str:
    return f"req_{uuid.uuid4().hex}"


_ABSENT = msgspec.Raw(b"")
_NULL = msgspec.Raw(b"null")


class _Ask(msgspec.Struct):
    """The part of a body that the gateway reads; the rest passes unseen."""

    model: Any = None
    stream: bool | None = None
    stream_options: msgspec.Raw = _ABSENT
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


# Not strict: vLLM takes "true" and 1 for true as well, and both must see the same request.
_decode_ask = msgspec.json.Decoder(_Ask, strict=False).decode
_decode_options = msgspec.json.Decoder(_StreamOptions, strict=False).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_INCLUDE_USAGE = b'"stream_options":{"include_usage":true}'


@dataclass(frozen=True, slots=True)
class Question:
    """A body, read as far as the gateway needs it."""

    body: bytes
    """As it goes to the rank."""
    model: str
    stream: bool
    asks_usage: bool
    """The gateway has added the wish for the usage event, which the client must not see."""
    max_tokens: int


def read_question(endpoint: Endpoint, body: bytes) -> Question | ApiError:
    try:
        ask = _decode_ask(body)
    except msgspec.ValidationError as error:
        return ApiError(400, f"The request body is not valid: {error}.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return ApiError(400, f"The request body is no JSON that can be read: {reason}.")
    if not isinstance(ask.model, str) or not ask.model:
        given = "is missing" if ask.model is None else "must be a non-empty string"
        return ApiError(
            400, f"The field 'model' {given}; name one of GET /v1/models.", param="model"
        )
    asks_usage = False
    if ask.stream and endpoint.name in ("chat_completions", "completions"):
        injected = _with_usage(body, ask.stream_options)
        asks_usage = injected is not body
        body = injected
    limit = ask.max_completion_tokens or ask.max_tokens or ask.max_output_tokens
    known = type(limit) is int and limit > 0
    return Question(
        body=body,
        model=ask.model,
        stream=bool(ask.stream),
        asks_usage=asks_usage,
        max_tokens=limit if known else _GUESSED_COMPLETION_TOKENS,
    )


def _with_usage(body: bytes, options: msgspec.Raw) -> bytes:
    """The same object when the client asks for usage itself, or asks what only vLLM can refuse."""
    if options == _ABSENT:
        end = body.rindex(b"}")
        return b"%b,%b%b" % (body[:end], _INCLUDE_USAGE, body[end:])
    try:
        if options != _NULL and _decode_options(options).include_usage:
            return body
        fields = {} if options == _NULL else _decode_fields(options)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    fields["include_usage"] = msgspec.Raw(b"true")
    whole = _decode_fields(body)
    whole["stream_options"] = msgspec.Raw(msgspec.json.encode(fields))
    return msgspec.json.encode(whole)


@dataclass(slots=True)
class Call:
    """Filled in while the request goes through; settled once at the end."""

    id: str
    """Ours, unique: of the ledger's row. A client could repeat its own."""
    request_id: str
    """The client's, or ours when it sent none."""
    endpoint: Endpoint
    accepted_at_s: float
    """Unix time."""
    started_s: float
    """Monotonic, as are the times below."""
    headers: ClientHeaders
    key: Key
    question: Question
    model: ServedModel
    prompt_guess: int
    # What became of it
    outcome: Outcome = Outcome.OK
    status: int = 0
    error: str = ""
    queue_s: float = 0.0
    waited: bool = False
    candidate: Candidate | None = None
    failed: list[Attempt] = field(default_factory=list)
    events: EventStream | None = None
    usage: TokenCount | None = None
    rejected: bool = False
    """The rank found fault with the request itself, and did not run it."""
    first_byte_s: float | None = None

    @property
    def tokens(self) -> int:
        """For load figures."""
        return self.prompt_guess + min(self.question.max_tokens, self.model.max_model_len)
