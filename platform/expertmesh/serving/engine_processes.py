"""The processes of a rank's engine, watched from outside of vLLM.

vLLM marks an engine as dead in a thread that first ends what is left of it, and a client that is
never asked may not hear of it. A pidfd says at once, and of each process, that it has ended.
"""

import logging
import os
import select

import psutil

_log = logging.getLogger(__name__)

_NAME = "VLLM::"
"""Every process of an engine calls itself so; those of another host are its executor's to watch."""


class EngineProcesses:
    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        """By pidfd."""
        self._ended: dict[str, None] = {}

    def watch(self) -> None:
        """Those that run now, below this process."""
        for child in psutil.Process().children(recursive=True):
            try:
                name = child.name()
                if name.startswith(_NAME):
                    self._names[os.pidfd_open(child.pid)] = f"{name} ({child.pid})"
            except (psutil.Error, ProcessLookupError):
                continue
            except OSError as error:
                # vLLM's own watch is left.
                _log.warning("cannot watch the engine's process %d: %s", child.pid, error)

    def ended(self) -> tuple[str, ...]:
        """Names with pids, of all that have ended since they are watched."""
        if self._names:
            poll = select.poll()
            for pidfd in self._names:
                poll.register(pidfd, select.POLLIN)
            for pidfd, _ in poll.poll(0):
                self._ended[self._names.pop(pidfd)] = None
                os.close(pidfd)
        return tuple(self._ended)
