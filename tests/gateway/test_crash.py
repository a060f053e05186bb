"""Nothing that was answered is lost or counted twice, whatever is killed or away."""

import asyncio
import random
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.gateway.gateway_process import (
    GatewayProcess,
    Got,
    Site,
    ask,
    free_port,
    site,
    until,
    until_above,
)
from tests.gateway.stand import MESH_TOKEN
from tests.mock_rank import MockRank
from tests.store.postgresql import PostgresqlServer, postgresql_server

from expertmesh.core.domain.tenant import Limits
from expertmesh.core.metering.usage import Outcome
from expertmesh.store.keys import NewKey

pytestmark = pytest.mark.integration

CLIENTS = 20


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgresqlServer]:
    with postgresql_server() as server:
        yield server


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, quick_rank()) as made:
        yield made


def quick_rank() -> MockRank:
    return MockRank(tokens=32, token_interval_s=0.004, mesh_token=MESH_TOKEN)


@contextmanager
def write_lock(place: Site) -> Iterator[None]:
    """Nobody else can write to the SQLite store."""
    connection = sqlite3.connect(place.folder / "store.db", isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


async def pending(place: Site, gateway: GatewayProcess) -> float:
    return await place.metric(gateway, "em_gateway_usage_pending_records")


@dataclass
class Client:
    """Asks one thing after the other with a key of its own, whatever becomes of the gateway."""

    key: NewKey
    whole: list[Got] = field(default_factory=list)
    cut: list[Got] = field(default_factory=list)
    ended: bool = False

    async def run(self, place: Site, url: str, numbers: Iterator[int]) -> None:
        chance = random.Random(self.key.id)
        while not self.ended:
            got = await ask(place.http, url, self.key, next(numbers), chance.random() < 0.5)
            if got.status == 0:
                await asyncio.sleep(0.02)
            elif got.whole:
                if got.status == 503:
                    assert got.counted is None
                    await asyncio.sleep(0.02)
                    continue
                assert got.status == 200 and got.counted is not None
                self.whole.append(got)
            else:
                self.cut.append(got)


@pytest.mark.parametrize(
    ("kind", "rounds", "workers"),
    [("sqlite", 6, 1), ("postgresql", 2, 1), ("sqlite", 2, 2)],
    ids=["SQLite", "PostgreSQL", "two workers"],
)
async def test_whenever_it_is_killed_each_answer_has_one_row(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, rounds: int, workers: int
) -> None:
    store = None
    if kind == "postgresql":
        server: PostgresqlServer = request.getfixturevalue("postgresql")
        server.execute("CREATE DATABASE crash")
        store = server.url("crash")
    port, chance = free_port(), random.Random(rounds)
    async with site(tmp_path, quick_rank(), store) as place:
        numbers = iter(range(100_000))
        limits = Limits(usd_per_day=1000.0)
        clients = [Client(await place.key(f"team-{n}", limits)) for n in range(CLIENTS)]
        arguments = ("--workers", str(workers))
        gateway = await place.start(*arguments, port=port)
        tasks = [asyncio.create_task(one.run(place, gateway.url, numbers)) for one in clients]

        def answers() -> int:
            return sum(len(one.whole) for one in clients)

        for _ in range(rounds):
            await until_above(answers, answers() + 20)
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            await gateway.kill_all()
            assert "Traceback" not in gateway.errors
            gateway = await place.start(*arguments, port=port)
        await until_above(answers, answers() + 20)
        for one in clients:
            one.ended = True
        await asyncio.gather(*tasks)
        assert await gateway.stop() == 0
        assert [path.name for path in (place.state / "usage").iterdir()] == ["lock"]

        rows = await place.ledger.usage()
        ok = Counter(
            (row.key_id, row.prompt_tokens, row.completion_tokens)
            for row in rows
            if row.outcome is Outcome.OK
        )
        assert max(ok.values()) == 1
        begun = 0
        for one in clients:
            for got in one.whole:
                assert got.counted is not None and ok[(one.key.id, *got.counted)] == 1
            mine = [row for row in rows if row.key_id == one.key.id]
            errors = [row for row in mine if row.outcome is not Outcome.OK]
            begun_here = [got for got in one.cut if got.tokens]
            begun += len(begun_here)
            # A cut answer of which nothing was seen may have a row: it was on its way.
            assert len(begun_here) <= len(mine) - len(one.whole) <= len(one.cut)
            assert {row.outcome for row in errors} <= {Outcome.ERROR, Outcome.ABORTED}
            assert sum(row.completion_tokens for row in errors) <= 32 * len(one.cut)
        assert answers() > 40 * rounds / 2 and begun >= rounds


async def test_a_stream_cut_off_by_a_kill_is_paid_as_far_as_it_was_seen(place: Site) -> None:
    place.rank.token_interval_s = 0.05
    key, port = await place.key(), free_port()
    gateway = await place.start(port=port)
    stream = asyncio.create_task(ask(place.http, gateway.url, key, 31, True))
    await until(lambda: place.rank.running)
    await asyncio.sleep(0.5)
    await gateway.kill()
    got = await stream
    assert not got.whole and got.tokens > 3
    await place.start(port=port)
    (row,) = await place.rows(1)
    assert row.outcome is Outcome.ERROR and row.key_id == key.id
    assert row.completion_tokens - got.tokens in (0, 1)


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stop_does_not_wait_for_a_locked_store_and_loses_nothing(
    place: Site, workers: int
) -> None:
    key = await place.key()
    gateway = await place.start("--workers", str(workers))
    with write_lock(place):
        answers = await asyncio.gather(
            *(ask(place.spread, gateway.url, key, number) for number in range(40))
        )
        assert {answer.status for answer in answers} == {200}
        await asyncio.sleep(1.5)  # a write waits for the lock by now
        began_s = time.monotonic()
        assert await gateway.stop() == 0
        assert time.monotonic() - began_s < 10  # it is about 5 s where nobody else computes
        assert "Traceback" not in gateway.errors
        assert "stay in" in gateway.errors
        assert await place.ledger.usage() == ()
    await place.start()
    rows = await place.rows(40)
    used = sorted((row.prompt_tokens, row.completion_tokens) for row in rows)
    assert used == sorted(answer.counted for answer in answers if answer.counted)


async def test_a_locked_store_delays_rows_and_nothing_else(place: Site) -> None:
    place.rank.token_interval_s = 0.0
    key = await place.key()
    gateway = await place.start()
    with write_lock(place):
        got = [await ask(place.http, gateway.url, key, number) for number in range(40)]
        assert {one.status for one in got} == {200}
        assert await pending(place, gateway) == 40
        assert await place.ledger.usage() == ()
    rows = await place.rows(40)
    assert {(row.prompt_tokens, row.completion_tokens) for row in rows} == {
        one.counted for one in got
    }

    async def is_empty() -> bool:
        return await pending(place, gateway) == 0

    await until(is_empty)
    assert await gateway.stop() == 0


async def test_a_database_that_is_away_delays_rows_and_nothing_else(
    tmp_path: Path, postgresql: PostgresqlServer
) -> None:
    postgresql.execute("CREATE DATABASE away")
    async with site(tmp_path, quick_rank(), postgresql.url("away")) as place:
        key = await place.key("team-a", Limits(usd_per_day=1.0))
        gateway = await place.start("--workers", "2")
        assert (await ask(place.spread, gateway.url, key, 0)).status == 200
        await place.rows(1)
        postgresql.stop()
        try:
            answers = await asyncio.gather(
                *(ask(place.spread, gateway.url, key, number) for number in range(1, 41))
            )
            assert {one.status for one in answers} == {200}

            async def all_wait() -> bool:
                return await pending(place, gateway) == 40

            await until(all_wait)
            await until(lambda: "wait for the store" in gateway.errors)
        finally:
            postgresql.start()
        rows = await place.rows(41)
        assert len({(row.prompt_tokens, row.completion_tokens) for row in rows}) == 41
        assert "the store answers again" in gateway.errors
        assert await gateway.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_budget_outlives_a_kill_with_what_was_only_in_the_journal(
    place: Site, workers: int
) -> None:
    budget_usd = 0.001
    place.rank.token_interval_s = 0.0
    key, port = await place.key("team-a", Limits(usd_per_day=budget_usd)), free_port()
    arguments = ("--workers", str(workers))
    gateway = await place.start(*arguments, port=port)
    with write_lock(place):
        # Of these nothing gets to the ledger.
        got = [await ask(place.http, gateway.url, key, number % 32) for number in range(60)]
        assert {one.status for one in got} == {200}
        await gateway.kill_all()
    assert await place.ledger.usage() == ()
    again = asyncio.create_task(place.start(*arguments, port=port))
    statuses: Counter[int] = Counter()
    at_once: Counter[int] = Counter()
    while set(at_once) != {429}:
        # From the first moment at which the port is open.
        answers = await asyncio.gather(
            *(ask(place.spread, gateway.url, key, number) for number in range(20))
        )
        at_once = Counter(one.status for one in answers)
        statuses += at_once
        await asyncio.sleep(0.01)
    gateway = await again
    # A worker that has others beside it comes to the port when it can serve.
    assert workers == 1 or not statuses[503]
    assert await gateway.stop() == 0
    rows = await place.rows(60 + statuses[200])
    spent_usd = float(sum(row.tariff_usd for row in rows))
    assert 0.9 * budget_usd < spent_usd <= budget_usd
    assert len(rows) > 60
