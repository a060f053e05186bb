"""A limit server that takes the place of one that was killed, while workers settle and ask."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from tests.gateway.limiting import NOON_S, PICO, account, reserve, running, until

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import LimitKind, Refused, Reserved
from expertmesh.gateway.limit_client import SharedLimiter
from expertmesh.gateway.limit_server import LimitServer

ACME = account(usd_per_day=1.0)


@pytest.fixture
def path() -> Iterator[Path]:
    # Not below pytest's own folder, whose names are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="em-limits-") as folder:
        yield Path(folder) / "limits.sock"


async def lose(server: LimitServer, *limiters: SharedLimiter) -> None:
    await server.close()
    await until(lambda: not any(limiter.connected for limiter in limiters), "the loss")


async def test_what_is_settled_while_the_server_is_away_is_counted_by_the_next(
    path: Path,
) -> None:
    first = LimitServer(LimitBook(), path)
    await first.start()
    limiter = SharedLimiter(path, "worker", "closed", timeout_s=5.0)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", ACME, usd=0.75), Reserved)
        await lose(first, limiter)
        limiter.settle("a", 0, PICO // 2, NOON_S)
        second = LimitServer(LimitBook(), path)
        await second.start()
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "b", ACME, usd=0.75), Refused)
        assert second.book.committed_pico_usd("tenant:acme")[0] == PICO // 2
        assert not limiter._unsettled and not limiter._settling
        await second.close()


async def test_nothing_is_granted_until_all_workers_had_time_to_tell_what_is_open(
    path: Path,
) -> None:
    first = LimitServer(LimitBook(), path)
    await first.start()
    quick, late = (SharedLimiter(path, name, "closed", timeout_s=5.0) for name in ("quick", "late"))
    async with running(quick):
        task = asyncio.create_task(late.run())
        assert await quick.wait_connected(5) and await late.wait_connected(5)
        assert isinstance(await reserve(quick, "c", ACME, usd=0.125), Reserved)
        assert isinstance(await reserve(late, "a", ACME, usd=0.75), Reserved)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await lose(first, quick, late)
        second = LimitServer(LimitBook(), path, adopt_s=1.0)
        await second.start()
        await until(lambda: second.book.open_reservations == 1, "the first worker's return")
        answer = await reserve(quick, "b", ACME, usd=0.5)
        assert isinstance(answer, Refused) and answer.kind is LimitKind.UNAVAILABLE
        quick.settle("c", 0, 0, NOON_S)  # Not told yet: it is, when the time is over.
        async with running(late):
            await until(lambda: second.book.open_reservations == 2, "the second worker's return")
            assert await quick.wait_connected(5) and await late.wait_connected(5)
            answer = await reserve(quick, "b", ACME, usd=0.5)
            assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_DAY
            assert second.book.committed_pico_usd("tenant:acme")[0] == 3 * PICO // 4
        await second.close()


def test_it_works_on_the_loop_that_workers_run_on(path: Path) -> None:
    async def ask() -> Reserved | Refused:
        server = LimitServer(LimitBook(), path)
        await server.start()
        limiter = SharedLimiter(path, "worker", "closed", timeout_s=5.0)
        async with running(limiter):
            assert await limiter.wait_connected(5)
            answer = await reserve(limiter, "a", ACME, usd=0.75)
        await server.close()
        return answer

    assert isinstance(uvloop.run(ask()), Reserved)
