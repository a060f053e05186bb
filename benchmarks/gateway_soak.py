"""Mixed traffic at a fixed, moderate rate for minutes, and whether the gateway's memory is flat.

The gateway runs as users start it; rank, controller and clients are this process.

    python -m benchmarks.gateway_soak [--minutes 10] [--rate 150]
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import uvloop
from benchmarks.figures import Conditions, Figure, Row, percentile, show
from rich.console import Console
from tests.gateway.abuse.fast_rank import fast_rank
from tests.gateway.abuse.gateway_process import ASLEEP, GatewayProcess, gateway_process
from tests.gateway.stand import MODEL

from expertmesh.core.domain.tenant import Limits
from expertmesh.store.keys import KeyBook

HELD_S = 3.0
"""A held request is refused then."""
STREAM_EVENTS = 20
STREAM_PACE_MS = 50
LIMITED_PER_MIN = 60
GOOD_LIMITS = Limits(
    requests_per_min=10_000_000,
    tokens_per_min=1_000_000_000,
    concurrent_requests=10_000,
    usd_per_day=100_000.0,
    usd_per_month=1_000_000.0,
)
WARM_UP_SHARE = 0.2
FLAT_BYTES = 3 * 2**20
"""Growth after the warm-up, as the fitted line has it, that still counts as none."""
_SAMPLE_S = 1.0
_PILED_UP = 4
_WAIT_S = 20.0
_MOST_IDLE_S = 30.0
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Kind(StrEnum):
    WHOLE = "whole"
    STREAM = "stream"
    ABORT = "abort"
    ERROR = "error"
    HELD = "held"
    LIMITED = "limited"


_SHARES = {
    Kind.WHOLE: 50,
    Kind.STREAM: 20,
    Kind.ABORT: 10,
    Kind.ERROR: 10,
    Kind.HELD: 2,
    Kind.LIMITED: 8,
}
_GOOD_STATUSES = {
    Kind.WHOLE: (200,),
    Kind.STREAM: (200,),
    Kind.ABORT: (200,),
    Kind.ERROR: (400, 401, 404),
    Kind.HELD: (503,),
    Kind.LIMITED: (200, 429),
}


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    """Since the start."""
    rss_bytes: int
    files: int
    clients: int
    in_flight: int
    """Requests open in the gateway."""
    journal_bytes: int


@dataclass(slots=True)
class Tally:
    statuses: Counter[tuple[Kind, int]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Answers that no request of their kind should get."""
    whole_s: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.statuses.total()

    @property
    def refused(self) -> int:
        return sum(count for (_, status), count in self.statuses.items() if status >= 400)


@dataclass(frozen=True, slots=True)
class Soaked:
    samples: tuple[Sample, ...]
    faults: dict[str, int]
    complaints: tuple[str, ...]
    """Lines of the gateway's log about faults."""
    left: Sample
    """When the last request was over."""

    @property
    def growth_bytes(self) -> float:
        """From the end of the warm-up to the end, along the fitted line."""
        after = self._after_warm_up
        slope = _slope([s.at_s for s in after], [float(s.rss_bytes) for s in after])
        return slope * (after[-1].at_s - after[0].at_s)

    @property
    def is_steady(self) -> bool:
        """False when requests piled up, as on a busy machine: memory then follows their number."""
        in_flight = [s.in_flight for s in self._after_warm_up]
        return max(in_flight) < _PILED_UP * max(1.0, median(in_flight))

    @property
    def is_flat(self) -> bool:
        return self.is_steady and self.growth_bytes < FLAT_BYTES

    @property
    def verdict(self) -> str:
        if not self.is_steady:
            return "cannot be judged: requests piled up"
        return "is flat" if self.is_flat else "is NOT flat"

    @property
    def _after_warm_up(self) -> list[Sample]:
        last_s = self.samples[-1].at_s
        return [s for s in self.samples if s.at_s >= last_s * WARM_UP_SHARE]


