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
from expertmesh.store.keys import KeyBook
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
