"""The keeper on a real ledger: what it sees is written, and what cannot be written waits."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import event
from tests.store.records import NOON_S

from expertmesh.controller.holds import CapacityKeeper
from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.fleet import (
    ExternalRoute,
    GroupSpec,
    GroupState,
    Parallelism,
    ServedModel,
)
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.metering.capacity import WHOLE_POOL, NodeHold
from expertmesh.core.metering.report import UsageRow
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.errors import UpstreamUnavailable
from expertmesh.store.database import Database, open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_cells

POOL = Pool("h200", Market.ON_DEMAND, 8.0, "H200", 8, 1, 0, 4)
SPEC = GroupSpec("em-m-h200-1", "m", "/m", "h200", Parallelism(1, 4, 4), 4096, 4.0, "h200")


@dataclass(frozen=True)
class Node:
    node_id: str
    pool: str | None = "h200"
    alive: bool = True


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await open_database(f"sqlite:///{tmp_path}/store.db")
    yield opened
    await opened.close()


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


@pytest.fixture
def keeper(ledger: Ledger) -> CapacityKeeper:
    return CapacityKeeper(ledger, [POOL])


def record(
    state: GroupState = GroupState.STARTING, since_s: float = 0, removed_s: float | None = None
) -> GroupRecord:
    removed_at_s = None if removed_s is None else NOON_S + removed_s
    return GroupRecord(SPEC, state, NOON_S + since_s, NOON_S, removed_at_s=removed_at_s)


async def look(
    keeper: CapacityKeeper,
    at_s: float,
    nodes: Iterable[Node] | None,
    records: Iterable[GroupRecord] = (),
) -> None:
    await keeper.write(records, NOON_S + at_s, nodes)


async def spans(ledger: Ledger) -> dict[str, list[tuple[float, float, bool]]]:
    """By node: from, until, and whether it goes on."""
    found: dict[str, list[tuple[float, float, bool]]] = {}
    for node in await ledger.nodes():
        span = node.started_at_s - NOON_S, node.held_until_s - NOON_S, node.ended_at_s is None
        found.setdefault(node.node_id, []).append(span)
    return found


async def test_a_node_is_held_while_ray_lists_it(ledger: Ledger, keeper: CapacityKeeper) -> None:
    await look(keeper, 0, [Node("a")])
    await look(keeper, 6, [Node("a"), Node("b"), Node("head", None), Node("x", "unknown")])
    await look(keeper, 9, [Node("a", alive=False), Node("b")])
    await look(keeper, 20, [Node("b")])
    assert await spans(ledger) == {
        "a": [(0, 9, False)],
        "b": [(6, 20, True)],
        WHOLE_POOL: [(0, 20, True)],
    }
    assert {node.usd_per_hour for node in await ledger.nodes()} == {0.0, 8.0}


async def test_a_look_that_failed_ends_nothing(ledger: Ledger, keeper: CapacityKeeper) -> None:
    await look(keeper, 0, [Node("a")])
    for at_s in range(6, 60, 6):
        await look(keeper, at_s, None)
    assert await spans(ledger) == {"a": [(0, 0, True)], WHOLE_POOL: [(0, 0, True)]}
    await look(keeper, 60, [Node("a")])
    assert await spans(ledger) == {"a": [(0, 60, True)], WHOLE_POOL: [(0, 60, True)]}


async def test_after_a_long_time_without_a_look_only_what_is_still_there_was_there(
    ledger: Ledger, keeper: CapacityKeeper
) -> None:
    await look(keeper, 0, [Node("a"), Node("b")])
    await look(keeper, 500, [Node("b"), Node("c")])
    assert await spans(ledger) == {
        "a": [(0, 0, False)],
        "b": [(0, 500, True)],
        "c": [(500, 500, True)],
        WHOLE_POOL: [(0, 0, False), (500, 500, True)],
    }


async def test_the_next_controller_continues_the_nodes_that_are_still_there(ledger: Ledger) -> None:
    await look(CapacityKeeper(ledger, [POOL]), 0, [Node("a"), Node("b")])
    again = CapacityKeeper(ledger, [POOL])
    await look(again, 30, None)
    await look(again, 40, [Node("b")])
    assert await spans(ledger) == {
        "a": [(0, 0, False)],
        "b": [(0, 40, True)],
        WHOLE_POOL: [(0, 40, True)],
    }
    await look(CapacityKeeper(ledger, [POOL]), 300, [Node("b")])
    assert (await spans(ledger))[WHOLE_POOL] == [(0, 40, False), (300, 300, True)]
    assert (await spans(ledger))["b"] == [(0, 300, True)]


async def test_a_new_price_counts_from_the_start_of_the_controller_that_has_it(
    ledger: Ledger,
) -> None:
    await look(CapacityKeeper(ledger, [POOL]), 0, [Node("a")])
    dearer = CapacityKeeper(ledger, [replace(POOL, usd_per_node_hour=9.0)])
    await look(dearer, 20, [Node("a")])
    await look(dearer, 30, [Node("a")])
    prices = [
        (n.usd_per_hour, n.started_at_s - NOON_S, n.held_until_s - NOON_S)
        for n in await ledger.nodes()
        if n.node_id == "a"
    ]
    assert prices == [(8.0, 0, 20), (9.0, 20, 30)]


async def test_without_pools_nodes_are_no_matter(ledger: Ledger) -> None:
    await look(CapacityKeeper(ledger), 0, [Node("a")], [record()])
    assert await ledger.nodes() == ()
    assert len(await ledger.capacity()) == 1


async def test_the_states_of_a_group_come_with_it(ledger: Ledger, keeper: CapacityKeeper) -> None:
    await keeper.write([record()], NOON_S + 1)
    (hold,) = await ledger.capacity()
    assert (hold.ready_at_s, hold.draining_at_s) == (None, None)
    await keeper.write([record(GroupState.READY, 30)], NOON_S + 31)
    # Its gang was restarted: it had been ready all the same.
    await keeper.write([record(GroupState.LOST, 40)], NOON_S + 41)
    await keeper.write([record(GroupState.READY, 50)], NOON_S + 51)
    (hold,) = await ledger.capacity()
    assert (hold.ready_at_s, hold.draining_at_s) == (NOON_S + 30, None)
    await keeper.write([record(GroupState.DRAINING, 60)], NOON_S + 61)
    assert (await ledger.capacity())[0].draining_at_s == NOON_S + 60
    # Recalled, and drained again.
    await keeper.write([record(GroupState.READY, 70)], NOON_S + 71)
    assert (await ledger.capacity())[0].draining_at_s is None
    last = record(GroupState.DRAINING, 80)
    await keeper.write([last], NOON_S + 81)
    keeper.end(last, NOON_S + 90)
    await keeper.write([], NOON_S + 91)
    (hold,) = await ledger.capacity()
    assert (hold.ready_at_s, hold.draining_at_s, hold.ended_at_s) == (
        NOON_S + 30,
        NOON_S + 80,
        NOON_S + 90,
    )


async def test_a_start_that_is_given_up_drains_from_its_removal(
    ledger: Ledger, keeper: CapacityKeeper
) -> None:
    await keeper.write([record(GroupState.LOST, 50, removed_s=50)], NOON_S + 60)
    (hold,) = await ledger.capacity()
    assert (hold.ready_at_s, hold.draining_at_s) == (None, NOON_S + 50)


async def test_rates_and_draw_come_with_it(ledger: Ledger) -> None:
    h200 = Accelerator("H200", Era.HOPPER, 1, 1.0, {}, tdp_watts=700.0)
    keeper = CapacityKeeper(
        ledger, [POOL], rates=lambda spec: GroupRates(8, 1e4, 2e3), accelerators={"H200": h200}
    )
    await look(keeper, 0, [Node("a")], [record()])
    (hold,) = await ledger.capacity()
    assert (hold.prefill_tokens_per_s, hold.decode_tokens_per_s) == (1e4, 2e3)
    assert (hold.idle_watts, hold.busy_watts) == pytest.approx((4 * 105.0, 4 * 581.0))
    nodes = {node.node_id: node.idle_watts for node in await ledger.nodes()}
    assert nodes == {"a": pytest.approx(8 * 105.0), WHOLE_POOL: None}


async def test_tariffs_of_providers_are_written_once(ledger: Ledger) -> None:
    route = ExternalRoute("api", "https://a", "m", "KEY", 0.1, 0.05, 0.4)
    models = [ServedModel("m", 4096, 1.0, 1.0, 1.0, 30.0, external=(route,))]
    keeper = CapacityKeeper(ledger, models=models)
    await keeper.write([], NOON_S + 1)
    await keeper.write([], NOON_S + 9)
    await CapacityKeeper(ledger, models=models).write([], NOON_S + 20)
    (tariff,) = await ledger.provider_tariffs()
    assert (tariff.model, tariff.pool, tariff.since_s) == ("m", "api", NOON_S + 1)
    assert tariff.prices == (0.1, 0.05, 0.4)


async def test_a_clock_that_was_set_back_stops_no_writing(
    ledger: Ledger, keeper: CapacityKeeper
) -> None:
    await look(keeper, 5000, [Node("a")], [record()])
    await look(keeper, 10, [Node("a")], [record()])
    await look(keeper, 12, [Node("a")], [record(GroupState.READY, 11)])
    await look(keeper, 16, [Node("a")], [record(GroupState.READY, 11)])
    (hold,) = await ledger.capacity()
    # What was seen is not taken back.
    assert (hold.seen_at_s, hold.ready_at_s) == (NOON_S + 5000, NOON_S + 11)


def _limit(database: Database, pages: int) -> None:
    """Of every connection that is opened from now on: a disk that is full."""

    def configure(connection: sqlite3.Connection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count={pages}")
        cursor.close()

    event.listen(database.engine.sync_engine, "connect", configure)


async def test_a_full_store_gets_all_of_it_later(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    await (await open_database(url)).close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()

    full = await open_database(url)
    await full.engine.dispose()
    _limit(full, pages)
    kept = Ledger(full)
    keeper = CapacityKeeper(kept, [POOL])
    # More than fits on the pages that there are.
    many = [Node(f"node-{n:05}-{'x' * 100}") for n in range(200)]
    groups = [
        replace(record(), spec=replace(SPEC, name=f"em-m-h200-{n}-{'y' * 100}")) for n in range(200)
    ]
    with pytest.raises(UpstreamUnavailable, match="full"):
        await look(keeper, 0, many, groups)
    assert (await kept.capacity(), await kept.nodes()) == ((), ())
    for group in groups[1:]:
        keeper.end(group, NOON_S + 3)
    with pytest.raises(UpstreamUnavailable, match="full"):
        await look(keeper, 3, many[:1], groups[:1])
    assert (await kept.capacity(), await kept.nodes()) == ((), ())
    await full.engine.dispose()
    _limit(full, 1_000_000)

    await look(keeper, 4, many[:1], groups[:1])
    holds, nodes = await kept.capacity(), await kept.nodes()
    assert (len(holds), len(nodes)) == (200, 201)
    assert sum(hold.ended_at_s == NOON_S + 3 for hold in holds) == 199
    assert sum(node.ended_at_s == NOON_S + 3 for node in nodes) == 199
    assert {node.started_at_s for node in nodes} == {NOON_S}
    await full.close()


async def test_a_locked_store_gets_all_of_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.store.database._LOCK_WAIT_S", 0.2)
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    ledger = Ledger(database)
    keeper = CapacityKeeper(ledger, [POOL])
    await look(keeper, 0, [Node("a")], [record()])
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        keeper.end(record(), NOON_S + 7)
        with pytest.raises(UpstreamUnavailable, match="locked"):
            await look(keeper, 7, [])
        with pytest.raises(UpstreamUnavailable, match="locked"):
            await look(keeper, 8, [])
        other.execute("ROLLBACK")
    (hold,) = await ledger.capacity()
    assert hold.ended_at_s is None
    await look(keeper, 9, [])
    (hold,) = await ledger.capacity()
    assert hold.ended_at_s == NOON_S + 7
    assert (await spans(ledger))["a"] == [(0, 7, False)]
    await database.close()


class _FailsOnce:
    """A ledger whose commit is not answered: whether it has the rows is not known."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.fails = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._ledger, name)

    async def hold_capacity(self, *arguments: object) -> None:
        await self._ledger.hold_capacity(*arguments)  # type: ignore[arg-type]
        if self.fails:
            self.fails = False
            raise UpstreamUnavailable("no answer")


