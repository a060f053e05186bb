"""Header lines of answers, and what an answer of a rank that is none means."""

from collections.abc import Sequence
from typing import Final

import msgspec

from expertmesh.gateway.api import ApiError, Protocol
from expertmesh.gateway.rank_connection import AnswerHead

STREAM_LINES: Final = (
    b"content-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\n"
    # nginx and its kin would buffer the events otherwise.
    b"x-accel-buffering: no\r\n"
)
JSON_LINE: Final = b"content-type: application/json\r\n"
_RETRY_AFTER_S: Final = 1.0
# Another group may do better, as with every 5xx but 501, which the model cannot do anywhere. With
# 401 and 403 a rank refuses the mesh token, never the client's key, which it does not see.
_RETRIED_STATUSES: Final = frozenset((401, 403, 408, 429))


class Failure(msgspec.Struct, frozen=True, gc=False):
    """An attempt that came to nothing before the client got anything."""

    status: int
    """What the client gets when no other attempt is left."""
    reason: str
    connection_failed: bool = False
    retry_after_s: float | None = None


def id_lines(protocol: Protocol, request_id: str) -> bytes:
    encoded = request_id.encode()
    if protocol is Protocol.ANTHROPIC:
        return b"x-request-id: %b\r\nrequest-id: %b\r\n" % (encoded, encoded)
    return b"x-request-id: %b\r\n" % encoded


def header_lines(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in headers)


def error_lines(
    protocol: Protocol, error: ApiError, request_id: str, dropped_reason: str = ""
) -> bytes:
    lines = JSON_LINE + header_lines(error.headers()) + id_lines(protocol, request_id)
    if dropped_reason:
        lines += b"x-em-dropped-reason: %b\r\n" % dropped_reason.encode()
    return lines


def is_gone(head: AnswerHead, error: ApiError) -> bool:
    """Whether the rank, rather than the request, is at fault."""
    status = head.status
    if status < 400 or status in _RETRIED_STATUSES or (status >= 500 and status != 501):
        return True
    # A path that Ray Serve does not know is answered in plain text: the group has gone.
    return status == 404 and head.content_type.startswith(b"text/plain")


def failure_of(group: str, head: AnswerHead, error: ApiError) -> Failure:
    status = head.status
    if status in (401, 403):
        return Failure(502, f"{group}: refused the gateway's credentials")
    return Failure(
        status=status if status in (429, 503, 504) else 502,
        reason=f"{group}: answered with status {status}: {error.message}",
        retry_after_s=float(head.retry_after) if head.retry_after.isdigit() else None,
    )


def unavailable(model: str, failure: Failure) -> ApiError:
    return ApiError(
        failure.status,
        f"The model '{model}' could not answer: {failure.reason.rstrip('.')}.",
        code="upstream_unavailable",
        retry_after_s=failure.retry_after_s or _RETRY_AFTER_S,
    )
