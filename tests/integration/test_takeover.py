"""Two controller processes on one store: one leads, is killed or paused, and the other goes on.

Ray is a mock (tests/integration/ray_dashboard.py); processes, store, HTTP and the gateway's side of
the exchange are real.
"""

import asyncio
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.clients.kubernetes_server import EVENTS, LEASES, RAY_CLUSTERS, kubernetes_server
from tests.controller.fake_serve import FakeServe
from tests.integration.ray_dashboard import RayDashboard, quick_starts
from tests.store.postgresql import postgresql_server

from expertmesh.core.domain.fleet import Fleet, GroupState
from expertmesh.gateway.exchange import Exchange
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.store.database import open_database
from expertmesh.store.journal import Journal, JournalEntry

pytestmark = pytest.mark.integration

TOKEN = "the mesh token"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
TAKEOVER_S = 15.0
COMMAND = "import typer\nfrom expertmesh.cli.controller import controller\ntyper.run(controller)\n"
PLATFORM = """
kind: Platform
name: here
pools:
  - {name: small, market: local, usd_per_node_hour: 0.3, cpus_per_node: 1, nodes: {min: 6, max: 6}}
"""
MODEL = """
kind: ModelDeployment
name: tiny
model: {source: someone/tiny-moe, max_model_len: 1024}
parallelism: {expert: 2}
pools: [small]
scaling: {groups: {min: 2, max: 3}}
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class View:
    """As much of a fleet view and an admission as the exchange uses."""

    def __init__(self) -> None:
        self.fleet: Fleet | None = None
        self.applied: list[float] = []

    def apply(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.applied.append(time.monotonic())

    def reported(self) -> dict[str, Any]:
        return {}

    def traffic(self) -> dict[str, Any]:
        return {}

    def fleet_changed(self) -> None:
        pass

    def ready(self) -> list[str]:
        groups = self.fleet.groups if self.fleet is not None else ()
        return sorted(group.name for group in groups if group.state is GroupState.READY)


@dataclass
class Process:
    index: int
    url: str
    dashboard_port: int
    process: asyncio.subprocess.Process
    log: Path

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def text(self) -> str:
        return self.log.read_text()


@dataclass
class World:
    folder: Path
    store_url: str
    ports: list[int]
    dashboard_ports: list[int]
    dashboard: RayDashboard
    http: aiohttp.ClientSession
    view: View = field(default_factory=View)
    processes: dict[int, Process] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Of both controllers."""

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    async def start(self, index: int) -> Process:
        log = self.folder / f"controller-{index}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                COMMAND,
                *("-f", "platform.yaml", "-f", "model.yaml", "--port", str(self.ports[index])),
                *("--dashboard-url", f"http://127.0.0.1:{self.dashboard_ports[index]}"),
                *("--store", self.store_url, "--host", "127.0.0.1", *self.options),
                cwd=self.folder,
                env={**os.environ, "EXPERTMESH_MESH_TOKEN": TOKEN},
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
            )
        started = Process(index, self.urls[index], self.dashboard_ports[index], process, log)
        self.processes[index] = started
        return started

    async def get(self, process: Process, path: str) -> tuple[int, dict[str, Any]]:
        async with self.http.get(process.url + path, headers=AUTH) as response:
            return response.status, await response.json()

    async def gauges(self, process: Process) -> dict[str, float]:
        async with self.http.get(process.url + "/metrics", headers=AUTH) as response:
            lines = (await response.text()).splitlines()
        return {
            line.split()[0]: float(line.split()[1])
            for line in lines
            if line.startswith(("em_controller_leads", "em_controller_term"))
        }

    async def until(self, what: Callable[[], bool], limit_s: float, why: str) -> float:
        began_s = time.monotonic()
        while not what():
            if time.monotonic() - began_s > limit_s:
                logs = "\n".join(process.text()[-3000:] for process in self.processes.values())
                raise AssertionError(f"not within {limit_s:g} s: {why}\n{logs}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began_s

    async def listens(self, process: Process) -> None:
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            try:
                async with self.http.get(process.url + "/healthz") as response:
                    assert response.status == 200
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)
        raise AssertionError(process.text())

    async def leading_pair(self) -> tuple[Process, Process]:
        """A leader whose two groups are ready, and a follower."""
        leader = await self.start(0)
        await self.listens(leader)
        await self.until(lambda: "this controller leads" in leader.text(), 10, "the first leads")
        follower = await self.start(1)
        await self.listens(follower)
        await self.until(lambda: len(self.view.ready()) == 2, 30, "two groups are ready")
        return leader, follower

    async def entries(self) -> list[JournalEntry]:
        database = await open_database(self.store_url)
        try:
            return list(await Journal(database).read(limit=10_000))
        finally:
            await database.close()

    async def starts(self) -> list[str]:
        return [
            action["group"]
            for entry in await self.entries()
            if entry.kind == "decision"
            for action in entry.payload["decision"]["actions"]
            if action["kind"] == "start"
        ]