class Soak:
    def __init__(self, gateway: GatewayProcess, limited_secret: str, rate: float) -> None:
        """`rate`: requests a second, of all kinds together."""
        self._gateway = gateway
        self._limited_secret = limited_secret
        self._rate = rate
        self._random = random.Random(11)
        self._idle: list[_Connection] = []
        self._number = 0
        self._began_s = 0.0
        self.samples: list[Sample] = []
        self.total = Tally()
        self.minute = Tally()
        """Since it was last taken."""

    async def run(self, seconds: float, each_minute: Callable[[], None]) -> Soaked:
        self._began_s = time.monotonic()
        kinds, shares = list(_SHARES), list(_SHARES.values())
        next_sample_s, next_minute_s = 0.0, 60.0
        async with asyncio.TaskGroup() as group:
            sent = 0
            while (now_s := time.monotonic() - self._began_s) < seconds:
                while sent < now_s * self._rate:
                    sent += 1
                    (kind,) = self._random.choices(kinds, shares)
                    group.create_task(self._one(kind))
                if now_s >= next_sample_s:
                    next_sample_s += _SAMPLE_S
                    self.samples.append(await self._sample())
                if now_s >= next_minute_s:
                    next_minute_s += 60.0
                    each_minute()
                    self.minute = Tally()
                await asyncio.sleep(0.005)
        if self.minute.requests:
            each_minute()
        for connection in self._idle:
            connection.close()
        await self._gateway.at_rest()
        await asyncio.sleep(1)
        return Soaked(
            tuple(self.samples),
            dict(self.total.faults),
            tuple(self._gateway.complaints()),
            await self._sample(),
        )

    async def _sample(self) -> Sample:
        counts = await self._gateway.counts()
        return Sample(
            time.monotonic() - self._began_s,
            counts.rss_bytes,
            counts.files,
            counts.clients,
            counts.open_requests,
            self._gateway.journal_bytes,
        )

    async def _one(self, kind: Kind) -> None:
        self._number += 1
        ask: Callable[[], Awaitable[int]] = {
            Kind.WHOLE: self._whole,
            Kind.STREAM: self._stream,
            Kind.ABORT: self._abort,
            Kind.ERROR: self._error,
            Kind.HELD: self._held,
            Kind.LIMITED: self._limited,
        }[kind]
        fault = ""
        status = 0
        try:
            async with asyncio.timeout(_WAIT_S):
                status = await ask()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            fault = f"{kind}: {type(error).__name__}"
        else:
            if status not in _GOOD_STATUSES[kind]:
                fault = f"{kind}: status {status}"
        for tally in (self.total, self.minute):
            tally.statuses[kind, status] += 1
            if fault:
                tally.faults[fault] += 1

    # One request of each kind; the status of its answer.

    async def _whole(self) -> int:
        began_s = time.monotonic()
        status = await self._answered(_chat("one two " * 100))
        took_s = time.monotonic() - began_s
        self.minute.whole_s.append(took_s)
        return status

    async def _stream(self) -> int:
        return await self._answered(_chat(self._plan(), stream=True))

    async def _abort(self) -> int:
        connection = await self._connect()
        body = _chat(self._plan(), stream=True)
        connection.write(self._gateway.head("/v1/chat/completions", len(body)) + body)
        status = await connection.head()
        for _ in range(self._random.randrange(STREAM_EVENTS // 2)):
            if await connection.more():
                break
        connection.abort()
        return status

    async def _error(self) -> int:
        match self._random.randrange(3):
            case 0:
                return await self._answered(b'{"model":')
            case 1:
                return await self._answered(_chat("one", model="unknown"))
            case _:
                return await self._answered(_chat("one"), "sk-em-wrong")

    async def _held(self) -> int:
        return await self._answered(_chat("one", model=ASLEEP))

    async def _limited(self) -> int:
        return await self._answered(_chat("one"), self._limited_secret)

    def _plan(self) -> str:
        return f"plan=soak-{self._number}:{STREAM_EVENTS}:{STREAM_PACE_MS}:20"

    async def _answered(self, body: bytes, secret: str | None = None) -> int:
        connection = self._reusable() or await self._connect()
        connection.write(self._gateway.head("/v1/chat/completions", len(body), secret) + body)
        status = await connection.head()
        await connection.body()
        if connection.stays:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return status

    def _reusable(self) -> "_Connection | None":
        """The connection used last; like all clients, well before the gateway closes it."""
        now_s = time.monotonic()
        while self._idle and now_s - self._idle[0].idle_since_s > _MOST_IDLE_S:
            self._idle.pop(0).close()
        return self._idle.pop() if self._idle else None

    async def _connect(self) -> "_Connection":
        reader, writer = await asyncio.open_connection("127.0.0.1", self._gateway.port)
        return _Connection(reader, writer)


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._head = b""
        self.stays = False
        self.idle_since_s = 0.0

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def head(self) -> int:
        self._head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        self.stays = b"connection: close" not in self._head
        return int(self._head.split(b" ", 2)[1])

    async def body(self) -> None:
        if b"transfer-encoding: chunked" in self._head:
            await self._reader.readuntil(_LAST_CHUNK)
        else:
            length = self._head.split(b"content-length: ", 1)[1]
            await self._reader.readexactly(int(length.split(b"\r\n", 1)[0]))

    async def more(self) -> bool:
        """True at the end."""
        data = await self._reader.read(65_536)
        return not data or data.endswith(_LAST_CHUNK)

    def abort(self) -> None:
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


def _chat(prompt: str, stream: bool = False, model: str = MODEL) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
    return json.dumps({**asked, "stream": True} if stream else asked).encode()


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares."""
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    shared = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    return shared / spread if spread else 0.0


async def soak(seconds: float, rate: float, folder: Path, console: Console) -> Soaked:
    """Prints a line a minute, and the table with the verdict at the end."""
    conditions = Conditions.now()
    async with (
        fast_rank() as rank,
        gateway_process(folder, [rank.url], key_limits=GOOD_LIMITS, max_wait_s=HELD_S) as gateway,
    ):
        limited = await KeyBook(gateway.database).create(
            "team-b", "limited", time.time(), limits=Limits(requests_per_min=LIMITED_PER_MIN)
        )
        await _until_known(gateway, limited.secret)
        run = Soak(gateway, limited.secret, rate)
        rows: list[Row] = []

        def each_minute() -> None:
            rows.append(_row(len(rows) + 1, run.samples[-1], run.minute))
            console.print("  ".join(rows[-1]), highlight=False)

        soaked = await run.run(seconds, each_minute)
        grown = soaked.growth_bytes
        notes = (
            f"memory {soaked.verdict}: {grown / 2**20:+.2f} MiB along the fitted line over the "
            f"last {100 * (1 - WARM_UP_SHARE):.0f} % of {seconds / 60:.1f} min",
            f"afterwards: {_row(0, soaked.left, Tally())[1:6]}",
            f"answers by kind and status: {_counts(run.total)}",
            f"faults: {soaked.faults or 'none'}; in the log: {len(soaked.complaints)}; sent to "
            f"the rank in error: {len(rank.faults)}",
            f"{rate:.0f} requests/s; {conditions.until_now()}",
        )
        show(console, [Figure("The gateway under mixed traffic", _COLUMNS, tuple(rows), notes)])
        return soaked


_COLUMNS = (
    "minute",
    "RSS MiB",
    "files",
    "connections",
    "in flight",
    "journal KiB",
    "p50 ms",
    "p99 ms",
    "requests",
    "refused",
    "faults",
)


def _row(minute: int, sample: Sample, tally: Tally) -> Row:
    times_s = tally.whole_s or [0.0]
    return (
        str(minute),
        f"{sample.rss_bytes / 2**20:.1f}",
        str(sample.files),
        str(sample.clients),
        str(sample.in_flight),
        f"{sample.journal_bytes / 1024:.0f}",
        f"{percentile(times_s, 0.5) * 1000:.2f}",
        f"{percentile(times_s, 0.99) * 1000:.2f}",
        str(tally.requests),
        str(tally.refused),
        str(tally.faults.total()),
    )


def _counts(tally: Tally) -> str:
    ordered = sorted(tally.statuses.items())
    return ", ".join(f"{kind} {status}: {count}" for (kind, status), count in ordered)


async def _until_known(gateway: GatewayProcess, secret: str) -> None:
    deadline_s = time.monotonic() + 10
    while (await gateway.get("/v1/models", secret))[0] != 200:
        if time.monotonic() > deadline_s:
            raise TimeoutError("the gateway does not know a new key")
        await asyncio.sleep(0.1)


def main(
    minutes: Annotated[float, typer.Option(help="How long the traffic lasts.", min=0.2)] = 10.0,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=1)] = 150.0,
) -> None:
    """Run mixed traffic, print a table a minute, and say whether memory is flat."""
    console = Console(width=140)
    with TemporaryDirectory() as folder:
        soaked = uvloop.run(soak(minutes * 60, rate, Path(folder), console))
    if not soaked.is_flat or soaked.faults or soaked.complaints:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
