"""Workers that share the book of a limit server."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.gateway.limiting import (
    NOON_S,
    PICO,
    account,
    reserve,
    running,
    until,
)

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import Estimate, Headroom, LimitKind, Refused, Reserved
from expertmesh.errors import SetupError
from expertmesh.gateway import limit_client
from expertmesh.gateway.limit_client import SharedLimiter
from expertmesh.gateway.limit_server import LimitServer
from expertmesh.gateway.limiter import OnUnavailable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path() -> Iterator[Path]:
    # Not below pytest's own folder, whose names are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="em-limits-") as folder:
        yield Path(folder) / "limits.sock"


@pytest.fixture
async def server(path: Path) -> AsyncIterator[LimitServer]:
    started = LimitServer(LimitBook(), path, grace_s=0.2)
    await started.start()
    yield started
    await started.close()


def limiter_at(
    path: Path, choice: OnUnavailable = "closed", timeout_s: float = 5.0
) -> SharedLimiter:
    return SharedLimiter(path, uuid.uuid4().hex, choice, timeout_s)


async def test_grants_refusals_and_settlements(server: LimitServer, path: Path) -> None:
    limiter = limiter_at(path)
    tenant = account(requests_per_min=60, tokens_per_min=600)
    key = account("key:k", usd_per_day=1.0, concurrent_requests=2)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert await reserve(limiter, "a", tenant, key, tokens=60, usd=0.75) == Reserved(
            Headroom(60, 59, 1.0, 600, 540, 6.0)
        )
        refused = await reserve(limiter, "b", tenant, key, tokens=60, usd=0.5)
        assert refused == Refused(
            LimitKind.USD_PER_DAY, "key:k", 1.0, 43_200.0, Headroom(60, 59, 1.0, 600, 540, 6.0)
        )
        limiter.settle("a", 0, PICO // 4, NOON_S)
        limiter.settle("b", 0, 0, NOON_S)
        limiter.settle("never", 0, 0, NOON_S)
        again = await reserve(limiter, "b", tenant, key, tokens=60, usd=0.5)
        assert again == Reserved(Headroom(60, 58, 2.0, 600, 540, 6.0))
        assert await reserve(limiter, "c", account("key:k", usd_per_day=1.0)) == Reserved(None)
        assert server.book.committed_pico_usd("key:k")[0] == 3 * PICO // 4
        assert server.book.open_reservations == 2


async def test_without_accounts_no_call_is_made(path: Path) -> None:
    assert await reserve(limiter_at(path), "a") == Reserved(None)


async def test_limits_may_change(server: LimitServer, path: Path) -> None:
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", account(usd_per_day=1.0), usd=1.0), Reserved)
        assert isinstance(await reserve(limiter, "b", account(usd_per_day=1.0), usd=0.5), Refused)
        assert isinstance(await reserve(limiter, "b", account(usd_per_day=2.0), usd=0.5), Reserved)


async def test_all_calls_of_a_turn_travel_in_one_write(
    server: LimitServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    frames = limit_client.frames
    monkeypatch.setattr(
        limit_client,
        "frames",
        lambda messages: written.append(len(messages)) or frames(messages),  # type: ignore[func-returns-value]
    )
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        written.clear()
        acme = account(usd_per_day=1.0)
        await asyncio.gather(*(reserve(limiter, f"r{n}", acme) for n in range(2_500)))
        assert written == [2_501]  # The account is told once.


async def test_three_workers_and_a_thousand_calls_at_once_against_a_budget_worth_a_hundred(
    server: LimitServer, path: Path
) -> None:
    acme = account(usd_per_day=1.0)
    limiters = [limiter_at(path) for _ in range(3)]
    async with running(limiters[0]), running(limiters[1]), running(limiters[2]):
        for limiter in limiters:
            assert await limiter.wait_connected(5)
        answers = await asyncio.gather(
            *(
                reserve(limiters[number % 3], f"r{number}", acme, usd=0.01)
                for number in range(1_000)
            )
        )
        assert sum(isinstance(answer, Reserved) for answer in answers) == 100
        assert server.book.committed_pico_usd("tenant:acme") == (PICO, PICO)


@pytest.mark.integration
async def test_three_processes_against_a_budget_worth_a_hundred(
    server: LimitServer, path: Path
) -> None:
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.gateway.limit_worker", str(path), f"w{number}", "334"),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
            stdout=subprocess.PIPE,
        )
        for number in range(3)
    ]
    granted = [int((await worker.communicate())[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(granted) == 100, granted


async def test_a_caller_that_goes_away_owes_nothing(server: LimitServer, path: Path) -> None:
    limiter = limiter_at(path)
    acme = account(usd_per_day=1.0, concurrent_requests=1)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        answer = limiter.reserve("a", (acme,), Estimate(0, PICO), NOON_S)
        assert isinstance(answer, asyncio.Future)
        answer.cancel()
        await until(lambda: not limiter._asked, "the answer")
        assert isinstance(await reserve(limiter, "b", acme, usd=1.0), Reserved)


async def test_a_worker_that_is_gone_has_its_reservations_kept_as_estimated(
    server: LimitServer, path: Path
) -> None:
    acme = account(usd_per_day=1.0, concurrent_requests=1)
    lost = limiter_at(path)
    task = asyncio.create_task(lost.run())
    assert await lost.wait_connected(5)
    assert isinstance(await reserve(lost, "a", acme, usd=0.75), Reserved)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert lost._connection is not None
    lost._connection.abort()
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        # Within the grace it may come back.
        answer = await reserve(limiter, "b", acme)
        assert isinstance(answer, Refused) and answer.kind is LimitKind.CONCURRENT_REQUESTS
        await until(lambda: server.book.open_reservations == 0, "the end of the grace")
        assert server.book.committed_pico_usd("tenant:acme")[0] == 3 * PICO // 4
        assert isinstance(await reserve(limiter, "b", acme, usd=0.25), Reserved)


async def test_a_worker_that_comes_back_settles_what_it_has_open(
    server: LimitServer, path: Path
) -> None:
    acme = account(usd_per_day=1.0)
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=1.0), Reserved)
        assert limiter._connection is not None
        limiter._connection.abort()
        await until(lambda: not limiter.connected, "the loss of the connection")
        limiter.settle("a", 0, PICO // 4, NOON_S)  # It is away: kept, and told later.
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "b", acme, usd=0.75), Reserved)
        assert not limiter._unsettled
        await asyncio.sleep(0.3)  # Longer than the grace: the timer must not be running any more.
        assert server.book.open_reservations == 1


async def test_a_new_server_learns_what_is_open(path: Path) -> None:
    acme = account(usd_per_day=1.0, concurrent_requests=1)
    first = LimitServer(LimitBook(), path)
    await first.start()
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=0.75), Reserved)
        await first.close()
        await until(lambda: not limiter.connected, "the loss of the connection")
        second = LimitServer(LimitBook(), path)
        await second.start()
        assert await limiter.wait_connected(5)
        answer = await reserve(limiter, "b", acme, usd=0.25)
        assert isinstance(answer, Refused) and answer.kind is LimitKind.CONCURRENT_REQUESTS
        limiter.settle("a", 0, PICO // 2, NOON_S)
        assert isinstance(await reserve(limiter, "b", acme, usd=0.5), Reserved)
        assert second.book.committed_pico_usd("tenant:acme")[0] == PICO
        await second.close()


@pytest.mark.parametrize("choice", ["open", "closed"])
async def test_while_the_server_is_away_the_configured_choice_holds(
    path: Path, choice: OnUnavailable
) -> None:
    acme = account(usd_per_day=1.0)
    limiter = limiter_at(path, choice)

    def is_choice(answer: Reserved | Refused) -> bool:
        if choice == "open":
            return answer == Reserved(None)
        return isinstance(answer, Refused) and answer.kind is LimitKind.UNAVAILABLE

    async with running(limiter):
        assert is_choice(await reserve(limiter, "early", acme, usd=5.0))
        limiter.settle("early", 0, 0, NOON_S)
        server = LimitServer(LimitBook(), path)
        await server.start()
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=0.5), Reserved)
        assert not is_choice(await reserve(limiter, "b", acme, usd=0.75))
        waiting = [limiter.reserve(f"w{n}", (acme,), Estimate(0, 0), NOON_S) for n in range(5)]
        await server.close()
        for answer in waiting:
            assert isinstance(answer, asyncio.Future)
            assert isinstance(await answer, Reserved | Refused)
        await until(lambda: not limiter.connected, "the loss of the connection")
        assert is_choice(await reserve(limiter, "c", acme, usd=5.0))
        assert limiter.unavailable_calls >= 2


async def test_a_server_that_hangs_is_away_after_the_timeout(path: Path) -> None:
    hanging = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hanging
        hanging += 1
        # A greeting, and then nothing.
        await reader.read(4_096)
        writer.write(b"\x00\x00\x00\x05\x91\x92\x00\xa1x")
        await reader.read()
        writer.close()
        await writer.wait_closed()
        hanging -= 1

    server = await asyncio.start_unix_server(hang, str(path))
    limiter = limiter_at(path, "closed", timeout_s=0.1)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        started_s = time.monotonic()
        answer = await reserve(limiter, "a", account(usd_per_day=1.0))
        took_s = time.monotonic() - started_s
        assert isinstance(answer, Refused) and answer.kind is LimitKind.UNAVAILABLE
        assert 0.1 <= took_s < 2.0
        assert [one.reservation_id for one in limiter._unsettled] == ["a"]
    server.close()
    await until(lambda: hanging == 0, "the end of the connections")


async def test_settlements_that_nobody_takes_are_bounded(
    path: Path, server: LimitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_client, "_MOST_UNSETTLED", 3)
    limiter = limiter_at(path)
    acme = account(requests_per_min=1_000)
    task = asyncio.create_task(limiter.run())
    assert await limiter.wait_connected(5)
    for number in range(5):
        assert isinstance(await reserve(limiter, f"r{number}", acme), Reserved)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert limiter._connection is not None
    limiter._connection.abort()
    await until(lambda: not limiter.connected, "the loss of the connection")
    for number in range(5):
        limiter.settle(f"r{number}", 0, 0, NOON_S)
    assert len(limiter._unsettled) == 3 and limiter.dropped_settlements == 2
    await limiter.close()


async def test_nonsense_ends_only_the_connection_that_sent_it(
    server: LimitServer, path: Path
) -> None:
    for nonsense in (
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\x05",
        b"\x00\x00\x00\x03\x91\x91\x09",
        # A reservation before the greeting, and one for an account that was never defined.
        b"\x00\x00\x00\x0a\x91\x97\x02\x01\xa1a\x90\x00\x00\x00",
        b"\x00\x00\x00\x0f\x92\x92\x00\xa1w\x97\x02\x01\xa1a\x91\x07\x00\x00\x00",
    ):
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(nonsense)
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionResetError):
                while await reader.read(100):
                    pass
                raise ConnectionResetError("closed")
        writer.close()
    limiter = limiter_at(path)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", account(usd_per_day=1.0)), Reserved)


async def test_only_this_user_may_connect(path: Path) -> None:
    folder = path.parent / "made"
    server = LimitServer(LimitBook(), folder / "limits.sock")
    await server.start()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "limits.sock").stat().st_mode) == 0o600
    await server.close()
    assert not (folder / "limits.sock").exists()
    folder.chmod(0o777)
    with pytest.raises(SetupError, match="0700"):
        await server.start()


async def test_a_second_server_is_refused(server: LimitServer, path: Path) -> None:
    with pytest.raises(SetupError, match="another limit server"):
        await LimitServer(LimitBook(), path).start()
    await asyncio.sleep(0.05)  # The first one takes the connection that tried it.
    assert not server._connections


async def test_the_socket_of_a_server_that_was_killed_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    assert os.access(path, os.F_OK)
    server = LimitServer(LimitBook(), path)
    await server.start()
    await server.close()


async def test_a_path_that_no_socket_can_have_is_refused(path: Path) -> None:
    with pytest.raises(SetupError, match="at most 107 bytes"):
        await LimitServer(LimitBook(), path.parent / ("x" * 120)).start()
    os.mknod(path)
    with pytest.raises(SetupError, match="no socket"):
        await LimitServer(LimitBook(), path).start()
    assert os.access(path, os.F_OK)