@asynccontextmanager
async def running_world(folder: Path, store_url: str) -> AsyncIterator[World]:
    (folder / "platform.yaml").write_text(PLATFORM)
    (folder / "model.yaml").write_text(MODEL)
    dashboard = RayDashboard(FakeServe(time.time, {"small": 6}))  # type: ignore[arg-type]
    ports = free_ports(4)
    await dashboard.start(*ports[2:])
    async with aiohttp.ClientSession() as http:
        world = World(folder, store_url, ports[:2], ports[2:], dashboard, http)
        view: Any = world.view
        exchange = Exchange(
            http,
            ",".join(world.urls),
            TOKEN,
            "gateway-1",
            view,
            view,
            GatewayLimits(),
            asyncio.Event(),
        )
        exchanging = asyncio.create_task(exchange.run())
        try:
            with quick_starts():
                yield world
        finally:
            exchanging.cancel()
            await asyncio.gather(exchanging, return_exceptions=True)
            for process in world.processes.values():
                if process.process.returncode is None:
                    process.process.kill()
                await process.process.wait()
            await dashboard.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path, f"sqlite+aiosqlite:///{tmp_path}/store.db") as world:
        yield world


async def _killed_leader_is_replaced(world: World) -> None:
    leader, follower = await world.leading_pair()
    puts, groups = len(world.dashboard.puts), world.view.ready()
    assert (await world.get(follower, "/readyz")) == (200, {"status": "ready", "role": "follower"})
    status, body = await world.get(follower, "/v1/fleet")
    assert (status, body["error"]["leader"]) == (503, leader.url)
    assert world.dashboard.reads[follower.dashboard_port] == 0

    leader.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    await world.until(lambda: "this controller leads" in follower.text(), TAKEOVER_S, "takeover")
    led_s = time.monotonic() - killed_s
    await world.until(
        lambda: world.view.applied[-1] > killed_s + led_s, TAKEOVER_S - led_s, "the gateway has it"
    )
    told_s = time.monotonic() - killed_s
    print(f"takeover after kill -9: leads after {led_s:.1f} s, the gateway knows at {told_s:.1f} s")
    assert told_s <= TAKEOVER_S

    await asyncio.sleep(8)
    assert world.view.ready() == groups
    assert set(world.dashboard.restarts.values()) == {0}
    assert len(world.dashboard.puts) == puts
    assert sorted(await world.starts()) == groups
    gauges = await world.gauges(follower)
    assert gauges == {"em_controller_leads": 1.0, "em_controller_term": 2.0}


async def test_a_killed_leader_is_replaced_within_15_s_and_no_group_notices(world: World) -> None:
    await _killed_leader_is_replaced(world)


async def test_a_killed_leader_is_replaced_on_postgresql_too(tmp_path: Path) -> None:
    with postgresql_server() as server:
        async with running_world(tmp_path, server.url("postgres")) as world:
            await _killed_leader_is_replaced(world)


async def test_a_killed_leader_is_replaced_by_a_lease_of_kubernetes(
    world: World, tmp_path: Path
) -> None:
    async with kubernetes_server(tmp_path) as server:
        server.put(RAY_CLUSTERS, "em", spec={})
        world.options = ("--lease", "kubernetes", "--kubeconfig", str(server.kubeconfig))
        world.options += ("--ray-cluster", "em", "--spot-notices", "kubernetes")
        await _killed_leader_is_replaced(world)
        spec = server.objects[LEASES, "here-controller"]["spec"]
        assert spec["leaseTransitions"] == 2
        reasons = [item["reason"] for (where, _), item in server.objects.items() if where == EVENTS]
        assert reasons == ["StartGroup", "StartGroup"]
        assert {method for method, _ in server.requests} <= {"GET", "WATCH", "POST", "PUT", "PATCH"}


