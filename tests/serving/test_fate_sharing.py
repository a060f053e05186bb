"""A process dies with the one it belongs to, by whatever signal that ended."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

OWNER = """
import subprocess, sys, time
from expertmesh.serving.fate_sharing import own_children
own_children()
child = subprocess.Popen([sys.executable, "-c", '''
import sys, time
from expertmesh.serving.fate_sharing import die_with_owner
die_with_owner()
die_with_owner()
print("watching", flush=True)
time.sleep(60)
'''], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def owner_and_child() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        lines = {owner.stdout.readline().strip(), owner.stdout.readline().strip()}
        assert "watching" in lines
        (child,) = lines - {"watching"}
        try:
            yield owner, psutil.Process(int(child))
        finally:
            owner.kill()


def run_with_owner(owner: str) -> int:
    code = "from expertmesh.serving import fate_sharing as f; f.die_with_owner()"
    environment = os.environ | {"EXPERTMESH_OWNER": owner}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=10).returncode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_dies_with_its_owner(number: signal.Signals) -> None:
    with owner_and_child() as (owner, child):
        assert child.is_running()
        owner.send_signal(number)
        owner.wait(30)
        child.wait(30)


def test_the_owner_outlives_its_child() -> None:
    with owner_and_child() as (owner, child):
        child.kill()
        with contextlib.suppress(psutil.TimeoutExpired):
            child.wait(1)
        assert owner.poll() is None


def test_one_whose_owner_is_gone_already_dies_at_once() -> None:
    with owner_and_child() as (owner, child):
        variable = child.environ()["EXPERTMESH_OWNER"]
        owner.kill()
        owner.wait(30)
        child.wait(30)
    assert run_with_owner(variable) == -signal.SIGKILL


def test_a_child_dies_with_its_parent() -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; "
    "from expertmesh.serving.fate_sharing import die_with_parent; die_with_parent(); "
    "print('watching', flush=True); time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (child,) = lines - {"watching"}
        parent.kill()
        psutil.Process(int(child)).wait(5)


@pytest.mark.parametrize("owner", ["", "another-host:1:0"])
def test_without_an_owner_on_this_host_nothing_happens(owner: str) -> None:
    assert run_with_owner(owner) == 0
