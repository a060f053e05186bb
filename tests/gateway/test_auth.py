"""The ring of keys: what it finds, how it follows the store, and that it outlives it."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gateway.memory_store import MemoryKeys

from expertmesh.core.domain.tenant import Account, Caller, Limits, Tenant
from expertmesh.gateway.auth import KeyRing
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, is_well_formed
from expertmesh.store.tenants import TenantBook

NOW_S = 1_767_268_800.0
SECRET = "sk-em-" + "a" * 43


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
def ring(keys: MemoryKeys) -> KeyRing:
    return KeyRing(keys, 0.01)


async def test_a_key_is_found_by_its_secret_and_by_nothing_else(
    keys: MemoryKeys, ring: KeyRing
) -> None:
    caller = keys.add(SECRET, "acme", models=frozenset({"tiny-moe"}))
    keys.add("sk-em-" + "b" * 43, "zoo")
    assert ring.find(SECRET.encode(), NOW_S) is None and not ring.loaded
    await ring.refresh()
    assert ring.loaded
    assert ring.find(SECRET.encode(), NOW_S) == caller
    digest = hashlib.sha256(SECRET.encode())
    for other in (b"", SECRET[:-1].encode(), b"\xff" * 49, digest.digest()):
        assert ring.find(other, NOW_S) is None
    assert ring.find(digest.hexdigest().encode(), NOW_S) is None


async def test_a_key_is_good_until_the_moment_it_expires_without_a_refresh(
    keys: MemoryKeys, ring: KeyRing
) -> None:
    keys.add(SECRET, "acme", expires_at_s=NOW_S + 5)
    await ring.refresh()
    assert ring.find(SECRET.encode(), NOW_S + 4.999) is not None
    assert ring.find(SECRET.encode(), NOW_S + 5) is None


async def test_all_keys_are_read_once_and_then_only_the_changes(
    keys: MemoryKeys, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add(SECRET, "acme")
    await ring.refresh()
    read: list[int] = []
    changed = keys.changed

    async def counted(after: int, now_s: float) -> dict[str, Caller | None]:
        read.append(after)
        return await changed(after, now_s)

    async def never(now_s: float) -> dict[str, Caller]:
        raise AssertionError("all keys are read again")

    monkeypatch.setattr(keys, "changed", counted)
    monkeypatch.setattr(keys, "active", never)
    for _ in range(3):
        await ring.refresh()
    assert read == []
    keys.add("second", "zoo")
    await ring.refresh()
    keys.keys.clear()
    await ring.refresh()
    await ring.refresh()
    assert read == [1, 2]
    assert ring.find(b"second", NOW_S) is None and ring.find(SECRET.encode(), NOW_S) is None


async def test_the_known_keys_stay_while_the_store_is_away(
    keys: MemoryKeys, ring: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "expertmesh.gateway.auth")
    keys.error = OSError("no store")
    await ring.refresh()
    assert not ring.loaded
    keys.error = None
    keys.add(SECRET, "acme")
    await ring.refresh()

    keys.error = OSError("no store")
    keys.keys.clear()
    for _ in range(3):
        await ring.refresh()
    assert ring.loaded
    assert ring.find(SECRET.encode(), NOW_S) is not None
    keys.error = None
    await ring.refresh()
    assert ring.find(SECRET.encode(), NOW_S) is None
    # Once for each time that it went away, and came back.
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 2


async def test_a_failure_between_version_and_keys_is_made_up_for(
    keys: MemoryKeys, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add(SECRET, "acme")
    await ring.refresh()
    keys.keys.clear()
    with monkeypatch.context() as patch:

        async def fails(after: int, now_s: float) -> dict[str, Caller | None]:
            raise OSError("gone in the middle")

        patch.setattr(keys, "changed", fails)
        await ring.refresh()
        assert ring.find(SECRET.encode(), NOW_S) is not None
    await ring.refresh()
    assert ring.find(SECRET.encode(), NOW_S) is None


async def test_a_store_put_back_to_an_earlier_state_is_read_anew(
    keys: MemoryKeys, ring: KeyRing
) -> None:
    keys.add("added later", "acme")
    await ring.refresh()
    keys.add("another", "acme")
    await ring.refresh()
    earlier = MemoryKeys()
    earlier.add(SECRET, "acme")
    ring._source = earlier  # type: ignore[misc]
    await ring.refresh()
    assert ring.find(SECRET.encode(), NOW_S) is not None
    assert ring.find(b"added later", NOW_S) is None


async def test_a_store_that_hangs_counts_as_away(
    keys: MemoryKeys, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add(SECRET, "acme")
    await ring.refresh()
    monkeypatch.setattr("expertmesh.gateway.auth._VERSION_TIMEOUT_S", 0.01)

    async def hangs() -> int:
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(keys, "version", hangs)
    async with asyncio.timeout(5):
        await ring.refresh()
    assert ring.find(SECRET.encode(), NOW_S) is not None


@pytest.fixture
async def running_ring(keys: MemoryKeys) -> AsyncIterator[KeyRing]:
    """Loaded; it does not look again unless it is asked to."""
    ring = KeyRing(keys, 60.0)
    task = asyncio.create_task(ring.run())
    await asyncio.sleep(0.3)
    assert ring.loaded
    yield ring
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def secret_of(number: int) -> bytes:
    return b"sk-em-%043d" % number


async def test_unknown_keys_share_one_look_that_begins_after_they_came(
    keys: MemoryKeys, running_ring: KeyRing
) -> None:
    keys.add(SECRET, "acme")
    before = keys.reads
    looks = [running_ring.next_look(secret_of(number)) for number in range(50)]
    looks.append(running_ring.next_look(SECRET.encode()))
    assert None not in looks
    async with asyncio.timeout(0.8):
        await asyncio.gather(*(look for look in looks if look is not None))
    assert keys.reads == before + 1
    assert running_ring.find(SECRET.encode(), NOW_S) is not None


async def test_a_look_that_is_under_way_does_not_count_for_a_later_key(
    keys: MemoryKeys, running_ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, goes_on = keys.version, asyncio.Event()

    async def slow() -> int:
        seen = await version()
        await goes_on.wait()
        return seen

    monkeypatch.setattr(keys, "version", slow)
    first = running_ring.next_look(secret_of(1))
    await asyncio.sleep(0.05)
    keys.add(SECRET, "acme")
    second = running_ring.next_look(SECRET.encode())
    assert first is not None and second is not None
    goes_on.set()
    await first
    assert not second.done() and running_ring.find(SECRET.encode(), NOW_S) is None
    await second
    assert running_ring.find(SECRET.encode(), NOW_S) is not None


async def test_only_what_may_be_a_new_key_is_worth_a_look(
    keys: MemoryKeys, running_ring: KeyRing
) -> None:
    ill_formed = (
        b"",
        b"sk-em-",
        SECRET.encode()[:-1],
        SECRET.encode() + b"a",
        SECRET.encode() + b"\n",
        b"sk-xx-" + b"a" * 43,
        b"sk-em-" + b"." * 43,
        b"sk-em-" + b"\xe4" * 43,
    )
    assert [running_ring.next_look(secret) for secret in ill_formed] == [None] * len(ill_formed)
    keys.add(SECRET, "acme", expires_at_s=NOW_S)
    look = running_ring.next_look(SECRET.encode())
    assert look is not None
    await look
    assert running_ring.find(SECRET.encode(), NOW_S) is None
    assert running_ring.next_look(SECRET.encode()) is None, "it is known, and has expired"
    assert KeyRing(keys, 1.0).next_look(SECRET.encode()) is None, "nothing is loaded yet"


async def test_every_made_key_is_well_formed(database: Database) -> None:
    book = KeyBook(database)
    for _ in range(20):
        assert is_well_formed((await book.create("acme", "", time.time())).secret.encode())


async def test_waiting_requests_and_looks_are_bounded(
    keys: MemoryKeys, running_ring: KeyRing
) -> None:
    before, numbers, most = keys.reads, iter(range(10**6)), 0
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        looks = [running_ring.next_look(secret_of(next(numbers))) for _ in range(1000)]
        most = max(most, sum(look is not None for look in looks))
        await asyncio.sleep(0.02)
    assert most == 128
    assert 3 <= keys.reads - before <= 7


async def test_a_look_that_takes_too_long_is_given_up(
    keys: MemoryKeys, running_ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs() -> int:
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(keys, "version", hangs)
    began_s = time.monotonic()
    for _ in range(2):
        looks = [running_ring.next_look(secret_of(number)) for number in range(128)]
        assert None not in looks and running_ring.next_look(secret_of(128)) is None
        await asyncio.gather(*(look for look in looks if look is not None))
    assert time.monotonic() - began_s < 2.5


async def test_nobody_waits_for_a_store_that_is_known_to_be_away(
    keys: MemoryKeys, running_ring: KeyRing
) -> None:
    keys.error = OSError("no store")
    look = running_ring.next_look(SECRET.encode())
    assert look is not None
    await look
    assert running_ring.next_look(SECRET.encode()) is None


_Change = tuple[int, int | None]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 3)), max_size=30),
    st.sets(st.integers(0, 30)),
)
@settings(deadline=None)
def test_after_any_changes_the_ring_is_as_the_store(
    changes: list[_Change], failures: set[int]
) -> None:
    async def follow() -> None:
        keys = MemoryKeys()
        ring = KeyRing(keys, 1.0)
        for step, (number, weight) in enumerate(changes):
            if weight is None:
                keys.keys.pop(hashlib.sha256(b"%d" % number).hexdigest(), None)
            else:
                keys.add(str(number), "acme", weight=weight, key_id=f"key_{number}")
            keys.error = OSError() if step in failures else None
            await ring.refresh()
        keys.error = None
        await ring.refresh()
        for number in range(6):
            secret = b"%d" % number
            assert ring.find(secret, NOW_S) == keys.keys.get(hashlib.sha256(secret).hexdigest())

    asyncio.run(follow())


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await open_database(f"sqlite:///{tmp_path}/store.db")
    yield opened
    await opened.close()


async def test_rings_of_several_workers_follow_the_real_store(database: Database) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    rings = [KeyRing(book, 1.0) for _ in range(3)]

    async def found(secret: str) -> list[Caller | None]:
        for ring in rings:
            await ring.refresh()
        first, *others = [ring.find(secret.encode(), time.time()) for ring in rings]
        assert others == [first] * 2
        return [first]

    key = await book.create("acme", "", time.time())
    caller = Caller(key.id, "acme")
    assert await found(key.secret) == [caller]
    limits = Limits(requests_per_min=5)
    await tenants.put(Tenant("acme", limits=limits), time.time())
    assert await found(key.secret) == [replace(caller, accounts=(Account("tenant:acme", limits),))]
    await tenants.disable("acme", time.time())
    assert await found(key.secret) == [None]
    await tenants.enable("acme")
    await book.change(key.id, lambda record: replace(record, models=("a",), limits=limits))
    assert await found(key.secret) == [
        Caller(
            key.id,
            "acme",
            models=frozenset({"a"}),
            accounts=(Account("tenant:acme", limits), Account(f"key:{key.id}", limits)),
        )
    ]
    await book.revoke(key.id, time.time())
    assert await found(key.secret) == [None]


async def test_a_revoked_key_is_refused_within_two_seconds(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "", time.time())
    ring = KeyRing(book, 1.0)
    task = asyncio.create_task(ring.run())
    try:
        assert await _becomes(True, ring, key.secret, 5)
        await book.revoke(key.id, time.time())
        assert await _becomes(False, ring, key.secret, 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _becomes(known: bool, ring: KeyRing, secret: str, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if (ring.find(secret.encode(), time.time()) is not None) == known:
            return True
        await asyncio.sleep(0.01)
    return False
