"""Two gateways that share limits through a real Redis."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.gateway.gateway_process import GatewayProcess, Site, ask, site, until, write_platform
from tests.gateway.redis_server import RedisServer, redis_server
from tests.gateway.stand import MESH_TOKEN
from tests.mock_rank import MockRank

from expertmesh.core.domain.tenant import Limits
from expertmesh.store.keys import NewKey

pytestmark = pytest.mark.integration


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as started:
        yield started


async def start_two(
    place: Site, redis: RedisServer, choice: str, workers_of_second: int = 1
) -> list[GatewayProcess]:
    limits = {
        "store": "redis",
        "redis_url_variable": "SOME_REDIS_URL",
        "on_unavailable": choice,
    }
    file = write_platform(place.folder / "platform.yaml", limits=limits)
    return [
        await place.start(
            *("--config", str(file), "--workers", str(workers)),
            state=place.folder / name,
            SOME_REDIS_URL=redis.url,
        )
        for name, workers in (("one", 1), ("two", workers_of_second))
    ]


async def ask_both(
    place: Site, gateways: list[GatewayProcess], key: NewKey, count: int
) -> Counter[int]:
    answers = await asyncio.gather(
        *(ask(place.spread, gateways[number % 2].url, key, number % 32) for number in range(count))
    )
    return Counter(answer.status for answer in answers)


async def test_two_gateways_let_in_what_one_may(tmp_path: Path, redis: RedisServer) -> None:
    rank = MockRank(tokens=32, token_interval_s=0.002, mesh_token=MESH_TOKEN)
    async with site(tmp_path, rank) as place:
        by_requests = await place.key("by-requests", Limits(requests_per_min=100))
        by_money = await place.key("by-money", Limits(usd_per_day=0.003))
        gateways = await start_two(place, redis, "closed", workers_of_second=2)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        statuses = await ask_both(place, gateways, by_requests, 400)
        refilled = int((loop.time() - started_s) * 100 / 60)
        assert set(statuses) == {200, 429} and 100 <= statuses[200] <= 100 + refilled
        paid = 0
        while (statuses := await ask_both(place, gateways, by_money, 60))[200]:
            assert set(statuses) <= {200, 429}
            paid += statuses[200]
        rows = await place.rows(paid, "by-money")
        assert 0.0028 < sum(row.tariff_usd for row in rows) <= 0.003
        assert {(row.tenant, row.outcome) for row in rows} == {("by-money", "ok")}
        assert [await gateway.stop() for gateway in gateways] == [0, 0]


@pytest.mark.parametrize("choice", ["closed", "open"])
async def test_while_redis_is_away_the_configured_choice_holds(
    tmp_path: Path, redis: RedisServer, choice: str
) -> None:
    async with site(tmp_path) as place:
        key = await place.key("team-a", Limits(usd_per_day=0.0002))
        gateways = await start_two(place, redis, choice)
        before = await ask_both(place, gateways, key, 20)
        assert before[200] and set(before) <= {200, 429}
        redis.kill()
        expected = {200} if choice == "open" else {503}
        without: Counter[int] = Counter()

        async def is_noticed() -> bool:
            statuses = await ask_both(place, gateways, key, 4)
            assert set(statuses) <= {*expected, 503}
            without.update(statuses)
            return set(statuses) == expected

        await until(is_noticed)
        statuses = await ask_both(place, gateways, key, 40)
        assert set(statuses) == expected
        without += statuses
        redis.start()

        async def counts_again() -> bool:
            statuses = await ask_both(place, gateways, key, 20)
            without.update(statuses)
            return set(statuses) == {429} if choice == "open" else bool(statuses[429])

        # It has lost its data, and is told from the ledger what was spent.
        await until(counts_again)
        assert [await gateway.stop() for gateway in gateways] == [0, 0]
        rows = await place.rows(before[200] + without[200])
        spent = sum(row.tariff_usd for row in rows)
        assert spent <= 0.0002 if choice == "closed" else spent > 0.0002
        for gateway in gateways:
            assert "Traceback" not in gateway.errors
            assert gateway.errors.count("Redis is away") == 1
