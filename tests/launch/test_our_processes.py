"""Real processes that hide in the ways Ray's and vLLM's do are still found and ended."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from expertmesh.launch.our_processes import MARKER_VARIABLE, end_processes, find_processes


@pytest.fixture
def marker() -> Iterator[str]:
    value = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield value
    end_processes(value, 0.0)


def start(marker: str, code: str, **more: object) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time\n{code}\nprint(flush=True)\ntime.sleep(60)"],
        env=os.environ | {MARKER_VARIABLE: marker},
        stdout=subprocess.PIPE,
        **more,  # type: ignore[arg-type]
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_a_process_with_the_marker_is_found_and_ended(marker: str) -> None:
    process = start(marker, "")
    assert [found.pid for found in find_processes(marker)] == [process.pid]
    assert end_processes(marker, 5.0) == 1
    process.wait(5)
    assert not psutil.pid_exists(process.pid)
    assert find_processes(marker) == []


def test_one_that_overwrote_its_environment_is_found_by_its_files(
    marker: str, tmp_path: Path
) -> None:
    folder = tmp_path / f"logs-{marker}"
    folder.mkdir()
    code = f"import os; f = open({str(folder / 'log')!r}, 'w')"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time\n{code}\nprint(flush=True)\ntime.sleep(60)"],
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert [found.pid for found in find_processes(marker)] == [process.pid]
    end_processes(marker, 0.0)
    process.wait(5)
    assert not psutil.pid_exists(process.pid)


def test_one_that_ignores_sigterm_is_killed(marker: str) -> None:
    process = start(marker, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    assert end_processes(marker, 0.5) == 1
    process.wait(5)
    assert not psutil.pid_exists(process.pid)


def test_a_daemon_that_left_its_parent_is_ended(marker: str) -> None:
    parent = start(
        marker,
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "start_new_session=True)",
    )
    parent.kill()
    parent.wait(5)
    assert len(find_processes(marker)) == 1
    assert end_processes(marker, 5.0) == 1
    assert find_processes(marker) == []


def test_other_processes_are_left_alone(marker: str) -> None:
    other = start("another-marker", "")
    try:
        assert end_processes(marker, 0.0) == 0
        assert psutil.Process(other.pid).is_running()
    finally:
        other.kill()
        other.wait(5)
