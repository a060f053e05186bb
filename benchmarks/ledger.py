"""What it costs a gateway to bring usage from its journal to the ledger, and to report a day of it.

    python -m benchmarks.ledger [--records N] [--rounds N] [--day N]

CPU is that of the gateway's process with all its threads. A step is what the event loop does
without a look at anything else. The longest one is given in CPU time and in elapsed time, which
has other work on the machine in it; of all rounds the smallest.

The report divides the cost of a day's groups and nodes among its N requests, in a process of its
own; its memory is the most that this process has had.
"""

import argparse
import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import uvloop
from benchmarks.figures import Conditions, Figure, Row, spread
from rich.console import Console
from sqlalchemy.dialects import postgresql, sqlite
from tests.store.postgresql import postgresql_server

from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
from expertmesh.core.metering.report import By
from expertmesh.core.metering.usage import Outcome, UsageRecord
from expertmesh.gateway.request_ids import RequestIds
from expertmesh.gateway.usage_journal import Closed, UsageJournal
from expertmesh.gateway.usage_writer import UsageLedger, UsageWriter
from expertmesh.store.database import Database, open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import UsageCells, usage_cells
from expertmesh.store.schema import usage_records

_IDS = RequestIds()
"""As the gateway makes them: in a row, which a database likes better than random ones."""
_STORES = ("SQLite", "PostgreSQL")
_ROW_BY_ROW = "SQLAlchemy's insert of rows"
_MANY_ROWS = "many rows in one statement"


