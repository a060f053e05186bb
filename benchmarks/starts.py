"""The start of a group step by step: from the journal, the logs and a request that waits for it."""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from benchmarks import ray_logs as steps
from benchmarks.bench_system import BenchSystem
from benchmarks.figures import Figure, Row
from benchmarks.import_cost import ImportCost
from benchmarks.load import Answer, Target, ask, client_session, question
from benchmarks.process_watch import (
    BUILD_TASK,
    OF_A_GROUP,
    TASK_PREFIX,
    Snapshot,
    cpu_by_kind,
)
from benchmarks.ray_logs import start_marks

ASKED = "the controller asks for the group"
ALL_ANSWER = "all ranks answer the controller: ready"
FIRST_TOKEN = "first token"

START_STEPS = (
    ASKED,
    steps.BUILDING,
    steps.BUILT,
    steps.PLACED,
    steps.REPLICA_IMPORTED,
    steps.CONFIGURED,
    steps.COORDINATED,
    steps.ENGINE_IMPORTED,
    steps.WEIGHTS,
    steps.ENGINE_READY,
    steps.CONNECTED,
    steps.REPLICA_READY,
    ALL_ANSWER,
    FIRST_TOKEN,
)
START_TIMEOUT_S = 420.0

Marks = dict[str, float]


@dataclass(frozen=True, slots=True)
class Start:
    name: str
    marks: Marks
    cpu: dict[str, tuple[int, float]]
    """By kind of process: how many, and their CPU seconds together until the group was ready."""

    @property
    def ready_s(self) -> float:
        return self.marks[ALL_ANSWER] - self.marks[ASKED]

    @property
    def group_cpu_s(self) -> float:
        """Of the group's processes and of the tasks that only its start needs."""
        return sum(
            cpu_s
            for kind, (_, cpu_s) in self.cpu.items()
            if kind in OF_A_GROUP or kind == BUILD_TASK or kind.startswith(TASK_PREFIX)
        )


@dataclass(slots=True)
class WaitingRequest:
    """One request in a thread of its own, sent at the start of the `with` block."""

    target: Target
    model: str
    answers: list[Answer] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join(30)

    @property
    def first_token_at_s(self) -> float | None:
        for answer in self.answers:
            if answer.first_s is not None:
                return answer.sent_at_s + answer.first_s
        return None

    async def _send(self) -> None:
        async with client_session() as http:
            body = question(self.model, 0, 8)
            url = self.target.urls[0]
            self.answers.append(await ask(http, url, self.target.headers, body))


def watch_first_start(bench: BenchSystem) -> tuple[str, Start]:
    """Of the group that the controller has asked for already."""
    with WaitingRequest(bench.gateway, bench.model) as waiting:
        group = bench.running.until_groups(1, START_TIMEOUT_S)[0]["name"]
    return group, _seen_start(bench, "first group", group, {}, waiting)


def watch_second_start(bench: BenchSystem) -> tuple[str, Start]:
    """In a running cluster. The first group serves meanwhile, so the first token is asked of the
    new ranks directly."""
    known = set(bench.group_names())
    before = bench.watch.snapshot()
    bench.set_groups(2, 2)
    groups = bench.running.until_groups(2, START_TIMEOUT_S)
    group = next(each["name"] for each in groups if each["name"] not in known)
    with WaitingRequest(bench.ranks(group), bench.model) as waiting:
        pass
    return group, _seen_start(bench, "second group", group, before, waiting)


def _seen_start(
    bench: BenchSystem, name: str, group: str, before: Snapshot, waiting: WaitingRequest
) -> Start:
    asked_at_s = bench.asked_at_s(group)
    after = bench.watch.snapshot()
    marks = {ASKED: asked_at_s, **start_marks(bench.ray_logs, group, asked_at_s)}
    ready = [step.at_s for step in bench.transitions(group, asked_at_s) if step.after == "ready"]
    marks[ALL_ANSWER] = ready[0]
    if waiting.first_token_at_s is not None:
        marks[FIRST_TOKEN] = waiting.first_token_at_s
    return Start(name, marks, cpu_by_kind(before, after, group))


