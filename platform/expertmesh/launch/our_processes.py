"""Find and end every process of one local system, however it came to be.

Nothing of a process is proof against all that Ray and vLLM do: daemons leave the process tree, and
a process that sets its title overwrites its environment. So a process is ours when it still carries
the marker in its environment, or holds a file below a folder with the marker in its name, as all
processes of a Ray node do with their logs.
"""

import contextlib
import os
import time
from pathlib import Path

import psutil

MARKER_VARIABLE = "EXPERTMESH_SYSTEM"


def find_processes(marker: str) -> list[psutil.Process]:
    """All running processes that carry the marker, but for this one and its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [
        process
        for process in psutil.process_iter()
        if process.pid not in spared and _is_ours(process, marker)
    ]


def _is_ours(process: psutil.Process, marker: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(MARKER_VARIABLE) == marker:
            return True
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if marker in os.readlink(file):
                    return True
    return False


def end_processes(marker: str, grace_s: float) -> int:
    """Terminates, then kills; returns how many there were. New ones that they start end as well."""
    ended: set[int] = set()
    kill_from_s = time.monotonic() + grace_s
    deadline_s = kill_from_s + 30
    while time.monotonic() < deadline_s:
        processes = find_processes(marker)
        if not processes:
            break
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() >= kill_from_s:
                    process.kill()
                elif process.pid not in ended:
                    process.terminate()
                ended.add(process.pid)
        psutil.wait_procs(processes, timeout=0.2)
    return len(ended)
