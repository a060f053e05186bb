"""One JSON object per request; never a prompt, a completion or a key.

Lines gather in memory and a thread of their own writes them: a slow reader of standard output
blocks that thread only. What it leaves unread beyond a bound is dropped and counted.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from queue import SimpleQueue

import msgspec

_log = logging.getLogger(__name__)

_FLUSH_PERIOD_S = 0.2
_FLUSH_BYTES = 64 * 1024
_MOST_WAITING_BYTES = 8 * 1024 * 1024


class RefusalLine(msgspec.Struct, gc=False, frozen=True):
    """Of a request that was refused before its model was known."""

    at: datetime
    request_id: str
    endpoint: str
    status: int
    error: str


class AccessLine(msgspec.Struct, gc=False, frozen=True):
    at: datetime
    """UTC, at the end."""
    request_id: str
    usage_id: str
    tenant: str
    key_id: str
    endpoint: str
    model: str
    stream: bool
    status: int
    outcome: str
    group: str | None
    rank: int | None
    failed_attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    ttft_s: float | None
    duration_s: float
    error: str
    trace_id: str = ""


class _DroppedLine(msgspec.Struct, gc=False, frozen=True):
    at: datetime
    dropped_lines: int


class AccessLog:
    def __init__(
        self,
        fd: int,
        most_waiting_bytes: int = _MOST_WAITING_BYTES,
        flush_bytes: int = _FLUSH_BYTES,
    ) -> None:
        """`fd` may block and is not closed; `write` and `flush` are for one thread."""
        self._fd = fd
        self._most_waiting_bytes = most_waiting_bytes
        self._flush_bytes = flush_bytes
        self._encode_into: Callable[[object, bytearray, int], None] = (
            msgspec.json.Encoder().encode_into
        )
        self._buffer = bytearray()
        self._handed_bytes = 0
        self._taken_bytes = 0
        """Written by the thread only."""
        self._dropped = 0
        self._unsaid = 0
        self._broken = False
        self._chunks: SimpleQueue[bytearray | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_chunks, name="access log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines so far."""
        return self._dropped

    def write(self, line: AccessLine | RefusalLine) -> None:
        buffer = self._buffer
        self._encode_into(line, buffer, -1)
        buffer += b"\n"
        if len(buffer) >= self._flush_bytes:
            self.flush()

    def refused(self, request_id: str, endpoint: str, status: int, error: str) -> None:
        self.write(RefusalLine(datetime.now(UTC), request_id, endpoint, status, error))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_PERIOD_S)
            self.flush()

    def flush(self) -> None:
        """Hands the lines to the thread. Does not block."""
        buffer = self._buffer
        if not buffer:
            return
        self._buffer = bytearray()
        if self._broken or self._handed_bytes - self._taken_bytes > self._most_waiting_bytes:
            if not self._dropped and not self._broken:
                _log.warning(
                    "access log: lines are dropped, as nobody reads them fast enough; this is said "
                    "once, and the log itself tells how many were dropped where"
                )
            lines = buffer.count(b"\n")
            self._dropped += lines
            self._unsaid += lines
            return
        if self._unsaid:
            buffer += msgspec.json.encode(_DroppedLine(datetime.now(UTC), self._unsaid)) + b"\n"
            self._unsaid = 0
        self._handed_bytes += len(buffer)
        self._chunks.put(buffer)

    def close(self, timeout_s: float = 2.0) -> None:
        """Waits until all is written, or for so long."""
        self.flush()
        self._chunks.put(None)
        self._thread.join(timeout_s)

    def _write_chunks(self) -> None:
        ended = False
        while not ended:
            # All at once: each write waits for the interpreter lock when it returns.
            chunks = [self._chunks.get()]
            while not self._chunks.empty():
                chunks.append(self._chunks.get())
            ended = chunks[-1] is None
            data = b"".join(chunk for chunk in chunks if chunk is not None)
            rest = memoryview(data)
            while rest and not self._broken:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except OSError as error:
                    self._broken = True
                    _log.error("access log: cannot be written, and ends: %s", error.strerror)
            self._taken_bytes += len(data)
