"""One JSON object per request; never a prompt, a completion or a key.

Lines gather in memory and go out in whole lines that the other end takes at once: a slow reader
of standard output blocks nothing. What it leaves unread beyond a bound is dropped and counted.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

_log = logging.getLogger(__name__)

_FLUSH_PERIOD_S = 0.2
_FLUSH_BYTES = 64 * 1024
_ATOMIC_BYTES = 4096
"""A pipe takes so much whole or not at all (PIPE_BUF), so lines of several workers do not mix."""
_MOST_ERROR_CHARACTERS = 500
_MOST_PATH_CHARACTERS = 200
_SECRET = re.compile(r"sk-em-[^/]*")
_CLOSE_PAUSE_S = 0.01
_MOST_WAITING_BYTES = 8 * 1024 * 1024


class RefusalLine(msgspec.Struct, gc=False, frozen=True):
    """Of a request that was refused before its model was known."""

    at: datetime
    request_id: str
    endpoint: str
    status: int
    error: str


class AdminLine(msgspec.Struct, gc=False, frozen=True):
    """Of a request to the admin API; the audit log says what it changed."""

    at: datetime
    request_id: str
    tenant: str
    key_id: str
    endpoint: str
    method: str
    path: str
    status: int
    duration_s: float


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
        """`fd` is not closed, and whether it blocks stays as it is: others write to it as well."""
        self._fd = _without_blocking(fd)
        self._most_waiting_bytes = most_waiting_bytes
        self._flush_bytes = flush_bytes
        self._encode_into: Callable[[object, bytearray, int], None] = (
            msgspec.json.Encoder().encode_into
        )
        self._buffer = bytearray()
        self._full_at = flush_bytes
        """Size of the buffer at which it is worth to try again."""
        self._dropped = 0
        self._unsaid = 0
        self._broken = False

    @property
    def dropped(self) -> int:
        """Lines so far."""
        return self._dropped

    def write(self, line: AccessLine | AdminLine | RefusalLine) -> None:
        buffer = self._buffer
        self._encode_into(line, buffer, -1)
        buffer += b"\n"
        if len(buffer) >= self._full_at:
            self.flush()

    def refused(self, request_id: str, endpoint: str, status: int, error: str) -> None:
        error = error[:_MOST_ERROR_CHARACTERS]
        self.write(RefusalLine(datetime.now(UTC), request_id, endpoint, status, error))

    def administered(
        self,
        request_id: str,
        tenant: str,
        key_id: str,
        method: str,
        path: str,
        status: int,
        duration_s: float,
    ) -> None:
        # Somebody may ask for a key by its secret instead of its id.
        shown = _SECRET.sub("…", path)[:_MOST_PATH_CHARACTERS]
        at = datetime.now(UTC)
        self.write(
            AdminLine(at, request_id, tenant, key_id, "admin", method, shown, status, duration_s)
        )

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_PERIOD_S)
            self.flush()

    def flush(self) -> None:
        """Writes as much as is taken at once; the rest waits, within bounds."""
        self._write_some()
        if self._broken or len(self._buffer) > self._most_waiting_bytes:
            self._drop()
        self._full_at = len(self._buffer) + self._flush_bytes

    def close(self, timeout_s: float = 2.0) -> None:
        """Waits until all is written, or for so long."""
        until_s = time.monotonic() + timeout_s
        self._write_some()
        while self._buffer and not self._broken and time.monotonic() < until_s:
            time.sleep(_CLOSE_PAUSE_S)
            self._write_some()
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._broken = True

    def _write_some(self) -> None:
        buffer = self._buffer
        if not buffer or self._broken:
            return
        written = 0
        try:
            with memoryview(buffer) as view:
                while written < len(buffer):
                    end = buffer.rfind(b"\n", written, written + _ATOMIC_BYTES) + 1
                    if not end:  # one long line
                        end = buffer.index(b"\n", written) + 1
                    written += os.write(self._fd, view[written:end])
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken = True
            _log.error("access log: cannot be written, and ends: %s", error.strerror)
        del buffer[:written]
        if self._unsaid and not buffer and not self._broken:
            # First of what comes next, and so never among what is dropped.
            buffer += msgspec.json.encode(_DroppedLine(datetime.now(UTC), self._unsaid)) + b"\n"
            self._unsaid = 0

    def _drop(self) -> None:
        """What nobody reads; the first line may be partly written, and stays."""
        if not self._dropped and not self._broken:
            _log.warning(
                "access log: lines are dropped, as nobody reads them fast enough; this is said "
                "once, and the log itself tells how many were dropped where"
            )
        keep = 0 if self._broken else self._buffer.find(b"\n") + 1
        lines = self._buffer.count(b"\n", keep)
        del self._buffer[keep:]
        self._dropped += lines
        self._unsaid += lines


def _without_blocking(fd: int) -> int:
    """A description of the same file of our own, where the kernel gives one: not of sockets."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError:
        return os.dup(fd)
