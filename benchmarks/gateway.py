"""Measures one gateway worker on one core, before a model server that is only answers.

python -m benchmarks.gateway [--only PART]… [--peers] [--seconds N] [--ahead] [--write-docs]
python -m benchmarks.gateway --profile FILE
"""

import asyncio
import datetime
import importlib.metadata
import os
import platform
import signal
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import uvloop
from benchmarks.figures import Conditions, Figure, show, with_note, write_block
from benchmarks.gateway_bench import contestants, measure, tables
from benchmarks.gateway_bench.contestants import OURS, CannotRun, Contestant, Cores, Ground
from benchmarks.gateway_bench.load import LoadError
from benchmarks.gateway_bench.other_work import OtherWork
from benchmarks.gateway_bench.profiling import write_profile
from rich.console import Console

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
_LIMIT_S = 120.0
_LIMIT_WITH_PEERS_S = 480.0
_STOPPING_S = 10.0
"""Kept for the end of all processes."""
_POLICIES = (
    f"{OURS}: tenant and key have every limit set (requests, tokens, concurrency, dollars), and "
    "usage goes to SQLite. The routers check no keys and count nothing."
)
_ROUNDS = 3
_PACED_ROUNDS = 2
Starter = Callable[[Ground], AbstractAsyncContextManager[Contestant]]


class Part(StrEnum):
    """Also the names of the blocks in the document, after `gateway-`."""

    HELD = "held"
    ADDED = "added"
    RATE = "rate"
    HALF_LOAD = "half-load"
    STREAMS = "streams"
    PACED = "paced"


