"""A ledger as the real parts write it, gateway's writer and controller's keeper, adds up."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random

import pytest
from tests.store.records import NOON_S

from expertmesh.controller.holds import CapacityKeeper
from expertmesh.core.domain.fleet import (
    ExternalRoute,
    GroupSpec,
    GroupState,
    Parallelism,
    ServedModel,
)
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.metering.capacity import WHOLE_POOL
from expertmesh.core.metering.rating import price, total_usd
from expertmesh.core.metering.report import By
from expertmesh.core.metering.usage import Outcome
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.gateway.usage_journal import Closed, UsageJournal
from expertmesh.gateway.usage_writer import UsageWriter
from expertmesh.store.database import Database
from expertmesh.store.focus import focus_rows
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_cells

_POOLS = (
    # Three groups on a node, whose shares do not come out even; and one that takes half.
    Pool("od", Market.ON_DEMAND, 1.1, None, 0, 3, 0, 4),
    Pool("spot", Market.SPOT, 0.7, None, 0, 4, 0, 4),
)
_WORKERS = {"od": 1, "spot": 2}
_ROUTE = ExternalRoute("api", "https://api", "m", "KEY", 0.9, 0.45, 3.3)
_MODELS = [ServedModel("m", 4096, 2.0, 1.0, 8.0, 30.0, external=(_ROUTE,))]
_LASTS_S = 900


@dataclass(frozen=True)
class _Node:
    node_id: str
    pool: str
    alive: bool = True


@dataclass
class _Cluster:
    """Nodes come and go, groups start, serve, drain and end, at random."""

    random: Random
    nodes: dict[str, _Node] = field(default_factory=dict)
    groups: dict[str, GroupRecord] = field(default_factory=dict)
    ended: list[GroupRecord] = field(default_factory=list)
    count: int = 0

    def turn(self, now_s: float) -> None:
        self.count += 1
        if self.random.random() < 0.03 and len(self.nodes) < 4:
            node = _Node(f"node-{self.count}", self.random.choice(("od", "spot")))
            self.nodes[node.node_id] = node
        if self.random.random() < 0.01 and self.nodes:
            del self.nodes[self.random.choice(sorted(self.nodes))]
        if self.random.random() < 0.03 and len(self.groups) < 6:
            pool = self.random.choice(_POOLS)
            workers = _WORKERS[pool.name]
            name = f"em-m-{pool.name}-{self.count}"
            spec = GroupSpec(
                *(name, "m", "/m", pool.name, Parallelism(1, workers, workers), 4096),
                usd_per_hour=pool.usd_per_hour(workers),
            )
            self.groups[name] = GroupRecord(spec, GroupState.STARTING, now_s, now_s)
        for name, record in list(self.groups.items()):
            if self.random.random() < 0.02:
                self._change(name, record, now_s)

    def _change(self, name: str, record: GroupRecord, now_s: float) -> None:
        following = {
            GroupState.STARTING: GroupState.READY,
            GroupState.READY: GroupState.DRAINING,
        }.get(record.state)
        if following is None:
            self.ended.append(self.groups.pop(name))
        else:
            self.groups[name] = GroupRecord(
                record.spec, following, now_s, record.requested_at_s, served=True
            )

    def requests(self, now_s: float) -> Iterator[Closed]:
        """Those that end now."""
        serving = [r for r in self.groups.values() if r.state is not GroupState.STARTING]
        for number in range(self.random.randrange(3)):
            record = self.random.choice([*serving, None])
            group, pool = ("api", "api") if record is None else (record.spec.name, record.spec.pool)
            duration_s = self.random.expovariate(1 / 20)
            prompt = self.random.randrange(3000)
            yield Closed(
                request_id=f"r{self.count}-{number}",
                at_s=now_s - duration_s,
                tenant=self.random.choice(("acme", "zoo")),
                key_id=self.random.choice(("key_1", "key_2")),
                model="m",
                group=group,
                pool=pool,
                endpoint="chat_completions",
                outcome=Outcome.OK,
                prompt_tokens=prompt,
                cached_tokens=prompt // 3,
                completion_tokens=self.random.randrange(400),
                queue_s=duration_s / 10,
                ttft_s=None,
                duration_s=duration_s,
                usd_per_mtok_in=2.0,
                usd_per_mtok_cached=1.0,
                usd_per_mtok_out=8.0,
            )


@pytest.mark.parametrize("seed", [1, 2])
async def test_what_the_parts_have_written_adds_up(database: Database, seed: int) -> None:
    ledger = Ledger(database)
    cluster = _Cluster(Random(seed))
    keeper = CapacityKeeper(ledger, _POOLS, _MODELS, lambda spec: GroupRates(8, 5000.0, 300.0))
    journal = UsageJournal()
    writer = UsageWriter(ledger, journal, 1.0)
    closed: list[Closed] = []
    for second in range(_LASTS_S):
        now_s = NOON_S + second
        cluster.turn(now_s)
        for record in cluster.ended:
            keeper.end(record, now_s)
        cluster.ended.clear()
        # Now and then Ray's dashboard does not answer.
        nodes = None if second % 97 == 5 else list(cluster.nodes.values())
        await keeper.write(list(cluster.groups.values()), now_s, nodes)
        for request in cluster.requests(now_s):
            writer.record(request)
            closed.append(request)
        if second % 60 == 59:
            journal.maintain()
            assert await writer.flush()
    await keeper.write(list(cluster.groups.values()), NOON_S + _LASTS_S + 5, ())
    await writer.close(1.0)
    await asyncio.sleep(0)

    found = await usage_cells(ledger)
    totals = [found.grouped(by).total for by in By]
    assert all(each == totals[0] for each in totals)
    total = totals[0]
    parts = (
        total.attributed_nano_usd,
        total.idle_nano_usd,
        total.starting_nano_usd,
        total.draining_nano_usd,
        total.idle_nodes_nano_usd,
    )
    assert min(parts) > 0 and sum(parts) == total.capacity_nano_usd

    # The nodes are known all the time, so our capacity costs what they cost.
    exact = Fraction(0)
    for node in await ledger.nodes():
        if node.node_id != WHOLE_POOL:
            held_s = Fraction(node.held_until_s) - Fraction(node.started_at_s)
            exact += held_s * Fraction(repr(node.usd_per_hour)) * 10**9 / 3600
    ours = total.capacity_nano_usd - total.external_nano_usd
    assert abs(ours - exact) < 2000

    bought = [request for request in closed if request.pool == "api"]
    counts = [(c.prompt_tokens, c.cached_tokens, c.completion_tokens) for c in bought]
    bill = total_usd(price(_ROUTE, *each) for each in counts)
    assert bought and abs(total.external_nano_usd - Fraction(bill) * 10**9) <= len(bought) / 2
    tariff = total_usd(
        price(c, c.prompt_tokens, c.cached_tokens, c.completion_tokens) for c in closed
    )
    assert (total.requests, total.tariff_usd) == (len(closed), tariff)
    assert found.since_s is not None and found.until_s is not None
    rows = focus_rows(found.cells, found.since_s, found.until_s)
    assert sum(Fraction(str(row["BilledCost"])) for row in rows) == Fraction(total.capacity_usd)
