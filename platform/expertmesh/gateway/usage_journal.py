"""What answered requests used, on disk before the ledger has it: a killed worker loses nothing.

Segments are files mapped into memory. Adding a record copies its bytes there, without a system
call; the kernel keeps them when the process dies. What dies with the whole machine is what the
kernel had not written back yet.

Format, in the byte order of the machine: 16 bytes of header (the Unix time at which the worker was
last alive, as a float, twice), then records, each at a multiple of 8 bytes:

    length (31 bits) and kind (1 bit), crc32 of that and the payload | tokens seen, twice | payload

The first word is stored last and in one piece, so a record is whole or is not there. A word of
zero is the end.
"""

import errno
import fcntl
import logging
import mmap
import os
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from math import isfinite
from pathlib import Path
from zlib import crc32

import msgspec

from expertmesh.core.metering.usage import Outcome
from expertmesh.errors import SetupError

_log = logging.getLogger(__name__)

SEGMENT_BYTES = 4 * 1024 * 1024
_HEADER_BYTES = 16
_RECORD_BYTES = 16
"""Of a record without its payload."""
_OPENED = 1 << 31
_LENGTH = _OPENED - 1
_MOST_PAYLOAD_BYTES = 64 * 1024
_HALF = 0xFFFFFFFF
_TWICE = (1 << 32) + 1
"""A number below 2**32 times this is the number in both halves of a word: damage shows."""
_ALIVE = struct.Struct("=dd")
_PREFIX = "worker-"
_SUFFIX = ".usage1"
"""With the version of the format."""


