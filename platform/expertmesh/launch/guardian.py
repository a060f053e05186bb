"""A process that outlives a killed `expertmesh up` just long enough to end what it had started.

`python -m expertmesh.launch.guardian PID MARKER`: Ray's agents notice a dead raylet only after ten
seconds and more, and something may always escape the other ways in which processes share a fate.
"""

import os
import select
import sys

from expertmesh.launch.our_processes import end_processes


def guard(pid: int, marker: str) -> None:
    try:
        guarded = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    else:
        poll = select.poll()
        poll.register(guarded, select.POLLIN)
        poll.poll()
    end_processes(marker, grace_s=0.0)


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2])
