"""Where the gateway's time goes under saturating load: samples of its stack, as sorted tables.

py-spy reads the process from outside, so what it shows is the gateway as it runs without it.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateway_bench.contestants import PEERS, CannotRun, Contestant
from benchmarks.gateway_bench.load import WHOLE, Ask, ClosedLoop
from benchmarks.gateway_bench.measure import FAST_EVENTS, FAST_STREAMS

_SAMPLES_PER_S = 400
_CONNECTIONS = 64
_MOST_ROWS = 60
_MAIN_THREAD = "MainThread"
_LINE = re.compile(r"^(?P<function>.*) \((?P<file>[^():]+)(?::(?P<line>\d+))?\)$")
_LOADS = {
    "requests, not streamed": (WHOLE, _CONNECTIONS),
    "streams at full speed": (Ask(stream=True, events=FAST_EVENTS), FAST_STREAMS),
}


@dataclass(frozen=True, slots=True)
class _Profile:
    title: str
    cores: str
    """How much CPU time its threads took."""
    stacks: Counter[tuple[str, ...]]
    """Of the main thread: frames from the outermost one, and how often each stack was seen."""


async def write_profile(gateway: Contestant, seconds: float, file: Path) -> None:
    """Raises CannotRun without py-spy."""
    program = PEERS / "profiler" / "bin" / "py-spy"
    if not program.exists():
        raise CannotRun("py-spy is not installed; run scripts/install-bench-peers.sh profiler")
    profiles = [
        await _record(program, gateway, title, ask, connections, seconds, file)
        for title, (ask, connections) in _LOADS.items()
    ]
    _save(file, profiles)


def _save(file: Path, profiles: Sequence[_Profile]) -> None:
    file.write_text("\n".join(_render(profile) for profile in profiles))


async def _record(
    program: Path,
    gateway: Contestant,
    title: str,
    ask: Ask,
    connections: int,
    seconds: float,
    file: Path,
) -> _Profile:
    raw = file.with_suffix(".raw")
    load = ClosedLoop(gateway.way, ask, connections)
    await load.start()
    try:
        await asyncio.sleep(0.5)
        began_s, before = time.monotonic(), _threads_s(gateway)
        process = await asyncio.create_subprocess_exec(
            str(program),
            *("record", "--pid", str(gateway.processes[0].pid), "--format", "raw"),
            *("--rate", str(_SAMPLES_PER_S), "--duration", str(max(1, round(seconds)))),
            *("--nonblocking", "--threads", "--output", str(raw)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), seconds + 30)
            cores = _cores(before, _threads_s(gateway), time.monotonic() - began_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        await load.stop()
    if process.returncode:
        raise CannotRun(f"py-spy: {output.decode(errors='replace').strip()[-300:]}")
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        # Whether another thread waits cannot be seen from outside without stopping it.
        if _MAIN_THREAD in thread and frames:
            stacks[tuple(frame or "?" for frame in frames)] += int(count)
    raw.unlink()
    title = f"{title}, {connections} connections, {load.tally.done} done"
    return _Profile(title, cores, stacks)


def _threads_s(gateway: Contestant) -> dict[int, float]:
    threads = gateway.processes[0].threads()
    return {thread.id: thread.user_time + thread.system_time for thread in threads}


def _cores(before: dict[int, float], after: dict[int, float], seconds: float) -> str:
    main = min(after)
    used = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
    others = sum(used.values()) - used[main]
    return (
        f"of a core, the main thread took {used[main] / seconds:.0%}, "
        f"{len(after) - 1} others {others / seconds:.0%}"
    )


def _render(profile: _Profile) -> str:
    total = sum(profile.stacks.values()) or 1
    lines, functions, inclusive = Counter[str](), Counter[str](), Counter[str]()
    for stack, count in profile.stacks.items():
        lines[_shown(stack[-1], True)] += count
        functions[_shown(stack[-1], False)] += count
        for name in {_shown(frame, False) for frame in stack}:
            inclusive[name] += count
    parts = [f"{profile.title}: {total} samples", profile.cores, "", "   self   total  function"]
    for name, count in functions.most_common(_MOST_ROWS):
        parts.append(f"{count / total:7.1%} {inclusive[name] / total:7.1%}  {name}")
    parts += ["", "   self  line"]
    parts += [f"{n / total:7.1%}  {name}" for name, n in lines.most_common(_MOST_ROWS)]
    return "\n".join(parts) + "\n"


def _shown(frame: str, with_line: bool) -> str:
    found = _LINE.match(frame)
    if found is None:
        return frame
    line = f":{found['line']}" if with_line and found["line"] else ""
    place = "/".join(found["file"].split("/")[-2:])
    return f"{found['function']} ({place}{line})"