async def test_without_its_lease_the_leader_stops_and_nobody_acts(
    world: World, tmp_path: Path
) -> None:
    async with kubernetes_server(tmp_path) as server:
        world.options = ("--lease", "kubernetes", "--kubeconfig", str(server.kubeconfig))
        leader, follower = await world.leading_pair()
        port, groups, puts = server.port, world.view.ready(), len(world.dashboard.puts)
        await server.stop()
        took_s = await world.until(lambda: "term 1 is over" in leader.text(), 12, "it stops")
        assert took_s <= 9.0
        status, _ = await world.get(leader, "/readyz")
        assert status == 503
        assert (await world.get(leader, "/healthz"))[0] == 200
        await asyncio.sleep(6)
        assert "this controller leads" not in follower.text()
        await server.start(port)
        await world.until(
            lambda: sum(p.text().count("this controller leads") for p in (leader, follower)) == 2,
            15,
            "one of them leads again",
        )
        await asyncio.sleep(8)
        assert world.view.ready() == groups
        assert len(world.dashboard.puts) == puts


async def test_a_leader_killed_while_it_starts_groups_starts_none_twice(world: World) -> None:
    world.dashboard.answers_puts.clear()
    leader = await world.start(0)
    await world.listens(leader)
    follower = await world.start(1)
    await world.listens(follower)
    await world.until(lambda: bool(world.dashboard.puts), 20, "the first PUT")
    leader.signal(signal.SIGKILL)
    world.dashboard.answers_puts.set()
    await world.until(lambda: len(world.view.ready()) == 2, 30, "both groups are ready")
    await asyncio.sleep(6)
    asked = [put.groups for put in world.dashboard.puts]
    new = [name for before, after in zip([(), *asked], asked, strict=False) for name in after]
    assert asked == sorted(set(asked), key=asked.index), "no PUT twice"
    assert set(new) == set(world.view.ready())
    assert sorted(await world.starts()) == world.view.ready()
    assert set(world.dashboard.restarts.values()) == {0}


async def test_a_paused_leader_that_comes_back_late_does_nothing(world: World) -> None:
    leader, follower = await world.leading_pair()
    leader.signal(signal.SIGSTOP)
    await world.until(lambda: "this controller leads" in follower.text(), TAKEOVER_S, "takeover")
    await world.until(lambda: "decision" in follower.text(), 10, "its first decision")
    # Something to do: whoever leads starts the missing groups again.
    late = len(world.dashboard.puts)
    world.dashboard.serve.forget_everything()
    leader.signal(signal.SIGCONT)
    await world.until(lambda: "term 1 is over" in leader.text(), 20, "it follows")
    await world.until(lambda: len(world.dashboard.puts) > late, 90, "the new leader acts")
    await asyncio.sleep(3)
    assert {put.port for put in world.dashboard.puts[late:]} == {follower.dashboard_port}
    assert leader.process.returncode is None
    assert (await world.get(leader, "/readyz")) == (200, {"status": "ready", "role": "follower"})
    assert await world.gauges(leader) == {"em_controller_leads": 0.0, "em_controller_term": 0.0}
    kinds = [entry.kind for entry in await world.entries()]
    assert kinds.count("term") == 2


async def test_a_clean_stop_hands_over_at_once(world: World) -> None:
    leader, follower = await world.leading_pair()
    puts = len(world.dashboard.puts)
    leader.signal(signal.SIGTERM)
    took_s = await world.until(
        lambda: "this controller leads" in follower.text(), TAKEOVER_S, "takeover"
    )
    print(f"takeover after SIGTERM: {took_s:.1f} s")
    assert took_s <= 5.0
    assert await leader.process.wait() == 0
    await asyncio.sleep(3)
    assert len(world.dashboard.puts) == puts


async def test_a_store_that_is_locked_for_long_ends_the_term_and_nothing_else(
    world: World, tmp_path: Path
) -> None:
    leader, follower = await world.leading_pair()
    groups, puts = world.view.ready(), len(world.dashboard.puts)
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        took_s = await world.until(lambda: "term 1 is over" in leader.text(), 20, "it stops")
        await asyncio.sleep(4)
        assert "this controller leads" not in follower.text()
        other.execute("ROLLBACK")
    assert took_s <= 14.0
    await world.until(
        lambda: sum(p.text().count("this controller leads") for p in (leader, follower)) == 2,
        TAKEOVER_S,
        "one of them leads again",
    )
    await asyncio.sleep(8)
    assert world.view.ready() == groups
    assert len(world.dashboard.puts) == puts
    assert set(world.dashboard.restarts.values()) == {0}


async def test_one_that_is_killed_and_started_again_at_once_need_not_wait(world: World) -> None:
    leader = await world.start(0)
    await world.listens(leader)
    await world.until(lambda: len(world.view.ready()) == 2, 30, "two groups are ready")
    leader.signal(signal.SIGKILL)
    await leader.process.wait()
    again = await world.start(0)
    await world.listens(again)
    took_s = await world.until(
        lambda: again.text().count("this controller leads") == 2, TAKEOVER_S, "it leads again"
    )
    assert took_s <= 3.0
