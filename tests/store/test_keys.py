import re
from pathlib import Path

import pytest

from expertmesh.core.metering.report import IDLE
from expertmesh.errors import SetupError
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, hash_secret

NOW_S = 1_767_268_800.0


async def test_a_new_key_is_active_under_the_hash_of_its_secret(database: Database) -> None:
    book = KeyBook(database)
    key = await book.create("acme", "batch", NOW_S)

    assert re.fullmatch(r"sk-em-[A-Za-z0-9_-]{43}", key.secret)
    active = await book.active(NOW_S + 1)
    assert list(active) == [hash_secret(key.secret)]
    record = active[hash_secret(key.secret)]
    assert (record.id, record.tenant, record.name) == (key.id, "acme", "batch")
    assert record.created_at_s == NOW_S
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
    assert [record.id for record in (await book.active(NOW_S + 6)).values()] == [kept.id]
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
        ("", NOW_S, "^expires: .*in the past"),
        ("", NOW_S - 1, "^expires: .*in the past"),
    ],
)
async def test_a_bad_name_or_expiry_is_refused_and_nothing_stored(
    database: Database, name: str, expires_at_s: float | None, message: str
) -> None:
    book = KeyBook(database)
    with pytest.raises(SetupError, match=message):
        await book.create("acme", name, NOW_S, expires_at_s)
    assert await book.list() == ()