class Opened(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A request whose answer has begun: all that a bill needs if its end is never seen."""

    request_id: str
    at_s: float
    """Unix time at which the request was accepted."""
    tenant: str
    key_id: str
    model: str
    group: str
    pool: str
    endpoint: str
    prompt_tokens: int
    """Estimated."""
    queue_s: float
    ttft_s: float | None
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float


class Closed(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What a request used, with the tariff's prices: a row of the ledger that is not priced yet."""

    request_id: str
    at_s: float
    tenant: str
    key_id: str
    model: str
    group: str
    pool: str
    endpoint: str
    outcome: Outcome
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    ttft_s: float | None
    duration_s: float
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float


_encode = msgspec.msgpack.Encoder().encode
_decode_opened = msgspec.msgpack.Decoder(Opened).decode
_decode_closed = msgspec.msgpack.Decoder(Closed).decode


class OpenCall:
    """The place of an `Opened` record, which counts the completion tokens seen."""

    __slots__ = ("_index", "_segment", "_words")

    def __init__(self, segment: "_Segment | None", words: memoryview, index: int) -> None:
        self._segment = segment
        self._words = words
        self._index = index

    def progress(self, tokens: int) -> None:
        """`tokens` of the completion have been seen so far; below 2**32."""
        self._words[self._index] = tokens * _TWICE


@dataclass(frozen=True, slots=True)
class Batch:
    """Records for the ledger, and how far in the journal they reach."""

    records: list[Closed]
    segments: int
    """Segments that end in it."""
    end: int
    """Offset in the segment after those."""

    def __bool__(self) -> bool:
        return bool(self.records) or self.segments > 0


class _Segment:
    """`path` is None for one in memory only."""

    __slots__ = ("buffer", "end", "open_calls", "path", "words")

    def __init__(self, path: Path | None, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.words = memoryview(buffer).cast("Q")
        self.end = _HEADER_BYTES
        """Of its records; known once another segment follows."""
        self.open_calls: set[OpenCall] = set()

    def discard(self) -> None:
        self.words.release()
        self.buffer.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class UsageJournal:
    """Of one worker process, used by one thread; `maintain` may run in another.

    Fork before opening, not after.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: str = "",
        segment_bytes: int = SEGMENT_BYTES,
        most_segments: int = 64,
        most_memory_segments: int = 16,
    ) -> None:
        """`root` holds one folder for each worker, with `name` in its own; None keeps everything
        in memory.

        Raises SetupError when nothing can be kept in `root`.
        """
        self.root = root
        self._segment_bytes = segment_bytes
        self._most_segments = most_segments
        self._most_memory_segments = most_memory_segments
        self._numbers = count(1)
        self._folder: Path | None = None
        self._lock_fd = -1
        self._failed = False
        self._full = False
        self._spare: _Segment | None = None
        self._freed: deque[_Segment] = deque()
        self._maintaining = threading.Lock()
        self._closed = False
        self._alive_at_s = 0.0
        self._nowhere = memoryview(bytearray(8)).cast("Q")
        self._end = _HEADER_BYTES
        """Of the records in the newest segment."""
        self._pending = 0
        self._read_to = _HEADER_BYTES
        """In the oldest segment; the ledger has what lies before."""
        if root is not None:
            try:
                self._folder, self._lock_fd = _make_folder(root, name)
                first = self._new_file()
            except OSError as error:
                self._drop_folder()
                raise SetupError(
                    f"{root}: the usage journal cannot be kept there: {_reason(error)}; make "
                    f"{segment_bytes} bytes free there, or name a folder that this user may write"
                ) from error
        else:
            first = self._new_memory()
        self._segments = deque([first])
        self._start(first)

    @classmethod
    def open(cls, root: Path, name: str) -> "UsageJournal":
        return cls(root, name)

    @property
    def folder(self) -> Path | None:
        return self._folder

    @property
    def pending(self) -> int:
        """Closed records that the ledger does not have."""
        return self._pending

    @property
    def size_bytes(self) -> int:
        return len(self._segments) * self._segment_bytes

    def open_call(self, opened: Opened) -> OpenCall:
        """Call it before the first byte of a stream goes to the client, then close it once."""
        payload = _encode(opened)
        start = self._append(payload, len(payload) | _OPENED)
        if start < 0:
            return OpenCall(None, self._nowhere, 0)
        segment = self._segments[-1]
        call = OpenCall(segment, self._words, (start >> 3) + 1)
        segment.open_calls.add(call)
        return call

    def close_call(self, closed: Closed, call: OpenCall | None = None) -> bool:
        """Call it before the last byte of an answer goes out. False when there is no room left."""
        payload = _encode(closed)
        kept = self._append(payload, len(payload)) >= 0
        if kept:
            self._pending += 1
        if call is not None:
            segment = call._segment
            if segment is not None:
                segment.open_calls.discard(call)
                call._segment = None
                call._words = self._nowhere
                call._index = 0
        return kept

    def alive(self, unix_s: float) -> None:
        """Notes the time; calls that are open when the worker is killed count as ended then."""
        self._alive_at_s = unix_s
        _ALIVE.pack_into(self._buffer, 0, unix_s, unix_s)

    def unwritten(self, most: int) -> Batch:
        """The oldest records; the same ones again until `written` is called."""
        records: list[Closed] = []
        start = self._read_to
        current = self._segments[-1]
        for passed, segment in enumerate(self._segments):
            end = self._end if segment is current else segment.end
            for record_start, flagged, payload, next_start in _records(
                segment.buffer, segment.words, start, end, segment.path
            ):
                start = next_start
                if not flagged & _OPENED:
                    closed = _read_closed(payload, segment.path, record_start)
                    if closed is not None:
                        records.append(closed)
                        if len(records) == most:
                            return Batch(records, passed, start)
            if segment is current:
                return Batch(records, passed, end)
            start = _HEADER_BYTES
        raise AssertionError("the current segment is always the last")

    def written(self, batch: Batch) -> None:
        """The ledger has the batch; what is still open in its segments moves to the newest one."""
        for _ in range(batch.segments):
            segment = self._segments.popleft()
            for call in segment.open_calls:
                self._carry(segment, call)
            segment.open_calls.clear()
            self._freed.append(segment)
        self._read_to = batch.end
        self._pending -= len(batch.records)

    def maintain(self) -> None:
        """Deletes freed segments and makes the next one ready; takes a millisecond or so."""
        with self._maintaining:
            while self._freed:
                segment = self._freed.popleft()
                with _said(segment.path):
                    segment.discard()
            self._full = False
            grows = self._folder is not None and self._may_grow()
            if grows and self._spare is None and not self._closed:
                with suppress(OSError):
                    self._spare = self._new_file()

    def close(self) -> list[Closed]:
        """What stays unwritten and lies in no file. The next worker finds what lies in files."""
        lost: list[Closed] = []
        is_open = any(segment.open_calls for segment in self._segments)
        start = self._read_to
        for segment in self._segments:
            end = self._end if segment is self._segments[-1] else segment.end
            if segment.path is None:
                for at, flagged, payload, _ in _records(
                    segment.buffer, segment.words, start, end, None
                ):
                    closed = None if flagged & _OPENED else _read_closed(payload, None, at)
                    if closed is not None:
                        lost.append(closed)
            start = _HEADER_BYTES
        left = self._folder is not None and (is_open or self._pending > len(lost))
        self._closed = True
        self.maintain()
        for segment in (*self._segments, *([self._spare] if self._spare else ())):
            for call in segment.open_calls:
                call._segment, call._words, call._index = None, self._nowhere, 0
            segment.open_calls.clear()
            if left:
                segment.words.release()
                segment.buffer.close()
            else:
                with _said(segment.path):
                    segment.discard()
        self._spare = None
        if left:
            _unlock(self._lock_fd)
        else:
            self._drop_folder()
        return lost

    def _append(self, payload: bytes, flagged: int) -> int:
        """Where the record starts; -1 when there is no room for it."""
        size = len(payload)
        if size > _MOST_PAYLOAD_BYTES:
            return -1
        start = self._end
        end = start + _RECORD_BYTES + (size + 7 & -8)
        if end > self._segment_bytes:
            if not self._rotate():
                return -1
            end = end - start + _HEADER_BYTES
            start = _HEADER_BYTES
        self._buffer[start + _RECORD_BYTES : start + _RECORD_BYTES + size] = payload
        self._words[start >> 3] = flagged | crc32(payload, flagged) << 32
        self._end = end
        return start

    def _rotate(self) -> bool:
        if self._full:
            return False
        following = self._next()
        if following is None:
            self._full = True
            return False
        self._segments[-1].end = self._end
        self._segments.append(following)
        self._start(following)
        return True

    def _start(self, segment: _Segment) -> None:
        self._buffer = segment.buffer
        self._words = segment.words
        self._end = _HEADER_BYTES
        _ALIVE.pack_into(self._buffer, 0, self._alive_at_s, self._alive_at_s)

    def _next(self) -> _Segment | None:
        spare, self._spare = self._spare, None
        if spare is not None:
            return spare
        if self._folder is not None:
            if not self._may_grow():
                return None
            try:
                segment = self._new_file()
            except OSError as error:
                if not self._failed:
                    _log.error(
                        "usage: %s: the journal cannot grow (%s); records stay in memory, and a "
                        "crash would lose them",
                        self._folder,
                        _reason(error),
                    )
                self._failed = True
            else:
                if self._failed:
                    _log.info("usage: %s: the journal grows again", self._folder)
                self._failed = False
                return segment
        in_memory = sum(1 for segment in self._segments if segment.path is None)
        return self._new_memory() if in_memory < self._most_memory_segments else None

    def _may_grow(self) -> bool:
        return len(self._segments) < self._most_segments

    def _new_memory(self) -> _Segment:
        return _Segment(None, mmap.mmap(-1, self._segment_bytes))

    def _new_file(self) -> _Segment:
        assert self._folder is not None
        path = self._folder / f"{next(self._numbers):08d}{_SUFFIX}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Without its blocks a full disk would show as a signal, when the memory is written.
            os.posix_fallocate(file, 0, self._segment_bytes)
            return _Segment(path, mmap.mmap(file, self._segment_bytes))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)

    def _carry(self, segment: _Segment, call: OpenCall) -> None:
        start = (call._index - 1) << 3
        flagged = segment.words[start >> 3] & _HALF
        payload_start = start + _RECORD_BYTES
        payload = segment.buffer[payload_start : payload_start + (flagged & _LENGTH)]
        seen = segment.words[call._index]
        start = self._append(payload, flagged)
        if start < 0:
            call._segment, call._words, call._index = None, self._nowhere, 0
            return
        call._segment = self._segments[-1]
        call._words = self._words
        call._index = (start >> 3) + 1
        call._words[call._index] = seen
        call._segment.open_calls.add(call)

    def _drop_folder(self) -> None:
        if self._folder is not None:
            with _said(self._folder):
                _delete(self._folder)
        _unlock(self._lock_fd)


class LeftJournal:
    """The folder of a worker that was killed, now held by this process."""

    def __init__(self, folder: Path, lock_fd: int) -> None:
        self.folder = folder
        self._lock_fd = lock_fd

    def batches(self, most: int) -> Iterator[list[Closed]]:
        """All that the worker had closed, then what it had open, as far as it had seen it.

        Some of it may be in the ledger already. Raises OSError when a file cannot be read.
        """
        batch: list[Closed] = []
        opened: dict[str, tuple[Opened, int]] = {}
        alive_at_s = 0.0
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            content = path.read_bytes()
            alive_at_s = max(alive_at_s, _alive_at_s(content))
            words = memoryview(content)[: len(content) & -8].cast("Q")
            end = len(content)
            for start, flagged, payload, _ in _records(content, words, _HEADER_BYTES, end, path):
                if flagged & _OPENED:
                    call = _read_opened(payload, path, start)
                    if call is not None:
                        tokens = _tokens(words[(start >> 3) + 1], path, start)
                        known = opened.get(call.request_id)
                        # A record that was carried over is there twice for a moment.
                        if known is not None:
                            tokens = max(tokens, known[1])
                        opened[call.request_id] = (call, tokens)
                    continue
                closed = _read_closed(payload, path, start)
                if closed is not None:
                    opened.pop(closed.request_id, None)
                    alive_at_s = max(alive_at_s, closed.at_s + closed.duration_s)
                    batch.append(closed)
                    if len(batch) >= most:
                        yield batch
                        batch = []
        batch += [_broken_off(call, tokens, alive_at_s) for call, tokens in opened.values()]
        for start in range(0, len(batch), most):
            yield batch[start : start + most]

    def delete(self) -> None:
        """The ledger has everything."""
        with _said(self.folder):
            _delete(self.folder)
        _unlock(self._lock_fd)

    def release(self) -> None:
        """Leave it to another worker."""
        _unlock(self._lock_fd)


def left_journals(root: Path) -> list[LeftJournal]:
    """Journals without a living worker. They are held until they are deleted or released."""
    found = []
    with _held(root):
        for folder in sorted(root.glob(f"{_PREFIX}*")):
            try:
                lock_fd = _try_lock(folder)
            except OSError as error:
                _log.error("usage: %s: cannot be looked at: %s", folder, _reason(error))
                continue
            if lock_fd is not None:
                found.append(LeftJournal(folder, lock_fd))
    return found


def _broken_off(call: Opened, tokens: int, alive_at_s: float) -> Closed:
    return Closed(
        request_id=call.request_id,
        at_s=call.at_s,
        tenant=call.tenant,
        key_id=call.key_id,
        model=call.model,
        group=call.group,
        pool=call.pool,
        endpoint=call.endpoint,
        outcome=Outcome.ERROR,
        prompt_tokens=call.prompt_tokens,
        cached_tokens=0,
        completion_tokens=tokens,
        queue_s=call.queue_s,
        ttft_s=call.ttft_s,
        duration_s=max(call.queue_s, call.ttft_s or 0.0, alive_at_s - call.at_s),
        usd_per_mtok_in=call.usd_per_mtok_in,
        usd_per_mtok_cached=call.usd_per_mtok_cached,
        usd_per_mtok_out=call.usd_per_mtok_out,
    )


def _records(
    buffer: mmap.mmap | bytes, words: memoryview, start: int, end: int, path: Path | None
) -> Iterator[tuple[int, int, bytes, int]]:
    """Start, length with kind, payload and end of each record from `start` to `end`.

    Where a record is damaged, what follows it is looked for. One line in the log says where.
    """
    damaged_at = -1
    while start + _RECORD_BYTES <= end:
        word: int = words[start >> 3]
        if word == 0 and damaged_at < 0:
            if not _is_empty(buffer, start, end):
                damaged_at = start
                continue
            return
        flagged = word & _HALF
        size = flagged & _LENGTH
        payload_end = start + _RECORD_BYTES + size
        if 0 < size <= _MOST_PAYLOAD_BYTES and payload_end <= end:
            payload = bytes(buffer[start + _RECORD_BYTES : payload_end])
            if crc32(payload, flagged) == word >> 32:
                if damaged_at >= 0:
                    _say_damage(path, damaged_at, start)
                    damaged_at = -1
                following = payload_end + 7 & -8
                yield start, flagged, payload, following
                start = following
                continue
        if damaged_at < 0:
            damaged_at = start
        start += 8
    if damaged_at >= 0:
        _say_damage(path, damaged_at, end)


def _is_empty(buffer: mmap.mmap | bytes, start: int, end: int) -> bool:
    for at in range(start, end, 65536):
        part = buffer[at : min(at + 65536, end)]
        if part.count(0) != len(part):
            return False
    return True


def _say_damage(path: Path | None, start: int, end: int) -> None:
    _log.error(
        "usage: %s: the bytes from %d to %d are damaged, or of a record that was never whole; "
        "they are left out",
        path or "journal in memory",
        start,
        end,
    )


def _read_opened(payload: bytes, path: Path, start: int) -> Opened | None:
    try:
        return _decode_opened(payload)
    except msgspec.MsgspecError as error:
        _log.error("usage: %s: the record at %d cannot be read: %s", path, start, error)
        return None


def _read_closed(payload: bytes, path: Path | None, start: int) -> Closed | None:
    try:
        return _decode_closed(payload)
    except msgspec.MsgspecError as error:
        _log.error("usage: %s: the record at %d cannot be read: %s", path, start, error)
        return None


def _tokens(word: int, path: Path, start: int) -> int:
    low, high = word & _HALF, word >> 32
    if low != high:
        _log.error("usage: %s: the token count of the record at %d is damaged", path, start)
    return min(low, high)


def _alive_at_s(content: bytes) -> float:
    if len(content) < _HEADER_BYTES:
        return 0.0
    first, second = _ALIVE.unpack_from(content)
    return first if first == second and isfinite(first) else 0.0


def _make_folder(root: Path, name: str) -> tuple[Path, int]:
    root.mkdir(parents=True, exist_ok=True)
    with _held(root):
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=root))
        lock_fd = _try_lock(folder)
    assert lock_fd is not None, "nobody else can hold a folder that is new"
    return folder, lock_fd


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """Nobody else makes a folder or looks for one without an owner."""
    file = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _try_lock(folder: Path) -> int | None:
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return file


def _unlock(lock_fd: int) -> None:
    if lock_fd >= 0:
        os.close(lock_fd)


def _delete(folder: Path) -> None:
    """The lock goes last: half a folder is still one that somebody holds."""
    lock = folder / "lock"
    for path in sorted(folder.iterdir()):
        if path != lock:
            path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def _said(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.error("usage: %s: cannot be deleted: %s", path, _reason(error))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
