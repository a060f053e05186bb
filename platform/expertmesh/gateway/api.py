"""The endpoints that clients see, and the error objects of the protocols that they speak."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec


class Protocol(StrEnum):
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Answer(StrEnum):
    """What the answer of an endpoint looks like, and so where its usage stands."""

    CHAT = "chat"
    """Server-sent events of chat completions and completions."""
    RESPONSES = "responses"
    MESSAGES = "messages"
    WHOLE = "whole"
    """Never a stream."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    name: str
    """In metrics, log and ledger."""
    path: str
    """On the rank, below its base URL."""
    answer: Answer
    protocol: Protocol = Protocol.OPENAI
    metered: bool = True
    """Uses the engine's batch, so the ledger gets a row."""
    completes: bool = True
    """The engine writes tokens, which cost their own price."""


_TOKENIZE = Endpoint("tokenize", "/tokenize", Answer.WHOLE, metered=False)
_DETOKENIZE = Endpoint("detokenize", "/detokenize", Answer.WHOLE, metered=False)

CHAT_PATH = "/v1/chat/completions"
# An allow-list: what vLLM serves beside these never gets out.
ENDPOINTS = {
    CHAT_PATH: Endpoint("chat_completions", CHAT_PATH, Answer.CHAT),
    "/v1/completions": Endpoint("completions", "/v1/completions", Answer.CHAT),
    "/v1/responses": Endpoint("responses", "/v1/responses", Answer.RESPONSES),
    "/v1/messages": Endpoint("messages", "/v1/messages", Answer.MESSAGES, Protocol.ANTHROPIC),
    "/v1/messages/count_tokens": Endpoint(
        "count_tokens",
        "/v1/messages/count_tokens",
        Answer.WHOLE,
        Protocol.ANTHROPIC,
        metered=False,
    ),
    "/v1/embeddings": Endpoint("embeddings", "/v1/embeddings", Answer.WHOLE, completes=False),
    "/tokenize": _TOKENIZE,
    "/v1/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
    "/v1/detokenize": _DETOKENIZE,
}

MODELS_PATH = "/v1/models"
GET_PATHS = ("/healthz", "/readyz", "/metrics", MODELS_PATH)


@dataclass(frozen=True, slots=True)
class ApiError:
    """A refusal or failure as a client will see it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    allow: str | None = None
    """Methods, with status 405."""
    retry: bool = True
    """False: trying again cannot help before long, and the official clients shall not."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            seconds = (
                retry_after(self.retry_after_s) if self.retry else math.ceil(self.retry_after_s)
            )
            headers.append((b"retry-after", str(seconds).encode()))
        if not self.retry:
            headers.append((b"x-should-retry", b"false"))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


_LONGEST_RETRY_AFTER_S = 120
"""The official clients ignore a longer one and fall back on their own short waits."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def retry_after(seconds: float) -> int:
    return max(1, min(_LONGEST_RETRY_AFTER_S, math.ceil(seconds)))


def error_body(protocol: Protocol, error: ApiError, request_id: str) -> bytes:
    if protocol is Protocol.ANTHROPIC:
        return msgspec.json.encode(_anthropic_error(error, request_id))
    return msgspec.json.encode({"error": _openai_error(error)})


def error_event(answer: Answer, error: ApiError, request_id: str) -> bytes:
    """The last event of a stream that broke."""
    if answer is Answer.MESSAGES:
        data = msgspec.json.encode(_anthropic_error(error, request_id))
        return b"event: error\ndata: " + data + b"\n\n"
    if answer is Answer.RESPONSES:
        # The published event has the fields on top; the official client looks below `error`.
        fields = _openai_error(error)
        data = msgspec.json.encode({**fields, "type": "error", "error": fields})
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + msgspec.json.encode({"error": _openai_error(error)}) + b"\n\n"


def _openai_error(error: ApiError) -> dict[str, Any]:
    if error.code == "insufficient_quota":
        kind = "insufficient_quota"
    elif error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def _anthropic_error(error: ApiError, request_id: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "api_error"
    )
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


class _RankErrorFields(msgspec.Struct):
    message: str = ""
    param: str | None = None
    code: Any = None


class _RankError(msgspec.Struct):
    error: _RankErrorFields | None = None
    detail: Any = None


_decode_rank_error = msgspec.json.Decoder(_RankError).decode


def read_rank_error(status: int, body: bytes) -> ApiError:
    """vLLM's error, whose code is the status as a number and whose types are its own."""
    message, param = "", None
    try:
        parsed = _decode_rank_error(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = body[:500].decode(errors="replace").strip()
    else:
        if parsed.error is not None:
            message, param = parsed.error.message, parsed.error.param
            code = parsed.error.code
            if isinstance(code, int) and 400 <= code <= 599:
                status = code
        elif parsed.detail is not None:
            message = (
                parsed.detail
                if isinstance(parsed.detail, str)
                else msgspec.json.encode(parsed.detail).decode()
            )
    code = "context_length_exceeded" if "maximum context length" in message else None
    return ApiError(status, message or f"The model answered with status {status}.", code, param)
