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
    if pid == os.getpid() or _is_watching():
        return
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        _die()
        return
    if _start_ticks(pid) != start_ticks:
        _die()
    threading.Thread(target=_wait_and_die, args=(owner,), name=_THREAD, daemon=True).start()


_THREAD = "expertmesh-owner-watch"


def _is_watching() -> bool:
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _wait_and_die(owner: int) -> None:
    poll = select.poll()
    poll.register(owner, select.POLLIN)
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
