"""One request from acceptance to settlement: what was asked, and what became of it."""

import re
from typing import Any

import msgspec

from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.domain.tenant import Caller
from expertmesh.core.metering.usage import Outcome
from expertmesh.core.routing.candidate import Attempt, Candidate
from expertmesh.core.routing.work import Sent
from expertmesh.gateway.api import CHAT_PATH, Answer, ApiError, Endpoint
from expertmesh.gateway.event_stream import EventStream
from expertmesh.gateway.headers import ClientHeaders
from expertmesh.gateway.usage import TokenCount
from expertmesh.gateway.usage_journal import OpenCall
from expertmesh.telemetry.traces import CallTrace

_GUESSED_COMPLETION_TOKENS = 256
"""For rates and load figures only, where a request names no limit; money is reserved in full."""
_TEMPLATE_TOKENS = 256
"""What a chat template may add to a prompt beyond the bytes of the request, tools included."""
_MOST_SEQUENCES = 16_384
"""For one prompt; vLLM refuses more."""

_DEEP_BYTES = 1500
"""A shorter body cannot be nested as deeply as the stack allows."""
_SPARE_FRAMES = 24
"""A body that can be read here must be readable where it is read again, deeper in the program."""

_ABSENT = msgspec.Raw(b"")
_NULL = msgspec.Raw(b"null")


class _Metadata(msgspec.Struct, gc=False):
    user_id: Any = None


class _Ask(msgspec.Struct, gc=False):
    """The part of a body that the gateway reads; the rest passes unseen."""

    model: Any = None
    stream: bool | None = None
    stream_options: msgspec.Raw = _ABSENT
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    prompt: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    prompt_cache_key: Any = None
    user: Any = None
    metadata: msgspec.Raw = _ABSENT
    previous_response_id: Any = None


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


# Not strict: vLLM takes "true" and 1 for true as well, and both must see the same request.
_decode_ask = msgspec.json.Decoder(_Ask, strict=False).decode
_decode_options = msgspec.json.Decoder(_StreamOptions, strict=False).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_INCLUDE_USAGE = b'"stream_options":{"include_usage":true}'
# No encoder writes plain letters so; in this way a mark could hide.
_HIDDEN_LETTER = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
_TYPE = b'"type"'
_MEDIA = (b"image_url", b"input_image", b"video_url", b"input_audio", b"audio_url", b'"image"')


class Question(msgspec.Struct, frozen=True, gc=False):
    """A body, read as far as the gateway needs it."""

    body: bytes
    """As it goes to the rank."""
    model: str
    stream: bool
    asks_usage: bool
    """The gateway has added the wish for the usage event, which the client must not see."""
    max_tokens: int | None
    """Of one sequence; None when the client names no limit."""
    prompts: int
    sequences: int
    """Completions that the engine makes for this request, over all prompts."""
    prompt: msgspec.Raw
    """Where prompts begin alike, so do these bytes."""
    session: bytes | None
    """Requests of one session find their prefix cached at the same rank."""

    def guessed_completion_tokens(self, most: int) -> int:
        """Of all sequences, each with `most` tokens at most."""
        return min(self.max_tokens or _GUESSED_COMPLETION_TOKENS, most) * self.sequences


