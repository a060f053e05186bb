import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertmesh.core.domain.tenant import Account, Caller, Limits, Priority, Tenant
from expertmesh.core.metering.report import IDLE
from expertmesh.errors import SetupError
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, KeyRecord, hash_secret
from expertmesh.store.tenants import Conflict, InvalidField, TenantBook

NOW_S = 1_767_268_800.0


async def test_a_new_key_is_active_under_the_hash_of_its_secret(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "batch", NOW_S)

    assert re.fullmatch(r"sk-em-[A-Za-z0-9_-]{43}", key.secret)
    active = await book.active(NOW_S + 1)
    assert list(active) == [hash_secret(key.secret)]
    assert active[hash_secret(key.secret)] == Caller(key.id, "acme")
    (record,) = await book.list()
    assert (record.id, record.tenant, record.name) == (key.id, "acme", "batch")
    assert record.created_at_s == NOW_S
    assert (record.models, record.admin, record.limits) == (None, False, Limits())
    assert await book.get(key.id) == record
    assert key.secret.startswith(record.prefix) and len(record.prefix) == 10


async def test_keys_differ(database: Database) -> None:
    book = KeyBook(database)
    first, second = await book.create("acme", "", NOW_S), await book.create("acme", "", NOW_S)
    assert first.id != second.id
    assert first.secret != second.secret
    assert [key.id for key in await book.list()] == sorted((first.id, second.id))


async def test_a_revoked_key_is_listed_but_not_active(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "", NOW_S)
    kept = await book.create("other", "", NOW_S + 1)

    assert await book.revoke(key.id, NOW_S + 5)
    assert [caller.key_id for caller in (await book.active(NOW_S + 6)).values()] == [kept.id]
    assert [record.revoked_at_s for record in await book.list()] == [NOW_S + 5, None]


async def test_revoking_again_or_an_unknown_key_changes_nothing(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "", NOW_S)
    await book.revoke(key.id, NOW_S + 5)
    before = await book.list()

    assert not await book.revoke(key.id, NOW_S + 9)
    assert not await book.revoke("key_unknown", NOW_S + 9)
    assert await book.list() == before


async def test_a_key_is_active_until_the_moment_it_expires(database: Database) -> None:
    book = KeyBook(database)
    await book.create("acme", "", NOW_S, expires_at_s=NOW_S + 60)

    assert len(await book.active(NOW_S + 59.9)) == 1
    assert await book.active(NOW_S + 60) == {}
    (record,) = await book.list()
    assert record.is_active(NOW_S + 59.9) and not record.is_active(NOW_S + 60)


async def test_the_secret_is_nowhere_in_the_files(tmp_path: Path) -> None:
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path}/store.db")
    key = await KeyBook(database).create("acme", "batch", NOW_S)
    while_open = _contents(tmp_path)
    await database.close()
    after = _contents(tmp_path)

    assert "store.db-wal" in while_open
    assert any(b"batch" in content for content in while_open.values())
    for content in (*while_open.values(), *after.values()):
        # Twelve characters are two more than the prefix that is kept on purpose.
        assert key.secret[:12].encode() not in content
        assert key.secret[-33:].encode() not in content


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "tenant", ["", "Acme", "a b", "-acme", "acme-", "a" * 41, "acme\n", "ä", IDLE]
)
async def test_a_bad_tenant_is_refused_and_nothing_stored(database: Database, tenant: str) -> None:
    book = KeyBook(database)
    with pytest.raises(SetupError, match=r"^tenant: .*lower-case"):
        await book.create(tenant, "", NOW_S)
    assert await book.list() == ()


@pytest.mark.parametrize(
    ("name", "expires_at_s", "message"),
    [
        ("two\nlines", None, "^name: "),
        ("n" * 81, None, "^name: "),
        ("", NOW_S, "^expires_at_s: .*in the past"),
        ("", NOW_S - 1, "^expires_at_s: .*in the past"),
    ],
)
async def test_a_bad_name_or_expiry_is_refused_and_nothing_stored(
    database: Database, name: str, expires_at_s: float | None, message: str
) -> None:
    book = KeyBook(database)
    with pytest.raises(SetupError, match=message):
        await book.create("acme", name, NOW_S, expires_at_s)
    assert await book.list() == ()


SMALL = Limits(requests_per_min=60, tokens_per_min=10_000, concurrent_requests=4)
MONEY = Limits(usd_per_day=0.3, usd_per_month=12345678.9)