def steps_figure(
    title: str, order: Iterable[str], columns: Sequence[tuple[str, Marks]], origin: str
) -> Figure:
    """For each step the seconds since `origin` and, in brackets, since the step before it."""
    rows: list[Row] = []
    for step in order:
        cells = tuple(_at(marks, step, origin) for _, marks in columns)
        if any(cell != "-" for cell in cells):
            rows.append((step, *cells))
    return Figure(
        title,
        ("step reached by the slowest rank", *(name for name, _ in columns)),
        tuple(rows),
        ("Seconds since the first line, and in brackets since the step before.",),
    )


def _at(marks: Marks, step: str, origin: str) -> str:
    if step not in marks:
        return "-"
    at_s = marks[step] - marks[origin]
    if step == origin:
        return "0.0"
    earlier = [other for name, other in marks.items() if name != step and other <= marks[step]]
    return f"{at_s:.1f} (+{marks[step] - max(earlier, default=marks[step]):.1f})"


def start_figures(
    starts: Sequence[Start], imports: dict[str, ImportCost] | None
) -> tuple[Figure, ...]:
    columns = [(start.name, start.marks) for start in starts]
    figures = [
        steps_figure("Start of a group, step by step", START_STEPS, columns, ASKED),
        cpu_figure(starts, imports),
    ]
    if len(starts) > 1:
        figures.append(_ratios(starts))
    return tuple(figures)


def cpu_figure(starts: Sequence[Start], imports: dict[str, ImportCost] | None) -> Figure:
    kinds = dict.fromkeys(kind for start in starts for kind in start.cpu)
    rows: list[Row] = []
    for kind in sorted(kinds, key=lambda kind: -max(s.cpu.get(kind, (0, 0.0))[1] for s in starts)):
        cells = [_cpu_cell(start.cpu.get(kind)) for start in starts]
        if imports is not None:
            cells.append(f"{imports[kind].cpu_s:.1f}" if kind in imports else "-")
        rows.append((kind, *cells))
    columns = ["process", *(start.name for start in starts)]
    notes = ["CPU seconds, user and system, from the request for the group until it was ready."]
    if imports is not None:
        columns.append("imports alone, each")
        notes += [f"{start.name}: {import_share(start, imports)}" for start in starts]
    return Figure("CPU seconds of a start, by process", tuple(columns), tuple(rows), tuple(notes))


def _cpu_cell(seen: tuple[int, float] | None) -> str:
    if seen is None:
        return "-"
    count, cpu_s = seen
    return f"{cpu_s:.1f}" if count == 1 else f"{cpu_s:.1f} ({count})"


def import_share(start: Start, imports: dict[str, ImportCost]) -> str:
    """An engine worker, where there is one, imports what an engine core without one does."""
    used_s = imported_s = 0.0
    for kind, cost in (*imports.items(), ("engine worker", imports["engine core"])):
        count, cpu_s = start.cpu.get(kind, (0, 0.0))
        used_s += cpu_s
        imported_s += min(cpu_s, count * cost.cpu_s)
    if not used_s:
        return "no process of the group was seen"
    return (
        f"{imported_s:.0f} of {used_s:.0f} CPU seconds of the group's own processes "
        f"({imported_s / used_s:.0%}) are Python imports"
    )


def _ratios(starts: Sequence[Start]) -> Figure:
    base = starts[1]
    rows = tuple(
        (
            start.name,
            f"{start.ready_s:.1f}",
            f"{start.ready_s / base.ready_s:.2f}",
            f"{start.group_cpu_s:.1f}",
            f"{start.group_cpu_s / base.group_cpu_s:.2f}" if base.group_cpu_s else "-",
        )
        for start in starts
    )
    return Figure(
        "Starts compared in one run",
        ("start", "until ready, s", "ratio", "CPU of ranks and tasks, s", "ratio"),
        rows,
        (f"Ratios to the {base.name}, which starts in a running cluster as well.",),
    )
