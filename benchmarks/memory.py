"""Memory of a running system by kind of process."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
from benchmarks.figures import Figure, Row, mebibytes
from benchmarks.process_watch import (
    COORDINATOR,
    ENGINE_CORE,
    OF_A_GROUP,
    REPLICA,
    WORKER,
    ProcessWatch,
)


@dataclass(slots=True)
class Memory:
    processes: int = 0
    rss: int = 0
    pss: int = 0
    """Shared pages count in equal parts for all that share them: adds up to what is used."""
    uss: int = 0
    """What would be free if the process ended."""

    def add(self, other: "Memory") -> None:
        self.processes += other.processes
        self.rss += other.rss
        self.pss += other.pss
        self.uss += other.uss


def measure_memory(watch: ProcessWatch) -> dict[str, Memory]:
    """By kind of process, in bytes."""
    kinds = {pid: seen.kind for pid, seen in watch.snapshot().items()}
    memory: dict[str, Memory] = {}
    for process in watch.alive():
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            kind = kinds.get(process.pid, "other")
            memory.setdefault(kind, Memory()).add(Memory(1, info.rss, info.pss, info.uss))
    return memory


def memory_figure(memory: dict[str, Memory], ranks: int) -> Figure:
    rows = [_row(kind, seen) for kind, seen in sorted(memory.items(), key=lambda i: -i[1].pss)]
    rows.append(_row("whole system", _total(memory.values())))
    of_ranks = _total(memory[kind] for kind in OF_A_GROUP if kind in memory)
    per_rank = of_ranks.pss / ranks if ranks else 0
    own = _total(memory[kind] for kind in (REPLICA, ENGINE_CORE, WORKER) if kind in memory)
    coordinator = memory.get(COORDINATOR, Memory())
    return Figure(
        "Memory in MiB, one group ready and idle after load",
        ("process", "number", "RSS", "PSS", "USS"),
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
    )


def _total(parts: Iterable[Memory]) -> Memory:
    total = Memory()
    for part in parts:
        total.add(part)
    return total