async def test_a_caller_has_all_that_key_and_tenant_say(database: Database) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    await tenants.put(Tenant("acme", Priority.INTERACTIVE, 2.5, MONEY), NOW_S)
    key = await book.create(
        "acme", "ci", NOW_S, NOW_S + 60, models=["tiny-moe", "org/big", "tiny-moe"], limits=SMALL
    )

    (caller,) = (await book.active(NOW_S)).values()
    assert caller == Caller(
        key_id=key.id,
        tenant="acme",
        priority=Priority.INTERACTIVE,
        weight=2.5,
        models=frozenset({"tiny-moe", "org/big"}),
        admin=False,
        expires_at_s=NOW_S + 60,
        accounts=(Account("tenant:acme", MONEY), Account(f"key:{key.id}", SMALL)),
    )
    (record,) = await book.list()
    assert record.models == ("org/big", "tiny-moe")
    assert record.limits == SMALL


async def test_accounts_are_those_that_have_limits(database: Database) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    await tenants.put(Tenant("limited", limits=SMALL), NOW_S)
    await book.create("limited", "", NOW_S)
    key = await book.create("free", "", NOW_S, limits=MONEY)
    accounts = {caller.tenant: caller.accounts for caller in (await book.active(NOW_S)).values()}
    assert accounts == {
        "limited": (Account("tenant:limited", SMALL),),
        "free": (Account(f"key:{key.id}", MONEY),),
    }


async def test_the_first_key_of_a_tenant_creates_it_and_the_next_leaves_it(
    database: Database,
) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    await book.create("acme", "", NOW_S)
    record = await tenants.get("acme")
    assert record is not None
    assert (record.tenant, record.created_at_s) == (Tenant("acme"), NOW_S)

    await tenants.put(Tenant("acme", Priority.BATCH), NOW_S + 1)
    await book.create("acme", "", NOW_S + 2)
    record = await tenants.get("acme")
    assert record is not None and record.tenant.priority is Priority.BATCH


async def test_keys_of_a_disabled_tenant_are_not_active_until_it_is_enabled(
    database: Database,
) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    key = await book.create("acme", "", NOW_S)
    await book.create("other", "", NOW_S + 1)
    await tenants.disable("acme", NOW_S + 5)

    assert [caller.tenant for caller in (await book.active(NOW_S + 6)).values()] == ["other"]
    record = await book.get(key.id)
    assert record is not None and not record.is_active(NOW_S + 6)
    with pytest.raises(Conflict, match=r"^tenant: 'acme': is disabled; enable it"):
        await book.create("acme", "", NOW_S + 6)
    assert len(await book.list()) == 2

    await tenants.enable("acme")
    assert len(await book.active(NOW_S + 7)) == 2


async def test_an_admin_key_says_so(database: Database) -> None:
    book = KeyBook(database)
    await book.create("ops", "", NOW_S, admin=True)
    assert [caller.admin for caller in (await book.active(NOW_S)).values()] == [True]
    assert [record.admin for record in await book.list()] == [True]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"models": []}, "models"),
        ({"models": ["a b"]}, "models"),
        ({"models": ["ok", "-x"]}, "models"),
        ({"models": ["tiny\n"]}, "models"),
        ({"models": ["m" * 201]}, "models"),
        ({"models": [f"m{n}" for n in range(101)]}, "models"),
        ({"limits": Limits(requests_per_min=0)}, "limits.requests_per_min"),
        ({"limits": Limits(tokens_per_min=-1)}, "limits.tokens_per_min"),
        ({"limits": Limits(concurrent_requests=10**13)}, "limits.concurrent_requests"),
        ({"limits": Limits(usd_per_day=0.0)}, "limits.usd_per_day"),
        ({"limits": Limits(usd_per_month=float("nan"))}, "limits.usd_per_month"),
        ({"limits": Limits(usd_per_month=float("inf"))}, "limits.usd_per_month"),
        ({"admin": True, "models": ["tiny-moe"]}, "admin"),
        ({"admin": True, "limits": SMALL}, "admin"),
    ],
)
async def test_a_bad_scope_or_limit_is_refused_and_nothing_stored(
    database: Database, arguments: dict[str, Any], field: str
) -> None:
    book = KeyBook(database)
    with pytest.raises(InvalidField) as refusal:
        await book.create("acme", "", NOW_S, **arguments)
    assert refusal.value.field == field
    assert str(refusal.value).startswith(f"{field}: ")
    assert await book.list() == ()
    assert await TenantBook(database).list() == ()


async def test_a_hundred_models_are_taken(database: Database) -> None:
    book = KeyBook(database)
    await book.create("acme", "", NOW_S, models=[f"m{n}" for n in range(100)])
    (caller,) = (await book.active(NOW_S)).values()
    assert caller.may_use("m99") and not caller.may_use("m100")