def read_question(
    endpoint: Endpoint, body: bytes, session: bytes | None = None
) -> Question | ApiError:
    """`session` is what the headers name; it goes before anything in the body."""
    try:
        if not body.isascii():
            body.decode()  # what only the rank reads is checked too
        deep = len(body) > _DEEP_BYTES
        ask = _decode_deeper(body, _SPARE_FRAMES) if deep else _decode_ask(body)
    except msgspec.ValidationError as error:
        return ApiError(400, f"The request body is not valid: {error}.")
    except _UNREADABLE as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return ApiError(400, f"The request body is no JSON that can be read: {reason}.")
    if not isinstance(ask.model, str) or not ask.model:
        given = "is missing" if ask.model is None else "must be a non-empty string"
        return ApiError(
            400, f"The field 'model' {given}; name one of GET /v1/models.", param="model"
        )
    if ask.previous_response_id is not None:
        return ApiError(
            400,
            "Responses are not stored here, so 'previous_response_id' cannot be followed; send "
            "the whole conversation as 'input' (and 'store': false).",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    asks_usage = False
    if ask.stream and endpoint.answer is Answer.CHAT:
        injected = _with_usage(body, ask.stream_options)
        asks_usage = injected is not body
        body = injected
    whole = endpoint.answer is Answer.WHOLE
    limit = _token_limit(endpoint, ask)
    prompts = 1
    several = ask.input if whole else ask.prompt
    if bytes(memoryview(several)[:1]) == b"[":
        prompts = _prompts(several)
    sequences = 0 if whole else prompts
    if ask.n is not None or ask.best_of is not None:
        sequences *= min(max(1, _number(ask.n), _number(ask.best_of)), _MOST_SEQUENCES)
    return Question(
        body,
        ask.model,
        bool(ask.stream) and not whole,
        asks_usage,
        limit if type(limit) is int and limit > 0 else None,
        prompts,
        sequences,
        ask.messages or ask.prompt or ask.input,
        session or _session(ask),
    )


def _decode_deeper(body: bytes, frames: int) -> _Ask:
    return _decode_deeper(body, frames - 1) if frames else _decode_ask(body)


def _token_limit(endpoint: Endpoint, ask: _Ask) -> Any:
    """The field that the engine heeds at this endpoint: any other limits nothing."""
    if endpoint.answer is Answer.RESPONSES:
        return ask.max_output_tokens
    if ask.max_completion_tokens is not None and endpoint.path == CHAT_PATH:
        return ask.max_completion_tokens
    return ask.max_tokens


def _prompts(several: msgspec.Raw) -> int:
    """Of a list: so many as it has texts or lists, or one that is given as token numbers."""
    try:
        prompts = _decode_list(several)
    except _UNREADABLE:
        return 1
    if prompts and bytes(memoryview(prompts[0])[:1]) in (b'"', b"["):
        return len(prompts)
    return 1


def _number(value: Any) -> int:
    """As leniently as vLLM reads it; what it refuses counts as 1."""
    if type(value) is int:
        return value
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 1


def _session(ask: _Ask) -> bytes | None:
    name = ask.prompt_cache_key or ask.user
    if name is None and ask.metadata:
        try:
            name = _decode_metadata(ask.metadata).user_id
        except _UNREADABLE:
            return None
    return name.encode("utf-8", "replace")[:256] if isinstance(name, str) and name else None


def _with_usage(body: bytes, options: msgspec.Raw) -> bytes:
    """The same object when the client asks for usage itself, or asks what only vLLM can refuse."""
    if options == _ABSENT:
        end = body.rindex(b"}")
        return b"%b,%b%b" % (body[:end], _INCLUDE_USAGE, body[end:])
    try:
        if options != _NULL and _decode_options(options).include_usage:
            return body
        fields = {} if options == _NULL else _decode_fields(options)
    except _UNREADABLE:
        return body
    fields["include_usage"] = msgspec.Raw(b"true")
    return _with_field(body, "stream_options", msgspec.json.encode(fields))


def with_model(body: bytes, model: str) -> bytes:
    """The same body for another name of the model."""
    return _with_field(body, "model", msgspec.json.encode(model))


def _with_field(body: bytes, name: str, value: bytes) -> bytes:
    fields = _decode_fields(body)
    fields[name] = msgspec.Raw(value)
    return msgspec.json.encode(fields)


class Call(msgspec.Struct, eq=False):
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
    caller: Caller
    question: Question
    model: ServedModel
    prompt_guess: int
    tokens: int
    """Of the prompt and its completions, as guessed: for rates and load figures."""
    # What became of it
    outcome: Outcome = Outcome.OK
    status: int = 0
    error: str = ""
    dropped_reason: str = ""
    """Why it was turned away before a rank saw it, in one word."""
    queue_s: float = 0.0
    waited: bool = False
    reserved: bool = False
    limit_lines: bytes = b""
    """Header lines that tell what the limits leave."""
    candidate: Candidate | None = None
    failed: list[Attempt] = []
    """Not to be chosen again, as long as the call does not wait in between."""
    attempts_failed: int = 0
    sent: Sent | None = None
    """At a rank now."""
    events: EventStream | None = None
    usage: TokenCount | None = None
    rejected: bool = False
    """The rank found fault with the request itself, and did not run it."""
    asked_s: float = 0.0
    """When a rank was asked last."""
    first_byte_s: float | None = None
    journaled: OpenCall | None = None
    """Its beginning in the usage journal."""
    trace: CallTrace | None = None
    traceparent: bytes = b""
    """Of the attempt under way; empty: the client's goes on untouched."""
    failure_kind: str = ""
    """Of the last failed attempt, in one word."""
    cost_pico_usd: int = 0
    """At the tariff; known once settled."""
    settled: bool = False

    @property
    def most_prompt_tokens(self) -> int:
        """Never below what the engine will count: no token of text is shorter than a byte."""
        body = self.question.body
        most = self.model.max_model_len * self.question.prompts
        size = len(body) + _TEMPLATE_TOKENS
        if size >= most:
            return most
        # Parts that are no text have a type, and their tokens nothing to do with their bytes.
        if _TYPE in body:
            for mark in _MEDIA:
                if mark in body:
                    return most
        if b"\\u00" in body and _HIDDEN_LETTER.search(body):
            return most
        return size

    @property
    def most_completion_tokens(self) -> int:
        if not self.endpoint.completes:
            return 0
        most = self.model.max_model_len
        limit = self.question.max_tokens
        return (most if limit is None or limit > most else limit) * self.question.sequences
