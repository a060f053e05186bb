"""Processes that must not outlive another: an engine its rank, a service the local system.

vLLM's EngineCore, Worker and coordinator processes survive a killed parent and keep their memory.
Each process watches the one it belongs to through a pidfd, which costs nothing while that lives and
cannot be fooled by a reused pid, and kills itself when it is gone.
"""

import os
import select
import signal
import socket
import threading
from pathlib import Path

OWNER_VARIABLE = "EXPERTMESH_OWNER"
"""`<host>:<pid>:<start time in clock ticks>` of the process to share fate with."""


def own_children() -> None:
    """Processes that this one starts from now on, and theirs, may share its fate."""
    pid = os.getpid()
    os.environ[OWNER_VARIABLE] = f"{socket.gethostname()}:{pid}:{_start_ticks(pid)}"


def die_with_owner() -> None:
    """Ends this process when its owner ends. Does nothing without an owner on this host.

    Also a vLLM general plugin, so that it runs in every process of an engine.
    """
    host, _, rest = os.environ.get(OWNER_VARIABLE, "").partition(":")
    if not rest or host != socket.gethostname():
        return
    pid_text, _, start_ticks = rest.partition(":")
    pid = int(pid_text)
    if pid == os.getpid():
        return
    if _start_ticks(pid) != start_ticks:
        _die()
    die_with(pid)


def die_with_parent() -> None:
    """For a Ray worker. Ray looks only whether process 1 has adopted it, and misses a dead
    raylet where a session manager or a container's supervisor adopts orphans."""
    die_with(os.getppid())


def die_with(pid: int) -> None:
    name = f"expertmesh-fate-of-{pid}"
    if any(thread.name == name for thread in threading.enumerate()):
        return
    try:
        other = os.pidfd_open(pid)
    except ProcessLookupError:
        _die()
        return
    threading.Thread(target=_wait_and_die, args=(other,), name=name, daemon=True).start()


def _wait_and_die(other: int) -> None:
    poll = select.poll()
    poll.register(other, select.POLLIN)
    poll.poll()
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _start_ticks(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat, counted from the bracket that ends the second one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ""
    return stat.rpartition(")")[2].split()[19]
