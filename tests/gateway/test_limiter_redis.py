"""Limits in a real Redis."""

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import redis
from msgspec.structs import astuple
from tests.gateway.limiting import (
    NOON_S,
    PICO,
    FixedSpend,
    account,
    reserve,
    running,
    until,
)
from tests.gateway.redis_server import RedisServer, redis_server

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import (
    Estimate,
    Headroom,
    LimitKind,
    Refused,
    Reserved,
)
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.gateway import redis_limiter
from expertmesh.gateway.limiter import OnUnavailable, SpendSource
from expertmesh.gateway.redis_limiter import RedisLimiter

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with redis_server() as started:
        yield started


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    with redis.Redis(port=shared_server.port) as client:
        client.flushall()
    return shared_server


def limiter_at(
    server: RedisServer,
    choice: OnUnavailable = "closed",
    *,
    source: SpendSource | None = None,
    timeout_s: float = 5.0,
    reservation_s: float = 1e9,
    lease_s: float = 10.0,
) -> RedisLimiter:
    """Most tests live in January, so that reservations must not be too old for the real clock."""
    return RedisLimiter(
        server.url,
        source,
        choice,
        timeout_s=timeout_s,
        reservation_s=reservation_s,
        lease_s=lease_s,
    )


def is_unavailable(answer: Reserved | Refused) -> bool:
    return isinstance(answer, Refused) and answer.kind is LimitKind.UNAVAILABLE


async def settled(limiter: RedisLimiter) -> None:
    await until(lambda: not limiter._unsettled, "the settlement")


async def test_grants_refusals_and_settlements(server: RedisServer) -> None:
    limiter = limiter_at(server)
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
        limiter.settle("a", 0, 0, NOON_S)
        limiter.settle("never", 0, 0, NOON_S)
        await settled(limiter)
        again = await reserve(limiter, "b", tenant, key, tokens=60, usd=0.5)
        assert again == Reserved(Headroom(60, 58, 2.0, 600, 540, 6.0))
        assert await reserve(limiter, "c", account("key:k", usd_per_day=1.0)) == Reserved(None)
        limiter.settle("b", 60, PICO, NOON_S)
        await settled(limiter)
        assert limiter.clipped_nano_usd == 500_000_000


async def test_without_accounts_no_call_is_made() -> None:
    limiter = RedisLimiter("redis://127.0.0.1:1/0", None, "closed")
    assert await reserve(limiter, "a") == Reserved(None)
    await limiter.close()


async def test_three_gateways_and_a_thousand_calls_at_once_against_a_budget_worth_a_hundred(
    server: RedisServer,
) -> None:
    acme = account(usd_per_day=1.0)
    limiters = [limiter_at(server) for _ in range(3)]
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
        assert not any(is_unavailable(answer) for answer in answers)


RATES = (None, None, 0, 7, 60, 600)
BUDGETS = (None, None, 0.0, 0.3, 2.5)


@pytest.mark.parametrize("seed", range(4))
async def test_it_decides_like_the_book(server: RedisServer, seed: int) -> None:
    """The same calls, in the same order, with changing limits and over the end of a month."""
    random = Random(seed)
    book, limiter = LimitBook(), limiter_at(server)
    now_s = NOON_S + 30_000
    open_ids: list[str] = []
    accounts: dict[str, Account] = {}
    kinds: set[object] = set()
    async with running(limiter):
        assert await limiter.wait_connected(5)
        for number in range(400):
            now_s += random.choice((0.0, 0.0, 0.5, 3.0, 100.0))
            if not accounts or random.random() < 0.1:
                accounts = {
                    name: Account(
                        name,
                        Limits(
                            random.choice(RATES),
                            random.choice(RATES),
                            random.choice((None, None, 0, 3)),
                            random.choice(BUDGETS),
                            random.choice(BUDGETS),
                        ),
                    )
                    for name in ("tenant:a", "tenant:b", "key:1")
                }
            chosen = tuple(random.sample(list(accounts.values()), random.randint(1, 3)))
            tokens = random.choice((0, 1, 20, 100, 1_000))
            estimate = Estimate(tokens, random.randint(0, 10**8) * 1_000)
            one_id = f"r{number}"
            expected = book.reserve(one_id, chosen, estimate, now_s)
            answer = limiter.reserve(one_id, chosen, estimate, now_s)
            assert isinstance(answer, asyncio.Future)
            actual = await answer
            assert type(actual) is type(expected), (number, actual, expected)
            if isinstance(actual, Refused) and isinstance(expected, Refused):
                assert (actual.kind, actual.account, actual.limit) == (
                    expected.kind,
                    expected.account,
                    expected.limit,
                ), number
                assert actual.retry_after_s == pytest.approx(expected.retry_after_s)
                kinds.add(actual.kind)
            else:
                open_ids.append(one_id)
            assert (actual.headroom is None) == (expected.headroom is None)
            if actual.headroom is not None and expected.headroom is not None:
                # A remainder that is all but whole may be rounded to either side.
                for one, other in zip(
                    astuple(actual.headroom), astuple(expected.headroom), strict=True
                ):
                    assert one == pytest.approx(other, abs=1e-5), number
            while open_ids and random.random() < 0.45:
                settled_id = open_ids.pop(random.randrange(len(open_ids)))
                used = random.choice((0, 5, 100, 1_500)), random.randint(0, 10**8) * 1_000
                assert book.settle(settled_id, *used, now_s)
                limiter.settle(settled_id, *used, now_s)
                await settled(limiter)
    assert limiter.clipped_nano_usd * 1_000 == book.clipped_pico_usd > 0
    assert len(kinds) >= 4, kinds