class _RowLedger:
    """How a ledger is written without further thought."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_usage(self, records: Sequence[UsageRecord]) -> int:
        dialect = postgresql if self._database.engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(usage_records).on_conflict_do_nothing()
        async with self._database.writing() as connection:
            await connection.execute(statement, [_row(record) for record in records])
        return len(records)


def _row(record: UsageRecord) -> dict[str, Any]:
    columns = usage_records.c.keys()
    row = {name: getattr(record, name) for name in columns if name != "group_name"}
    return {**row, "group_name": record.group, "outcome": record.outcome.value}


@dataclass
class _Measured:
    cpu_us: list[float] = field(default_factory=list)
    loop_us: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    step_cpu_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def row(self, store: str, way: str) -> Row:
        return (
            f"{store}: {way}",
            spread(self.cpu_us),
            spread(self.loop_us),
            spread(self.server_us),
            f"{min(self.step_cpu_ms):.2f}",
            f"{min(self.step_ms):.2f}",
        )


def measure_ledger(records: int, rounds: int) -> Figure:
    rows = []
    with TemporaryDirectory() as folder, postgresql_server() as server:
        urls = (f"sqlite:///{Path(folder) / 'store.db'}", server.url("postgres"))
        for store, url in zip(_STORES, urls, strict=True):
            for way, ledger in ((_ROW_BY_ROW, _RowLedger), (_MANY_ROWS, Ledger)):
                measured = uvloop.run(_measure(url, ledger, records, rounds))
                rows.append(measured.row(store, way))
    return Figure(
        "From the journal to the ledger",
        (
            "store and way",
            "CPU, µs a record",
            "of it the loop's thread",
            "the server's CPU, µs a record",
            "longest step, ms of CPU",
            "elapsed",
        ),
        tuple(rows),
        (f"median (smallest to largest) of {rounds} rounds of {records} records",),
    )


async def _measure(
    url: str, ledger: Callable[[Database], UsageLedger], records: int, rounds: int
) -> _Measured:
    measured = _Measured()
    database = await open_database(url)
    try:
        journal = UsageJournal()
        writer = UsageWriter(ledger(database), journal, 1.0)
        for _ in range(rounds + 1):
            _fill(writer, journal, records)
            before = _spent_s()
            await _whole(writer.flush())
            spent = [after - start for after, start in zip(_spent_s(), before, strict=True)]
            cpu_us, loop_us, server_us = (seconds / records * 1e6 for seconds in spent)
            measured.cpu_us.append(cpu_us)
            measured.loop_us.append(loop_us)
            measured.server_us.append(server_us)
            _fill(writer, journal, records)
            step_cpu_s, step_s = await _longest_step_s(writer)
            measured.step_cpu_ms.append(step_cpu_s * 1e3)
            measured.step_ms.append(step_s * 1e3)
        await writer.close(1.0)
    finally:
        await database.close()
    # The first round opens connections and prepares statements.
    for figures in vars(measured).values():
        del figures[0]
    return measured


def _fill(writer: UsageWriter, journal: UsageJournal, records: int) -> None:
    journal.maintain()
    for number in range(records):
        writer.record(
            Closed(
                request_id=_IDS.new(),
                at_s=time.time(),
                tenant="tenant",
                key_id="key_0123456789abcdef",
                model="tiny-moe",
                group="em-tiny-moe-cpu-0",
                pool="cpu",
                endpoint="chat_completions",
                outcome=Outcome.OK,
                prompt_tokens=300 + number % 100,
                cached_tokens=number % 50,
                completion_tokens=20 + number % 30,
                queue_s=0.0,
                ttft_s=None,
                duration_s=0.123 + number / 1e6,
                usd_per_mtok_in=0.2,
                usd_per_mtok_cached=0.05,
                usd_per_mtok_out=0.6,
            )
        )


def _spent_s() -> tuple[float, float, float]:
    """CPU of this process, of this thread, and of the database server."""
    server_s = 0.0
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        server_s += times.user + times.system
    return time.process_time(), time.thread_time(), server_s


async def _longest_step_s(writer: UsageWriter) -> tuple[float, float]:
    """CPU time and elapsed time."""
    writing = asyncio.ensure_future(_whole(writer.flush()))
    longest_cpu_s = longest_s = 0.0
    last_cpu_s, last_s = time.thread_time(), time.perf_counter()
    while not writing.done():
        await asyncio.sleep(0)
        cpu_s, now_s = time.thread_time(), time.perf_counter()
        longest_cpu_s = max(longest_cpu_s, cpu_s - last_cpu_s)
        longest_s = max(longest_s, now_s - last_s)
        last_cpu_s, last_s = cpu_s, now_s
    await writing
    return longest_cpu_s, longest_s


def measure_report(requests: int) -> Figure:
    rows: list[Row] = []
    with TemporaryDirectory() as folder, postgresql_server() as server:
        urls = (f"sqlite:///{Path(folder) / 'store.db'}", server.url("postgres"))
        for store, url in zip(_STORES, urls, strict=True):
            uvloop.run(_fill_day(url, requests))
            ours, theirs = get_context("spawn").Pipe(duplex=False)
            process = get_context("spawn").Process(target=_report_day, args=(url, theirs))
            process.start()
            wall_s, cpu_s, mib = ours.recv()
            process.join()
            rows.append((store, f"{wall_s:.1f}", f"{cpu_s:.1f}", f"{mib:.0f}"))
    return Figure(
        f"A report of a day with {requests:,} requests",
        ("store", "elapsed, s", "CPU of the process, s", "its memory, MiB"),
        tuple(rows),
        (f"{_GROUPS} groups in {len(_POOLS)} pools, about 130 requests in flight",),
    )


_POOLS = ("h200", "spot")
_GROUPS = 12
_NOON_S = 1_767_268_800.0
_DAY_S = 86_400.0


async def _fill_day(url: str, requests: int) -> None:
    """Evenly over a day, as long as they take with 8 s on average."""
    random = Random(1)
    names = [(f"em-big-{_POOLS[n % 2]}-{n}", _POOLS[n % 2]) for n in range(_GROUPS)]
    start_s = _NOON_S - _DAY_S / 2
    until_s = start_s + _DAY_S
    holds = [
        CapacityHold(
            *(name, "big", pool, 32.7, start_s, until_s),
            ready_at_s=start_s + 300,
            prefill_tokens_per_s=40_000.0,
            decode_tokens_per_s=6_000.0,
            idle_watts=840.0,
            busy_watts=4_648.0,
        )
        for name, pool in names
    ]
    nodes = [
        NodeHold(pool, node, 0.0 if node == WHOLE_POOL else 32.7, start_s, until_s)
        for pool in _POOLS
        for node in (WHOLE_POOL, *map(str, range(_GROUPS // 2 + 1)))
    ]
    database = await open_database(url)
    try:
        ledger = Ledger(database)
        await ledger.hold_capacity(holds, nodes)
        for first in range(0, requests, 20_000):
            await ledger.add_usage(
                [
                    _asked(number, start_s + _DAY_S * number / requests, names, random)
                    for number in range(first, min(requests, first + 20_000))
                ]
            )
    finally:
        await database.close()


def _asked(
    number: int, at_s: float, names: Sequence[tuple[str, str]], random: Random
) -> UsageRecord:
    group, pool = random.choice(names)
    return UsageRecord(
        request_id=_IDS.new(),
        at_s=at_s,
        tenant=f"tenant-{number % 20}",
        key_id=f"key_{number % 40}",
        model="big",
        group=group,
        pool=pool,
        endpoint="chat_completions",
        outcome=Outcome.OK,
        prompt_tokens=random.randrange(4_000),
        cached_tokens=0,
        completion_tokens=random.randrange(800),
        queue_s=0.0,
        ttft_s=0.4,
        duration_s=random.expovariate(1 / 8),
        tariff_usd=Decimal(random.randrange(10**7)).scaleb(-9),
    )


def _report_day(url: str, answers: Connection) -> None:
    async def report() -> UsageCells:
        database = await open_database(url, create=False)
        try:
            return await usage_cells(Ledger(database))
        finally:
            await database.close()

    before_s, before_cpu_s = time.perf_counter(), time.process_time()
    total = uvloop.run(report()).grouped(By.DAY).total
    spent = time.perf_counter() - before_s, time.process_time() - before_cpu_s
    if not total.attributed_nano_usd or not total.idle_nodes_nano_usd:
        raise RuntimeError(f"the report is not whole: {total}")
    answers.send((*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


async def _whole(flush: Awaitable[bool]) -> None:
    if not await flush:
        raise RuntimeError("the store did not take the records")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the ledger costs a gateway.")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--day", type=int, default=1_400_000, help="requests of the report")
    chosen = parser.parse_args()
    conditions = Conditions.now()
    console = Console()
    for figure in (measure_ledger(chosen.records, chosen.rounds), measure_report(chosen.day)):
        console.print(figure.to_rich())
        for note in figure.notes:
            console.print(f"- {note}")
    console.print(f"- {conditions.until_now()}")


if __name__ == "__main__":
    main()
