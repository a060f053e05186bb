"""Frames between a worker and the limit server of its host.

A frame is its length in four bytes, big-endian, and a MessagePack array of messages. Calls are
numbered; the server works through them in order and says how far it has come.
"""

from collections.abc import Iterator

import msgspec

from expertmesh.core.admission.reservation import Headroom, LimitKind
from expertmesh.core.domain.tenant import Limits

MOST_FRAME_BYTES = 16 * 1024 * 1024
MOST_MESSAGES = 1_000
"""In one frame; some 100 KB."""
MOST_INTEGER = 2**63 - 1
_LENGTH_BYTES = 4


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The first message of a connection. `worker` is unique per start of a worker."""

    worker: str


class Define(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """From here on `handle` stands for this account, on this connection."""

    handle: int
    name: str
    limits: Limits


class Reserve(msgspec.Struct, frozen=True, array_like=True, tag=2):
    seq: int
    reservation_id: str
    handles: tuple[int, ...]
    tokens: int
    pico_usd: int
    now_s: float


class Settle(msgspec.Struct, frozen=True, array_like=True, tag=3):
    seq: int
    reservation_id: str
    tokens: int
    pico_usd: int
    now_s: float


class Adopt(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A reservation that an earlier server had granted and that is still open."""

    reservation_id: str
    handles: tuple[int, ...]
    tokens: int
    pico_usd: int
    now_s: float


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Answer to Hello. `server` is unique per start of a server."""

    server: str
    wait_s: float = 0.0
    """Reserve nothing for so long: other workers still tell what is open."""


class Granted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    seq: int
    headroom: Headroom | None


class Denied(msgspec.Struct, frozen=True, array_like=True, tag=2):
    seq: int
    kind: LimitKind
    account: str
    limit: float
    retry_after_s: float
    headroom: Headroom | None


class Done(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """All calls up to this one are done."""

    seq: int


Question = Hello | Define | Reserve | Settle | Adopt
Answer = Welcome | Granted | Denied | Done

_encode = msgspec.msgpack.Encoder().encode
decode_questions = msgspec.msgpack.Decoder(list[Question]).decode
decode_answers = msgspec.msgpack.Decoder(list[Answer]).decode


class FrameError(ValueError):
    """What came is no frame."""


def frames(messages: list[Question] | list[Answer]) -> bytes:
    if len(messages) <= MOST_MESSAGES:
        return _frame(messages)
    return b"".join(
        _frame(messages[first : first + MOST_MESSAGES])
        for first in range(0, len(messages), MOST_MESSAGES)
    )


def _frame(messages: list[Question] | list[Answer]) -> bytes:
    payload = _encode(messages)
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


class FrameReader:
    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are complete now. Raises FrameError."""
        buffer = self._buffer + data if self._buffer else data
        start, end = 0, len(buffer)
        while end - start >= _LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "big")
            if length > MOST_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes")
            if end - start - _LENGTH_BYTES < length:
                break
            start += _LENGTH_BYTES
            yield buffer[start : start + length]
            start += length
        self._buffer = buffer[start:]
