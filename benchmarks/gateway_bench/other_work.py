"""How much of the machine went to processes that have no part in the measurement."""

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Self

import psutil


@dataclass(frozen=True, slots=True)
class OtherWork:
    at_s: float
    busy_s: float
    own_s: float

    @classmethod
    def begin(cls) -> Self:
        times = psutil.cpu_times()
        # What the kernel does between processes belongs to nobody, and mostly to this load.
        busy_s = times.user + times.nice + times.system
        return cls(time.monotonic(), busy_s, _own_s())

    def until_now(self) -> str:
        now = type(self).begin()
        spent_s = max(0.0, (now.busy_s - self.busy_s) - (now.own_s - self.own_s))
        share = spent_s / (now.at_s - self.at_s) / (os.cpu_count() or 1)
        return f"other processes took {share:.0%} of the cores meanwhile"


def _own_s() -> float:
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
