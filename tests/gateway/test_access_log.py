import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from expertmesh.gateway.access_log import AccessLine, AccessLog

AT = datetime(2026, 5, 4, 3, 2, 1, 500000, UTC)


def line(number: int, error: str = "") -> AccessLine:
    return AccessLine(
        at=AT,
        request_id=f"client_{number}",
        usage_id=f"req_{number}",
        tenant="team-a",
        key_id="key_0",
        endpoint="chat_completions",
        model="m",
        stream=True,
        status=200,
        outcome="ok",
        group="g",
        rank=1,
        failed_attempts=0,
        prompt_tokens=5,
        cached_tokens=2,
        completion_tokens=7,
        queue_s=0.0,
        ttft_s=None,
        duration_s=1.25,
        error=error,
    )


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Where to read and where to write."""
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        with contextlib.suppress(OSError):
            os.close(fd)


def all_of(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_one_line_for_each_request_with_all_its_fields(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    log = AccessLog(write_fd)
    log.write(line(1, error='said "no"\nand more'))
    log.refused("client_2", "messages", 401, "no key")
    log.close(5.0)
    os.close(write_fd)
    first, second = [json.loads(text) for text in all_of(read_fd).splitlines()]
    assert first == {
        "at": "2026-05-04T03:02:01.500000Z",
        "request_id": "client_1",
        "usage_id": "req_1",
        "tenant": "team-a",
        "key_id": "key_0",
        "endpoint": "chat_completions",
        "model": "m",
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "group": "g",
        "rank": 1,
        "failed_attempts": 0,
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 7,
        "queue_s": 0.0,
        "ttft_s": None,
        "duration_s": 1.25,
        "error": 'said "no"\nand more',
        "trace_id": "",
    }
    assert datetime.fromisoformat(second.pop("at")).tzinfo is not None
    assert second == {
        "request_id": "client_2",
        "endpoint": "messages",
        "status": 401,
        "error": "no key",
    }


def test_lines_wait_for_a_flush_or_for_enough_of_them(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    os.set_blocking(read_fd, False)
    log = AccessLog(write_fd, flush_bytes=2000)
    log.write(line(1))
    with pytest.raises(BlockingIOError):
        os.read(read_fd, 1)
    log.flush()
    assert wait_for(read_fd).count(b"\n") == 1
    for number in range(10):
        log.write(line(number))
    assert wait_for(read_fd).count(b"\n") >= 4
    log.close(5.0)


def wait_for(fd: int) -> bytes:
    deadline_s = time.monotonic() + 5
    while True:
        try:
            return os.read(fd, 1 << 20)
        except BlockingIOError:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)


def test_a_reader_that_reads_nothing_costs_lines_and_never_time(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    read_fd, write_fd = pipe
    log = AccessLog(write_fd, most_waiting_bytes=100_000, flush_bytes=10_000)
    written = 5000
    slowest_s = 0.0
    for number in range(written):
        started_s = time.perf_counter()
        log.write(line(number))
        slowest_s = max(slowest_s, time.perf_counter() - started_s)
    assert slowest_s < 1.0  # it would be for ever
    assert log.dropped > 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    # The reader is back: the log says what is missing.
    os.set_blocking(read_fd, False)
    got = b""
    deadline_s = time.monotonic() + 10
    log.write(line(written))
    while b"dropped_lines" not in got:
        assert time.monotonic() < deadline_s
        log.flush()
        log.write(line(written + 1))
        try:
            got += os.read(read_fd, 1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
    os.set_blocking(read_fd, True)

    def close() -> None:
        log.close(5.0)
        os.close(write_fd)

    closing = threading.Thread(target=close)
    closing.start()
    got += all_of(read_fd)
    closing.join()
    lines = [json.loads(text) for text in got.splitlines()]
    said = sum(entry.get("dropped_lines", 0) for entry in lines)
    numbers = [int(entry["usage_id"][4:]) for entry in lines if "usage_id" in entry]
    assert said == log.dropped
    assert len({n for n in numbers if n < written}) + said >= written
    assert numbers == sorted(numbers)


def test_a_broken_output_is_said_once_and_stops_nothing(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    read_fd, write_fd = pipe
    os.close(read_fd)
    log = AccessLog(write_fd)
    log.write(line(1))
    log.flush()
    deadline_s = time.monotonic() + 5
    while not caplog.records:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    for number in range(1000):
        log.write(line(number))
        log.flush()
    assert log.dropped == 1001
    log.close(5.0)
    assert caplog.messages == ["access log: cannot be written, and ends: Broken pipe"]


def test_close_does_not_wait_for_ever(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    log = AccessLog(write_fd)
    for number in range(1000):
        log.write(line(number))
    started_s = time.monotonic()
    log.close(0.05)
    assert time.monotonic() - started_s < 2.0
    lines = os.read(read_fd, 1 << 20).splitlines()
    assert 0 < len(lines) < 1000
    assert all(json.loads(text)["status"] == 200 for text in lines), "none is cut"
