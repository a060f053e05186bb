"""Real processes that call themselves as an engine's do."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from expertmesh.serving.engine_processes import EngineProcesses

_NAMED = "import setproctitle, sys; setproctitle.setproctitle(sys.argv[1]); print(); input()"
_Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[_Start]:
    started: list[subprocess.Popen[bytes]] = []

    def one(name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _NAMED, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_process_is_told_with_its_name_and_stays_told(start: _Start) -> None:
    engine, other = start("VLLM::EngineCore_DP0"), start("VLLM::Worker_TP1")
    watched = EngineProcesses()
    watched.watch()
    assert watched.ended() == ()
    engine.kill()
    engine.wait(10)
    (told,) = watched.ended()
    assert told.startswith("VLLM::EngineCo") and str(engine.pid) in told
    other.kill()
    other.wait(10)
    assert len(watched.ended()) == 2
    assert watched.ended()[0] == told


def test_a_process_that_nobody_has_reaped_has_ended(start: _Start) -> None:
    engine = start("VLLM::EngineCore")
    watched = EngineProcesses()
    watched.watch()
    engine.kill()
    deadline_s = time.monotonic() + 10
    while psutil.Process(engine.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
    assert len(watched.ended()) == 1


def test_other_processes_may_end(start: _Start) -> None:
    helper = start("python -m resource_tracker")
    watched = EngineProcesses()
    watched.watch()
    helper.kill()
    helper.wait(10)
    assert watched.ended() == ()


def test_an_engine_without_processes_of_its_own_has_none_that_ended() -> None:
    watched = EngineProcesses()
    watched.watch()
    assert watched.ended() == ()
