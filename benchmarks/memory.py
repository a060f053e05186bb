"""Memory and CPU that a system takes while it has nothing to do, by kind of process."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
from benchmarks.figures import Figure, Row, mebibytes
from benchmarks.process_watch import (
    COORDINATOR,
    ENGINE_CORE,
    OF_A_GROUP,
    OTHER,
    REPLICA,
    WORKER,
    ProcessWatch,
)

IDLE_S = 6.0


@dataclass(slots=True)
class Memory:
    processes: int = 0
    rss: int = 0
    pss: int = 0
    """Shared pages count in equal parts for all that share them: adds up to what is used."""
    uss: int = 0
    """What would be free if the process ended."""
    cpu_s: float = 0.0

    def add(self, other: "Memory") -> None:
        self.processes += other.processes
        self.rss += other.rss
        self.pss += other.pss
        self.uss += other.uss
        self.cpu_s += other.cpu_s


def measure_memory(watch: ProcessWatch) -> dict[str, Memory]:
    """By kind of process, in bytes; CPU seconds during `IDLE_S`."""
    before = watch.snapshot()
    time.sleep(IDLE_S)
    after = watch.snapshot()
    memory: dict[str, Memory] = {}
    for process in watch.alive():
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            first, last = before.get(process.pid), after.get(process.pid)
            kind = last.kind if last else OTHER
            cpu_s = last.cpu_s - first.cpu_s if first and last else 0.0
            memory.setdefault(kind, Memory()).add(Memory(1, info.rss, info.pss, info.uss, cpu_s))
    return memory


def memory_figure(memory: dict[str, Memory], ranks: int) -> Figure:
    rows = [_row(kind, seen) for kind, seen in sorted(memory.items(), key=lambda i: -i[1].pss)]
    rows.append(_row("whole system", _total(memory.values())))
    of_ranks = _total(memory[kind] for kind in OF_A_GROUP if kind in memory)
    per_rank = of_ranks.pss / ranks if ranks else 0
    own = _total(memory[kind] for kind in (REPLICA, ENGINE_CORE, WORKER) if kind in memory)
    coordinator = memory.get(COORDINATOR, Memory())
    return Figure(
        "Memory in MiB and CPU, one group ready and idle after load",
        ("process", "number", "RSS", "PSS", "USS", "CPU, % of a core"),
        tuple(rows),
        (
            f"PSS per rank: {mebibytes(own.pss / ranks if ranks else 0)} MiB, and "
            f"{mebibytes(per_rank)} MiB with its share of the coordinator "
            f"({mebibytes(coordinator.pss)} MiB a group).",
        ),
    )


def _row(kind: str, seen: Memory) -> Row:
    return (
        kind,
        str(seen.processes),
        mebibytes(seen.rss),
        mebibytes(seen.pss),
        mebibytes(seen.uss),
        f"{seen.cpu_s / IDLE_S:.1%}".rstrip("%"),
    )


def _total(parts: Iterable[Memory]) -> Memory:
    total = Memory()
    for part in parts:
        total.add(part)
    return total
