"""kill -9 of a part of a rank while requests come in steadily: what happens when, and to whom."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import sleep, time
from typing import Self

import psutil
from benchmarks import ray_logs as steps
from benchmarks.bench_system import BenchSystem
from benchmarks.figures import Figure, Row, seconds
from benchmarks.load import Answer, Target, ask, client_session, question
from benchmarks.ray_logs import start_marks
from benchmarks.starts import ALL_ANSWER, START_STEPS, START_TIMEOUT_S, Marks, steps_figure

KILLED = "kill -9"
LOST = "the controller calls the group lost"
ANSWERED_AGAIN = "a request is answered again"
_STEPS = (
    KILLED,
    LOST,
    *START_STEPS[START_STEPS.index(steps.PLACED) : -1],
    ANSWERED_AGAIN,
)
_REQUESTS_PER_S = 2.0
_LEAD_S = 3.0
_LOST_TIMEOUT_S = 90.0
_TAIL_S = 4.0


@dataclass(slots=True)
class Trickle:
    """Requests at a steady rate from a thread, however slowly they are answered."""

    target: Target
    model: str
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(120)

    async def _run(self) -> None:
        async with client_session() as http:
            open_requests: set[asyncio.Task[None]] = set()
            number = 0

            async def send(number: int) -> None:
                body = question(self.model, number, 16)
                url = self.target.urls[0]
                self.answers.append(await ask(http, url, self.target.headers, body))

            while not self._stop.is_set():
                open_requests.add(asyncio.create_task(send(number)))
                number += 1
                await asyncio.sleep(1 / _REQUESTS_PER_S)
            await asyncio.gather(*open_requests)


@dataclass(frozen=True, slots=True)
class Recovery:
    name: str
    marks: Marks
    answers: tuple[Answer, ...] = ()
    sent_again: float = 0.0

    @property
    def failed(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.error)


def kill_and_watch(bench: BenchSystem, name: str, group: str, victim: psutil.Process) -> Recovery:
    retries = bench.retries()
    with Trickle(bench.gateway, bench.model) as trickle:
        sleep(_LEAD_S)
        killed_at_s = time()
        victim.kill()
        lost = bench.until_transition(group, "lost", killed_at_s, _LOST_TIMEOUT_S)
        ready = bench.until_transition(group, "ready", lost.at_s, START_TIMEOUT_S)
        sleep(_TAIL_S)
    marks = {
        KILLED: killed_at_s,
        LOST: lost.at_s,
        ALL_ANSWER: ready.at_s,
        **start_marks(bench.ray_logs, group, killed_at_s),
    }
    answered = _first_end_after(trickle.answers, lost.at_s)
    if answered is not None:
        marks[ANSWERED_AGAIN] = answered
    seen = Recovery(name, marks, tuple(trickle.answers))
    return replace(seen, sent_again=bench.retries() - retries)


def _first_end_after(answers: Sequence[Answer], after_s: float) -> float | None:
    ends = [each.sent_at_s + each.total_s for each in answers if each.error is None]
    return min((end for end in ends if end > after_s), default=None)


def recovery_figures(seen: Sequence[Recovery]) -> tuple[Figure, ...]:
    columns = [(recovery.name, recovery.marks) for recovery in seen]
    return (
        steps_figure("Recovery of a group, step by step", _STEPS, columns, KILLED),
        _requests_figure(seen),
    )


def _requests_figure(seen: Sequence[Recovery]) -> Figure:
    rows: list[Row] = []
    for recovery in seen:
        waits = [each.first_s for each in recovery.answers if each.first_s is not None]
        rows.append(
            (
                recovery.name,
                str(len(recovery.answers)),
                str(len(recovery.answers) - len(recovery.failed)),
                str(len(recovery.failed)),
                f"{recovery.sent_again:.0f}",
                seconds(max(waits, default=None)),
            )
        )
    return Figure(
        f"Requests meanwhile, {_REQUESTS_PER_S:g} per second through the gateway",
        ("killed", "sent", "answered", "failed", "sent again by the gateway", "longest wait, s"),
        tuple(rows),
        tuple(_reasons(seen)),
    )


def _reasons(seen: Sequence[Recovery]) -> list[str]:
    reasons: Counter[str] = Counter()
    for recovery in seen:
        reasons.update(f"{recovery.name}: {answer.error}" for answer in recovery.failed)
    return [f"{count} times {reason}" for reason, count in reasons.most_common(4)]
