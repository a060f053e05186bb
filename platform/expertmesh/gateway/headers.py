"""The few header fields that matter, found in one pass."""

import math
import re
from collections.abc import Iterable
from typing import Final

import msgspec

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")

# What a rank gets of a client's headers; no other one, as some headers steer vLLM's scheduler.
FORWARDED: Final = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"traceparent", b"tracestate")
)


class ClientHeaders(msgspec.Struct, gc=False):
    secret: bytes | None = None
    request_id: str = ""
    content_length: int = 0
    content_type: bytes = b""
    content_encoding: bytes | None = None
    chunked: bool = False
    transfer_encodings: int = 0
    """Number of such fields."""
    hosts: int = 0
    expects_continue: bool = False
    unknown_expectation: bool = False
    read_timeout_s: float | None = None
    """How long the client waits for a part of its answer, where it says so."""
    session: bytes | None = None
    origin: bytes | None = None
    """Of a browser's request from a page of another host."""
    anthropic: bool = False
    accept: bytes = b""
    traceparent: bytes | None = None
    forwarded: bytes = b""
    """Whole header lines for the rank."""


_WANTED: Final = FORWARDED | {
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"expect",
    b"host",
    b"origin",
    b"transfer-encoding",
    b"x-api-key",
    b"x-request-id",
    b"x-session-id",
    b"x-stainless-read-timeout",
    b"x-stainless-timeout",
}


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> ClientHeaders:
    """Names of any case; the parser has checked that each field is well formed."""
    found = ClientHeaders()
    for raw_name, value in headers:
        name = raw_name.lower()
        if name not in _WANTED:
            continue
        if name == b"content-length":
            # The parser has refused what is no number, and a second one.
            found.content_length = int(value)
        elif name == b"host":
            found.hosts += 1
        elif name == b"authorization":
            if value[:7].lower() == b"bearer ":
                found.secret = value[7:].strip()
        elif name == b"accept":
            found.accept = value
            found.forwarded += b"accept: " + value + b"\r\n"
        elif name == b"content-type":
            found.content_type = value
        elif name == b"x-api-key":
            if found.secret is None:
                found.secret = value.strip()
        else:
            _read_rarer(found, name, value)
    return found


def _read_rarer(found: ClientHeaders, name: bytes, value: bytes) -> None:
    if name == b"x-request-id":
        if _SANE_ID.fullmatch(value):
            found.request_id = value.decode()
    elif name == b"x-session-id":
        found.session = value[:256] or None
    elif name == b"content-encoding":
        found.content_encoding = value.strip().lower()
    elif name == b"x-stainless-read-timeout" or name == b"x-stainless-timeout":
        # The second is what the official clients for JavaScript send.
        timeout_s = _positive(value)
        if timeout_s is not None and timeout_s < (found.read_timeout_s or math.inf):
            found.read_timeout_s = timeout_s
    elif name == b"expect":
        found.expects_continue = value.strip().lower() == b"100-continue"
        found.unknown_expectation = not found.expects_continue
    elif name == b"transfer-encoding":
        found.transfer_encodings += 1
        found.chunked = found.transfer_encodings == 1 and value.strip().lower() == b"chunked"
    elif name == b"origin":
        found.origin = value
    else:
        if name == b"anthropic-version":
            found.anthropic = True
        elif name == b"traceparent":
            found.traceparent = value
            return  # sent on by whoever traces
        found.forwarded += name + b": " + value + b"\r\n"


def _positive(value: bytes) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number > 0 else None