async def test_what_was_taken_without_an_answer_is_not_counted_twice(ledger: Ledger) -> None:
    unsure = _FailsOnce(ledger)
    keeper = CapacityKeeper(unsure, [POOL])  # type: ignore[arg-type]
    await look(keeper, 0, [Node("a")], [record()])
    keeper.end(record(), NOON_S + 6)
    unsure.fails = True
    with pytest.raises(UpstreamUnavailable):
        await look(keeper, 6, [])
    await look(keeper, 7, [])
    (hold,) = await ledger.capacity()
    assert hold.ended_at_s == NOON_S + 6
    assert (await spans(ledger))["a"] == [(0, 6, False)]


async def test_what_the_keeper_wrote_adds_up(ledger: Ledger, keeper: CapacityKeeper) -> None:
    """A day in the life of two nodes and a group, second by second."""
    state, since_s = GroupState.STARTING, 0.0
    for at_s in range(0, 300):
        nodes = [Node("a")] if at_s < 200 else [Node("a"), Node("b")]
        if at_s == 60:
            state, since_s = GroupState.READY, 60.0
        if at_s == 250:
            state, since_s = GroupState.DRAINING, 250.0
        await look(keeper, at_s, nodes, [record(state, since_s)])
        await asyncio.sleep(0)
    keeper.end(record(state, since_s), NOON_S + 300)
    await look(keeper, 300, [])
    cells = await usage_cells(ledger)
    total = sum(cells.cells.values(), start=UsageRow())
    second = 8 * 10**9 // 3600
    assert total.capacity_nano_usd == pytest.approx(400 * second, abs=1000)
    assert total.starting_nano_usd == pytest.approx(60 * second / 2, abs=1000)
    assert total.idle_nano_usd == pytest.approx(190 * second / 2, abs=1000)
    assert total.draining_nano_usd == pytest.approx(50 * second / 2, abs=1000)
    assert total.idle_nodes_nano_usd == pytest.approx(250 * second, abs=1000)
    held: list[NodeHold] = [n for n in await ledger.nodes() if n.node_id != WHOLE_POOL]
    assert sorted(node.held_until_s - node.started_at_s for node in held) == [100, 300]
