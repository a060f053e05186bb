"""Several workers behind one port: one gateway to its clients, whichever of them answers."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil
import pytest
from tests.gateway.gateway_process import (
    GatewayProcess,
    Site,
    ask,
    free_port,
    site,
    until,
    until_above,
    write_platform,
)
from tests.gateway.stand import MESH_TOKEN
from tests.mock_rank import MockRank

from expertmesh.core.domain.tenant import Limits

pytestmark = pytest.mark.integration

WORKERS = 3
PAGE = "https://chat.example"


def rank() -> MockRank:
    return MockRank(tokens=32, token_interval_s=0.002, mesh_token=MESH_TOKEN)


def workers_of(place: Site, gateway: GatewayProcess) -> set[int]:
    """Those that live and have reported."""
    return set(place.served()) & {child.pid for child in gateway.children()}


def limit_server_of(place: Site, gateway: GatewayProcess) -> psutil.Process:
    (server,) = (one for one in gateway.children() if one.pid not in place.served())
    return server


async def all_workers(place: Site, gateway: GatewayProcess) -> set[int]:
    await until(lambda: len(workers_of(place, gateway)) == WORKERS)
    return workers_of(place, gateway)


async def gone(processes: list[psutil.Process], timeout_s: float = 10) -> None:
    await until(lambda: not [one for one in processes if one.is_running()], timeout_s)


async def test_limits_and_metrics_are_those_of_all_workers(tmp_path: Path) -> None:
    async with site(tmp_path, rank()) as place:
        # A mounted volume that others may write to.
        place.state.mkdir()
        (place.state / "limits").mkdir()
        for folder in (place.state, place.state / "limits"):
            folder.chmod(0o2777)
        by_requests = await place.key("by-requests", Limits(requests_per_min=50))
        # At most some 150 bytes and 5 tokens are reserved: 200 * 0.2 + 5 * 0.6 for a million.
        by_money = await place.key("by-money", Limits(usd_per_day=0.002))
        revoked = await place.key("revoked")
        gateway = await place.start("--workers", str(WORKERS))
        pids = await all_workers(place, gateway)

        started_s = time.monotonic()
        answers = await asyncio.gather(
            *(ask(place.spread, gateway.url, by_requests) for _ in range(200))
        )
        refilled = int((time.monotonic() - started_s) * 50 / 60)
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200, 429} and 50 <= statuses[200] <= 50 + refilled
        asked, refused = 200, statuses[429]

        paid = 0
        while True:
            answers = await asyncio.gather(
                *(ask(place.spread, gateway.url, by_money, number % 5) for number in range(60))
            )
            asked += 60
            statuses = Counter(answer.status for answer in answers)
            assert set(statuses) <= {200, 429}
            paid += statuses[200]
            refused += statuses[429]
            if not statuses[200]:
                break
        rows = await place.rows(paid, "by-money")
        assert 0.0019 < sum(row.tariff_usd for row in rows) <= 0.002

        await until(lambda: set(place.served()) >= pids and all(place.served()[p] for p in pids))

        async def tell_the_same() -> bool:
            counts = {await place.metric(gateway, "em_gateway_requests_total") for _ in range(12)}
            assert max(counts) <= asked
            return counts == {asked}

        await until(tell_the_same, 10)
        assert await place.metric(gateway, "em_gateway_requests_total", status="429") == refused

        assert (await ask(place.spread, gateway.url, revoked)).status == 200
        assert await place.keys.revoke(revoked.id, time.time())
        revoked_s = last_s = time.monotonic()
        while time.monotonic() < revoked_s + 3.0:
            asked_s = time.monotonic()
            if (await ask(place.spread, gateway.url, revoked)).status == 200:
                last_s = asked_s
        assert last_s - revoked_s < 2.0

        family = gateway.children()
        assert len(family) == WORKERS + 1
        assert await gateway.stop() == 0
        assert not [one for one in family if one.is_running()]
        assert "Traceback" not in gateway.errors
        assert not list((place.state / "limits").iterdir())


async def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    file = write_platform(tmp_path / "platform.yaml", workers=WORKERS)
    async with site(tmp_path, rank()) as place:
        key = await place.key("team-a", Limits(usd_per_day=1000.0))
        gateway = await place.start("--config", str(file))
        write_platform(file, workers=WORKERS, cors_origins=[PAGE])
        gateway.signal(signal.SIGHUP)
        await until(lambda: gateway.errors.count("configuration again") == WORKERS)
        whole: list[tuple[int, int]] = []
        cut: list[int] = []
        counts: list[float] = []
        tokens: list[float] = []
        numbers = iter(range(100_000))
        ended = False

        async def client(stream: bool) -> None:
            while not ended:
                got = await ask(place.spread, gateway.url, key, next(numbers), stream)
                if got.whole:
                    assert got.status == 200 and got.counted is not None
                    whole.append(got.counted)
                else:
                    cut.append(got.tokens)

        async def watch() -> None:
            while not ended:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    counts.append(await place.metric(gateway, "em_gateway_requests_total"))
                    tokens.append(await place.metric(gateway, "em_gateway_tokens_total"))
                await asyncio.sleep(0.05)

        clients = [asyncio.create_task(client(number % 2 == 0)) for number in range(20)]
        clients.append(asyncio.create_task(watch()))
        before = await all_workers(place, gateway)
        killed = random.Random(1).sample(sorted(before), 2)
        for pid in killed:
            await until_above(lambda: len(whole), len(whole) + 50)
            worker = psutil.Process(pid)
            worker.kill()
            await gone([worker])
            await all_workers(place, gateway)
        new = workers_of(place, gateway) - before
        assert len(new) == 2
        await until(lambda: all(place.served()[pid] for pid in new))
        ended = True
        await asyncio.gather(*clients)
        assert counts == sorted(counts) and tokens == sorted(tokens) and counts[-1] > 100

        answers = await asyncio.gather(
            *(ask(place.spread, gateway.url, key, next(numbers), Origin=PAGE) for _ in range(30))
        )
        assert {one.headers["access-control-allow-origin"] for one in answers} == {PAGE}
        whole += [one.counted for one in answers if one.counted]

        errors = gateway.errors
        assert errors.count("ended with -9 and is replaced") == 2
        assert await gateway.stop() == 0
        rows = await place.ledger.usage()
        counted = Counter(
            (row.prompt_tokens, row.completion_tokens) for row in rows if row.outcome == "ok"
        )
        assert [pair for pair in whole if counted[pair] != 1] == []
        assert max(counted.values()) == 1
        begun = sum(seen > 0 for seen in cut)
        assert len(whole) + begun <= len(rows) <= len(whole) + len(cut)
        assert sorted(path.name for path in (place.state / "usage").iterdir()) == ["lock"]


async def test_budgets_hold_when_the_limit_server_is_killed(tmp_path: Path) -> None:
    budget_usd = 0.008
    async with site(tmp_path, rank()) as place:
        key = await place.key("team-a", Limits(usd_per_day=budget_usd))
        gateway = await place.start("--workers", str(WORKERS))
        await all_workers(place, gateway)
        statuses: Counter[int] = Counter()

        async def client(number: int) -> None:
            in_a_row = 0
            while in_a_row < 5:
                got = await ask(place.spread, gateway.url, key, number % 30)
                statuses[got.status] += 1
                in_a_row = in_a_row + 1 if got.status == 429 else 0
                if got.status == 503:
                    await asyncio.sleep(0.02)

        clients = [asyncio.create_task(client(number)) for number in range(30)]
        for _ in range(2):
            await until_above(lambda: statuses[200], statuses[200] + 40)
            server = limit_server_of(place, gateway)
            server.kill()
            await until(lambda: statuses[503] > 0)
        await asyncio.gather(*clients)
        assert set(statuses) == {200, 429, 503}
        assert gateway.errors.count("the limit server ended with -9 and is replaced") == 2
        assert await gateway.stop() == 0
        spent = sum(row.tariff_usd for row in await place.ledger.usage())
        assert budget_usd / 2 < float(spent) <= budget_usd


async def test_all_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    async with site(tmp_path, MockRank(token_interval_s=0.05, mesh_token=MESH_TOKEN)) as place:
        key, port = await place.key("team-a", Limits(usd_per_day=1.0)), free_port()
        gateway = await place.start("--workers", str(WORKERS), port=port)
        family = gateway.children()
        assert len(family) == WORKERS + 1
        stream = asyncio.create_task(ask(place.http, gateway.url, key, 7, True))
        await until(lambda: place.rank.running)
        await gateway.kill()
        assert (await stream).whole
        await gone(family)
        again = await place.start("--workers", "2", port=port)
        assert (await ask(place.http, again.url, key)).status == 200
        assert await again.stop() == 0
        assert len(await place.ledger.usage()) == 2


async def test_what_a_terminal_sends_to_all_ends_them_once(tmp_path: Path) -> None:
    slow = MockRank(tokens=30, token_interval_s=0.05, mesh_token=MESH_TOKEN)
    async with site(tmp_path, slow) as place:
        key = await place.key()
        gateway = await place.start("--workers", "2")
        family = gateway.children()
        stream = asyncio.create_task(ask(place.http, gateway.url, key, 29, True))
        await until(lambda: place.rank.running)
        os.killpg(gateway.process.pid, signal.SIGINT)
        got = await stream
        assert got.whole and got.tokens == 30
        assert await asyncio.wait_for(gateway.process.wait(), 10) == 0
        assert not [one for one in family if one.is_running()]


async def test_lines_of_the_access_log_stay_whole_when_its_reader_is_slow(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        async with site(tmp_path, rank()) as place:
            key = await place.key()
            gateway = await place.start("--workers", str(WORKERS), stdout=writing)
            os.close(writing)
            await all_workers(place, gateway)
            sent = 0
            for _ in range(6):
                # The lines of 300 requests fill the pipe.
                await asyncio.gather(*(ask(place.spread, gateway.url, key) for _ in range(100)))
                sent += 100
            gateway.signal(signal.SIGTERM)
            text = await asyncio.to_thread(_read_slowly, reading)
            assert await asyncio.wait_for(gateway.process.wait(), 20) == 0
            (tmp_path / "read.log").write_bytes(text)
            gateway.access_log = tmp_path / "read.log"
            assert len({line["usage_id"] for line in gateway.lines()}) == sent
    finally:
        os.close(reading)


def _read_slowly(fd: int) -> bytes:
    text = b""
    while data := os.read(fd, 1000):
        text += data
        time.sleep(0.001)
    return text
