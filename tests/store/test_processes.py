"""Several processes at one store: they start together, write together, and one is killed."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.store.records import usage_record

from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger

_HERE = Path(__file__)
_FOLDERS = (str(_HERE.parents[2] / "platform"), str(_HERE.parents[2]))

_OPEN_TOGETHER = """
async def main(url, _):
    print("ready", flush=True)
    sys.stdin.readline()
    await (await open_database(url)).close()
"""

_WRITE_BATCHES = """
async def main(url, name):
    database = await open_database(url)
    ledger, book = Ledger(database), KeyBook(database)
    for batch in range(40):
        records = [usage_record(f"{name}-{batch}-{n}") for n in range(25)]
        assert await ledger.add_usage(records) == 25
        if batch % 10 == 0:
            await book.create("acme", name, 1.0)
    await database.close()
"""

_DIE_WITHIN_A_BATCH = """
async def main(url, _):
    database = await open_database(url)
    ledger = Ledger(database)
    await ledger.add_usage([usage_record(f"whole-{n}") for n in range(1_500)])
    pages = []

    def after_statement(*_):
        pages.append(None)
        if len(pages) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(database.engine.sync_engine, "after_cursor_execute", after_statement)
    await ledger.add_usage([usage_record(f"lost-{n}") for n in range(5_000)])
"""

_WRITE_UNTIL_KILLED = """
async def main(url, _):
    database = await open_database(url)
    ledger = Ledger(database)
    for batch in itertools.count():
        await ledger.add_usage([usage_record(f"{batch}-{n}") for n in range(400)])
        print(batch, flush=True)
"""

_PROGRAM = """
import asyncio, itertools, os, signal, sys
sys.path[:0] = {folders}
from sqlalchemy import event
from tests.store.records import usage_record
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger
{main}
asyncio.run(main(*sys.argv[1:]))
"""


def _start(main: str, url: str, name: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-c", _PROGRAM.format(folders=list(_FOLDERS), main=main), url, name),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


async def test_processes_that_start_together_all_find_the_schema(url: str) -> None:
    processes = [_start(_OPEN_TOGETHER, url) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    ended = [_finish(process) for process in processes]
    assert [(code, errors) for code, _, errors in ended] == [(0, "")] * 3

    database = await open_database(url, create=False)
    assert await Ledger(database).add_usage([usage_record()]) == 1
    await database.close()


async def test_processes_that_write_together_all_get_through(url: str) -> None:
    await (await open_database(url)).close()
    processes = [_start(_WRITE_BATCHES, url, name) for name in ("a", "b", "c")]
    ended = [_finish(process) for process in processes]
    assert [(code, errors) for code, _, errors in ended] == [(0, "")] * 3

    database = await open_database(url)
    assert len(await Ledger(database).usage()) == 3 * 40 * 25
    assert len(await KeyBook(database).list()) == 3 * 4
    await database.close()


async def test_a_process_killed_within_a_batch_leaves_nothing_of_it(url: str) -> None:
    process = _start(_DIE_WITHIN_A_BATCH, url)
    code, _, errors = _finish(process)
    assert (code, errors) == (-signal.SIGKILL, "")

    database = await open_database(url)
    ledger = Ledger(database)
    ids = {record.request_id for record in await ledger.usage()}
    assert ids == {f"whole-{n}" for n in range(1_500)}
    assert await ledger.add_usage([usage_record(f"lost-{n}") for n in range(5_000)]) == 5_000
    await database.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.05])
async def test_whenever_a_process_is_killed_acknowledged_batches_are_whole(
    url: str, delay_s: float
) -> None:
    process = _start(_WRITE_UNTIL_KILLED, url)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    await asyncio.sleep(delay_s)
    process.kill()
    # `communicate` would lose what `readline` has read ahead.
    acknowledged = [0, *(int(line) for line in process.stdout)]
    code, _, _ = _finish(process)
    assert code == -signal.SIGKILL

    database = await open_database(url)
    records = await Ledger(database).usage()
    await database.close()
    rows: dict[int, int] = {}
    for record in records:
        batch = int(record.request_id.partition("-")[0])
        rows[batch] = rows.get(batch, 0) + 1
    assert set(rows.values()) == {400}
    assert set(acknowledged) <= set(rows) <= {*acknowledged, acknowledged[-1] + 1}