async def test_a_fraction_of_a_nano_dollar_is_rounded_up(server: RedisServer) -> None:
    limiter = limiter_at(server)
    acme = account(usd_per_day=2e-9)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        estimate = Estimate(0, 1)
        for number in range(2):
            answer = limiter.reserve(f"r{number}", (acme,), estimate, NOON_S)
            assert isinstance(answer, asyncio.Future) and isinstance(await answer, Reserved)
        answer = limiter.reserve("more", (acme,), estimate, NOON_S)
        assert isinstance(answer, asyncio.Future) and isinstance(await answer, Refused)


async def test_a_reservation_that_is_too_old_stays_as_estimated(server: RedisServer) -> None:
    acme = account(usd_per_day=1.0, concurrent_requests=1)
    now_s = time.time()
    limiter = limiter_at(server, reservation_s=0.2)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=0.75, at_s=now_s), Reserved)
        await asyncio.sleep(0.2)
        await limiter._give_up_lost()
        assert isinstance(await reserve(limiter, "b", acme, usd=0.25, at_s=now_s), Reserved)
        assert isinstance(await reserve(limiter, "c", acme, usd=0.25, at_s=now_s), Refused)
        limiter.settle("a", 0, 0, now_s)
        limiter.settle("b", 0, PICO // 4, now_s)
        await settled(limiter)
        answer = await reserve(limiter, "c", acme, usd=0.25, at_s=now_s)
        assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_DAY


_HOLDER = """
import asyncio, sys, time
from expertmesh.core.admission.reservation import Estimate, Reserved
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.gateway.redis_limiter import RedisLimiter

async def main():
    limiter = RedisLimiter(sys.argv[1], None, "closed", timeout_s=5.0, lease_s=float(sys.argv[2]))
    task = asyncio.create_task(limiter.run())
    assert await limiter.wait_connected(5)
    acme = Account("tenant:acme", Limits(concurrent_requests=200, usd_per_day=1.0))
    for number in range(200):
        answer = await limiter.reserve(f"h{number}", (acme,), Estimate(0, 10**9), time.time())
        assert isinstance(answer, Reserved)
    print("holds", flush=True)
    await task

asyncio.run(main())
"""
HOLDS: dict[str, Any] = {"concurrent_requests": 200, "usd_per_day": 1.0}


@contextmanager
def holder(server: RedisServer, lease_s: float) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds all of the concurrent requests."""
    with subprocess.Popen(
        (
            *("setpriv", "--pdeathsig", "KILL"),
            *(sys.executable, "-c", _HOLDER, server.url, str(lease_s)),
        ),
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"holds\n"
            yield process
        finally:
            process.kill()


async def test_what_a_killed_gateway_holds_ends_with_its_lease(server: RedisServer) -> None:
    acme, now_s = account(**HOLDS), time.time()
    limiter = limiter_at(server, lease_s=3.0)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        with holder(server, 3.0) as process:
            await asyncio.sleep(4.5)
            answer = await reserve(limiter, "a", acme, at_s=now_s)
            assert isinstance(answer, Refused), "a gateway that lives keeps its lease"
            assert answer.kind is LimitKind.CONCURRENT_REQUESTS
            process.send_signal(signal.SIGKILL)
            killed_s = time.monotonic()
            while isinstance(await reserve(limiter, "a", acme, usd=0.8, at_s=now_s), Refused):
                assert time.monotonic() - killed_s < 9.0
                await asyncio.sleep(0.05)
            # Nobody knows what its requests cost: money stays as estimated.
            answer = await reserve(limiter, "b", acme, usd=0.001, at_s=now_s)
            assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_DAY
        with redis.Redis(port=server.port) as client:
            assert client.hlen("expertmesh:limits:held") == 1
            assert client.zcard("expertmesh:limits:gateways") == 1
            assert client.hget("expertmesh:limits:account:tenant:acme", "o") == b"1"


async def test_a_gateway_that_starts_frees_what_a_killed_one_held(server: RedisServer) -> None:
    acme = account(**HOLDS)
    with holder(server, 3.0):
        pass  # and killed
    limiter = limiter_at(server, lease_s=3.0)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        started_s = time.monotonic()
        while isinstance(await reserve(limiter, "a", acme, at_s=time.time()), Refused):
            assert time.monotonic() - started_s < 9.0
            await asyncio.sleep(0.05)


async def test_no_gateway_is_lost_because_redis_was_away(server: RedisServer) -> None:
    acme = account(concurrent_requests=1)
    first, second = (limiter_at(server, timeout_s=0.2, lease_s=3.0) for _ in range(2))
    async with running(first), running(second):
        assert await first.wait_connected(5) and await second.wait_connected(5)
        assert isinstance(await reserve(first, "a", acme, at_s=time.time()), Reserved)
        await asyncio.sleep(3.5)
        server.freeze()
        try:
            await until(lambda: not first.connected and not second.connected, "the outage")
            await asyncio.sleep(3.5)
        finally:
            server.thaw()
        assert await first.wait_connected(5) and await second.wait_connected(5)
        until_s = time.monotonic() + 4.5
        while time.monotonic() < until_s:
            answer = await reserve(second, "b", acme, at_s=time.time())
            assert isinstance(answer, Refused) and answer.kind is LimitKind.CONCURRENT_REQUESTS
            await asyncio.sleep(0.05)
        first.settle("a", 0, 0, time.time())
        await settled(first)
        assert isinstance(await reserve(second, "b", acme, at_s=time.time()), Reserved)


async def test_keys_of_accounts_expire_and_nothing_else_is_left(server: RedisServer) -> None:
    limiter = limiter_at(server)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", account(usd_per_day=1.0)), Reserved)
        with redis.Redis(port=server.port, decode_responses=True) as client:
            key = "expertmesh:limits:account:tenant:acme"
            assert 31 * 86_400 < client.ttl(key) <= 40 * 86_400  # type: ignore[operator]
            assert sorted(client.keys("*")) == [  # type: ignore[type-var, arg-type]
                key,
                "expertmesh:limits:gateways",
                "expertmesh:limits:held",
                f"expertmesh:limits:open:{limiter._gateway}",
            ]
            limiter.settle("a", 0, 0, NOON_S)
            await settled(limiter)
            assert sorted(client.keys("*")) == [  # type: ignore[type-var, arg-type]
                key,
                "expertmesh:limits:gateways",
            ]


async def test_a_caller_that_goes_away_owes_nothing(server: RedisServer) -> None:
    limiter = limiter_at(server)
    acme = account(usd_per_day=1.0, concurrent_requests=1)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        answer = limiter.reserve("a", (acme,), Estimate(0, PICO), NOON_S)
        assert isinstance(answer, asyncio.Future)
        answer.cancel()
        await until(lambda: limiter._sending is None or limiter._sending.done(), "the answer")
        await settled(limiter)
        assert isinstance(await reserve(limiter, "b", acme, usd=1.0), Reserved)


async def test_a_fresh_redis_is_told_what_the_ledger_says_and_once(server: RedisServer) -> None:
    now_s = time.time()
    source = FixedSpend({"tenant:acme": (PICO // 2, PICO // 2)})
    acme = account(usd_per_day=1.0)
    first, second = limiter_at(server, source=source), limiter_at(server, source=source)
    async with running(first):
        assert await first.wait_connected(5)
        async with running(second):
            assert await second.wait_connected(5)
            assert isinstance(await reserve(first, "a", acme, usd=0.5, at_s=now_s), Reserved)
            answer = await reserve(second, "b", acme, usd=1e-6, at_s=now_s)
            assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_DAY
    assert len(source.asked) == 1


async def test_scripts_that_redis_forgot_are_loaded_again(server: RedisServer) -> None:
    limiter = limiter_at(server)
    acme = account(usd_per_day=1.0)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        for number in range(3):
            with redis.Redis(port=server.port) as client:
                client.script_flush()
            assert isinstance(await reserve(limiter, f"r{number}", acme, usd=0.5), Reserved)
            with redis.Redis(port=server.port) as client:
                client.script_flush()
            limiter.settle(f"r{number}", 0, 0, NOON_S)
            await settled(limiter)
    assert limiter.unavailable_calls == 0


async def test_a_redis_that_lost_its_data_is_told_again_before_anything_is_granted(
    server: RedisServer,
) -> None:
    now_s = time.time()
    source = FixedSpend({"tenant:acme": (PICO, PICO)})
    acme = account(usd_per_day=1.5)
    limiter = limiter_at(server, source=source)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=0.25, at_s=now_s), Reserved)
        with redis.Redis(port=server.port) as client:
            client.flushall()
        assert is_unavailable(await reserve(limiter, "b", acme, usd=0.75, at_s=now_s))
        assert await limiter.wait_connected(5)
        answer = await reserve(limiter, "b", acme, usd=0.75, at_s=now_s)
        assert isinstance(answer, Refused) and answer.kind is LimitKind.USD_PER_DAY
        assert len(source.asked) == 2


@pytest.mark.parametrize("choice", ["open", "closed"])
async def test_redis_is_killed_and_comes_back(choice: OnUnavailable) -> None:
    acme = account(requests_per_min=1_000, usd_per_day=1.0)

    def is_choice(answer: Reserved | Refused) -> bool:
        return answer == Reserved(None) if choice == "open" else is_unavailable(answer)

    with redis_server() as own:
        limiter = limiter_at(own, choice, timeout_s=0.25)
        async with running(limiter):
            assert await limiter.wait_connected(5)
            before = await reserve(limiter, "a", acme, usd=0.5)
            assert isinstance(before, Reserved) and before.headroom is not None
            answers = [
                limiter.reserve(f"w{n}", (acme,), Estimate(0, 0), NOON_S) for n in range(100)
            ]
            own.kill()
            for answer in answers:
                assert isinstance(answer, asyncio.Future)
                outcome = await answer
                assert is_choice(outcome)
            assert is_choice(await reserve(limiter, "b", acme, usd=5.0))
            limiter.settle("a", 0, 0, NOON_S)
            limiter.settle("b", 0, 0, NOON_S)
            assert limiter._unsettled
            own.start()
            assert await limiter.wait_connected(10)
            await settled(limiter)
            after = await reserve(limiter, "c", acme, usd=0.5)
            assert isinstance(after, Reserved) and after.headroom is not None
            assert isinstance(await reserve(limiter, "d", acme, usd=0.75), Refused)


async def test_a_redis_that_hangs_is_away_after_the_timeout(server: RedisServer) -> None:
    limiter = limiter_at(server, timeout_s=0.2)
    acme = account(usd_per_day=1.0, concurrent_requests=5)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        assert isinstance(await reserve(limiter, "a", acme, usd=0.25), Reserved)
        server.freeze()
        try:
            started_s = time.monotonic()
            assert is_unavailable(await reserve(limiter, "b", acme, usd=0.25))
            assert 0.2 <= time.monotonic() - started_s < 2.0
            started_s = time.monotonic()
            assert is_unavailable(await reserve(limiter, "c", acme, usd=0.25))
            assert time.monotonic() - started_s < 0.1  # Known to be away: nobody waits.
        finally:
            server.thaw()
        assert await limiter.wait_connected(10)
        # The frozen one carried out `b` when it woke up; it is settled as unused.
        await settled(limiter)
        assert isinstance(await reserve(limiter, "d", acme, usd=0.75), Reserved)


async def test_what_is_no_answer_counts_as_away(server: RedisServer) -> None:
    limiter = limiter_at(server)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        with redis.Redis(port=server.port) as client:
            client.set("expertmesh:limits:account:tenant:acme", "no hash")
        assert is_unavailable(await reserve(limiter, "a", account(usd_per_day=1.0)))


async def test_settlements_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_limiter, "_MOST_UNSETTLED", 3)
    acme = account(requests_per_min=1_000)
    with redis_server() as own:
        limiter = limiter_at(own)
        async with running(limiter):
            assert await limiter.wait_connected(5)
            for number in range(5):
                assert isinstance(await reserve(limiter, f"r{number}", acme), Reserved)
            own.kill()
            assert is_unavailable(await reserve(limiter, "x", acme))
            for number in range(5):
                limiter.settle(f"r{number}", 0, 0, NOON_S)
            assert len(limiter._unsettled) == 3 and limiter.dropped_settlements == 3


async def test_many_calls_travel_together(server: RedisServer) -> None:
    limiter = limiter_at(server)
    acme = account(usd_per_day=1.0)
    async with running(limiter):
        assert await limiter.wait_connected(5)
        with redis.Redis(port=server.port) as client:
            before = client.info("clients")["connected_clients"]  # type: ignore[index]
            await asyncio.gather(*(reserve(limiter, uuid.uuid4().hex, acme) for _ in range(1_000)))
            after = client.info("clients")["connected_clients"]  # type: ignore[index]
        assert after <= before + 1