async def test_name_models_and_limits_of_a_key_can_be_changed_and_nothing_else(
    database: Database,
) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "old", NOW_S, models=["a"], limits=SMALL)

    def edit(record: KeyRecord) -> KeyRecord:
        limits = replace(record.limits, requests_per_min=None, usd_per_day=0.1)
        return replace(record, name="new", models=("c", "b"), limits=limits, tenant="evil")

    changed = await book.change(key.id, edit)
    assert changed == await book.get(key.id)
    assert changed is not None
    assert (changed.tenant, changed.name, changed.models) == ("acme", "new", ("b", "c"))
    assert changed.limits == Limits(tokens_per_min=10_000, concurrent_requests=4, usd_per_day=0.1)
    assert await book.change("key_unknown", edit) is None


async def test_a_change_that_is_refused_changes_nothing(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "", NOW_S)
    before = await book.list()
    with pytest.raises(InvalidField, match=r"^limits\.usd_per_day: -1: use dollars above 0"):
        await book.change(key.id, lambda record: replace(record, limits=Limits(usd_per_day=-1)))
    assert await book.list() == before

    await book.revoke(key.id, NOW_S + 1)
    with pytest.raises(Conflict, match=f"^id: '{key.id}': is revoked for good"):
        await book.change(key.id, lambda record: replace(record, name="x"))


async def test_pages_follow_one_another_without_gap(database: Database) -> None:
    book = KeyBook(database)
    # Three of each moment, so that the id decides too.
    for n in range(9):
        await book.create("acme" if n % 2 else "zoo", "", NOW_S + n // 3)
    everything = await book.list()
    pages: list[KeyRecord] = []
    while page := await book.list(after=pages[-1].id if pages else None, limit=2):
        assert len(page) <= 2
        pages += page
    assert tuple(pages) == everything
    assert len(await book.list(tenant="acme")) == 4
    assert await book.list(tenant="nobody") == ()
    with pytest.raises(InvalidField, match=r"^after: 'key_x': is the id of no key"):
        await book.list(after="key_x")


async def test_every_change_counts_up_the_version_and_only_changes_do(database: Database) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    versions = [await book.version()]

    async def changed() -> None:
        versions.append(await book.version())
        assert versions[-1] > versions[-2]

    key = await book.create("acme", "", NOW_S)
    await changed()
    await tenants.put(Tenant("acme", weight=2), NOW_S)
    await changed()
    await tenants.change("acme", lambda tenant: replace(tenant, weight=3.0))
    await changed()
    await tenants.disable("acme", NOW_S)
    await changed()
    await tenants.enable("acme")
    await changed()
    await book.change(key.id, lambda record: replace(record, name="x"))
    await changed()
    await book.revoke(key.id, NOW_S)
    await changed()
    await book.list()
    await book.active(NOW_S)
    assert await book.version() == versions[-1]


async def test_only_what_changed_is_read_again(database: Database) -> None:
    book, tenants = KeyBook(database), TenantBook(database)
    first = await book.create("acme", "", NOW_S)
    second = await book.create("acme", "", NOW_S)
    third = await book.create("zoo", "", NOW_S)
    by_hash = {hash_secret(key.secret): key.id for key in (first, second, third)}

    async def news(after: int) -> dict[str, Caller | None]:
        changes = await book.changed(after, NOW_S + 1)
        return {by_hash[sha256]: caller for sha256, caller in changes.items()}

    version = await book.version()
    assert await news(version) == {}
    await book.revoke(first.id, NOW_S)
    assert await news(version) == {first.id: None}

    version = await book.version()
    await tenants.put(Tenant("acme", weight=4), NOW_S)
    assert await news(version) == {first.id: None, second.id: Caller(second.id, "acme", weight=4)}

    version = await book.version()
    await tenants.disable("acme", NOW_S)
    await book.change(third.id, lambda record: replace(record, models=("a",)))
    assert await news(version) == {
        first.id: None,
        second.id: None,
        third.id: Caller(third.id, "zoo", models=frozenset("a")),
    }
    assert set(await news(0)) == {first.id, second.id, third.id}


async def test_a_key_that_expired_is_reported_as_not_active(database: Database) -> None:
    book = KeyBook(database)
    version = await book.version()
    key = await book.create("acme", "", NOW_S, expires_at_s=NOW_S + 5)
    assert list((await book.changed(version, NOW_S + 5)).values()) == [None]
    assert list((await book.changed(version, NOW_S + 4)).values()) == [
        Caller(key.id, "acme", expires_at_s=NOW_S + 5)
    ]