@dataclass(slots=True)
class GatewayBench:
    wanted: frozenset[Part]
    peers: bool
    seconds: float
    """Of one window of a measurement."""
    console: Console
    documents: bool
    ahead: bool
    profile: Path | None
    missing: dict[str, str] = field(default_factory=dict)
    _direct: Contestant | None = None
    _gateways: list[Contestant] = field(default_factory=list)
    _cores: Cores = field(default_factory=Cores.choose)
    _busy: Conditions = field(default_factory=Conditions.now)
    _others: OtherWork = field(default_factory=OtherWork.begin)
    """Since the last table."""
    _most: dict[str, float] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        limit_s = _LIMIT_WITH_PEERS_S if self.peers else _LIMIT_S
        os.sched_setaffinity(0, {self._cores.load})
        if not self._cores.apart:
            self._say("one core only: gateway, upstream and load share it")
        try:
            async with asyncio.timeout(limit_s - _STOPPING_S):
                await self._all()
        except TimeoutError:
            self.console.print(f"stopped: the limit is {limit_s:.0f} s", style="yellow")
            raise typer.Exit(1) from None
        finally:
            self._say("done")

    async def _all(self) -> None:
        with TemporaryDirectory() as folder:
            async with AsyncExitStack() as stack:
                ground = await stack.enter_async_context(
                    contestants.upstream(Path(folder), self._cores)
                )
                self._direct = await contestants.direct(ground)
                await self._start(stack, ground, OURS, contestants.ours)
                if self.profile is not None and self._gateways:
                    await self._write_profile(self.profile)
                    return
                if Part.HELD in self.wanted and self._gateways:
                    self._say(f"memory of {measure.HELD} waiting requests")
                    figure = tables.held_figure(await measure.held_memory(self._gateways[0]))
                    self._emit(Part.HELD, figure)
                await self._start(stack, ground, "bare relay", contestants.bare_relay)
                if self.peers:
                    for name, starter in contestants.PEER_STARTERS.items():
                        await self._start(stack, ground, name, starter)
                self._others = OtherWork.begin()
                if self.ahead:
                    stack.enter_context(contestants.ahead_of_others(self._everyone))
                await self._measure()

    async def _start(
        self, stack: AsyncExitStack, ground: Ground, name: str, starter: Starter
    ) -> None:
        self._say(f"starting {name}")
        try:
            self._gateways.append(await stack.enter_async_context(starter(ground)))
        except CannotRun as reason:
            self.missing[name] = str(reason)
            self.console.print(f"{name}: {reason}", style="yellow", markup=False, highlight=False)

    @property
    def _everyone(self) -> list[Contestant]:
        assert self._direct is not None
        return [self._direct, *self._gateways]

    async def _measure(self) -> None:
        everyone, gateways = self._everyone, self._gateways
        direct = everyone[0]
        if Part.ADDED in self.wanted:
            self._say("one request at a time, direct and through in pairs")
            added = await measure.added_one_at_a_time(
                direct, gateways, limit_s=self.seconds * (5 if self.peers else 3)
            )
            self._emit(Part.ADDED, tables.added_figure(added, self.missing))
        if Part.RATE in self.wanted:
            rates = {}
            for connections in measure.CONNECTIONS:
                self._say(f"requests per second, {connections} connections")
                rates[connections] = await measure.saturated(
                    everyone, connections, _ROUNDS, self.seconds
                )
            figures = [tables.rate_figure(n, rate, self.missing) for n, rate in rates.items()]
            self._emit(Part.RATE, *figures)
            self._note_most(rates[measure.CONNECTIONS[0]])
        if Part.HALF_LOAD in self.wanted:
            if not self._most:
                self._note_most(
                    await measure.saturated(gateways, measure.CONNECTIONS[0], 1, self.seconds)
                )
            self._say("half of the most requests per second")
            half = await measure.at_half_load(direct, gateways, self._most, self.seconds)
            self._emit(Part.HALF_LOAD, tables.half_load_figure(half, self.missing))
        if Part.STREAMS in self.wanted:
            self._say(f"{measure.FAST_STREAMS} streams at full speed")
            fast = await measure.full_speed_streams(everyone, _ROUNDS, self.seconds)
            self._emit(Part.STREAMS, tables.streams_figure(fast, self.missing))
        if Part.PACED in self.wanted:
            self._say(f"{measure.PACED_STREAMS} paced streams")
            paced = await measure.paced_streams(everyone, _PACED_ROUNDS, self.seconds)
            self._emit(Part.PACED, tables.paced_figure(paced, self.missing))

    def _note_most(self, rounds: measure.Rounds) -> None:
        self._most = {
            name: measure.middle([window.rate for window in windows])
            for name, windows in rounds.items()
        }

    async def _write_profile(self, file: Path) -> None:
        self._say(f"profile of {OURS} under load")
        try:
            await write_profile(self._gateways[0], self.seconds * 4, file)
        except CannotRun as reason:
            self.console.print(str(reason), style="yellow", markup=False, highlight=False)
            return
        self._say(f"written: {file}")

    def _emit(self, part: Part, *figures: Figure) -> None:
        last = figures[-1]
        for note in (_POLICIES, self._machine(), self._versions()):
            last = with_note(last, note)
        self._others = OtherWork.begin()
        shown = (*figures[:-1], last)
        show(self.console, shown)
        if self.documents:
            write_block(DOCUMENT, f"gateway-{part}", shown)

    def _machine(self) -> str:
        where = "each gateway on one core" if self._cores.apart else "all on one core"
        return (
            f"{where}, upstream and load on the other; {self._busy.until_now()}; "
            f"{self._others.until_now()}"
        )

    def _versions(self) -> str:
        own = ("expertmesh", "uvloop")
        found = [f"{name} {importlib.metadata.version(name)}" for name in own]
        found += sorted({gateway.version for gateway in self._gateways if gateway.version})
        today = datetime.date.today().isoformat()
        return f"{today}; Python {platform.python_version()}, {', '.join(found)}"

    def _say(self, text: str) -> None:
        self.console.print(
            f"[{time.monotonic() - self._began_s:4.0f} s] {text}", markup=False, highlight=False
        )


async def _until_told_to_stop(bench: GatewayBench) -> None:
    task = asyncio.current_task()
    assert task is not None
    # One way out for Ctrl-C, `kill` and a closed terminal: all that was started ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await bench.run()


def main(
    only: Annotated[
        list[Part] | None, typer.Option(help="Measure this part; may be repeated.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also other gateways; see scripts/install-bench-peers.sh."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=2.5, help="Length of one window of a measurement.")
    ] = 1.5,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Write the figures into docs/performance.md.")
    ] = False,
    ahead: Annotated[
        bool,
        typer.Option("--ahead", help="Before all other work of this machine; needs root."),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(help="Only write a profile of our gateway under load into this file."),
    ] = None,
) -> None:
    """Measure the gateway: time added, requests and events per second, memory."""
    # Tables in a pipe or a file keep their lines whole.
    console = Console() if Console().is_terminal else Console(width=170)
    bench = GatewayBench(
        frozenset(only or Part), peers, seconds, console, write_docs, ahead, profile
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_told_to_stop(bench))
    except (LoadError, CannotRun) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
