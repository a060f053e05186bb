import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from tests.store.postgresql import postgresql_server
from tests.store.records import usage_record

from expertmesh.errors import SetupError, UpstreamUnavailable
from expertmesh.store import database as database_module
from expertmesh.store.database import Database, open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.schema import metadata


async def test_the_migrations_build_exactly_the_schema_of_the_code(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []


async def test_opening_again_keeps_what_is_there(url: str) -> None:
    first = await open_database(url)
    await Ledger(first).add_usage([usage_record()])
    await first.close()
    second = await open_database(url, create=False)
    assert await Ledger(second).usage() == (usage_record(),)
    await second.close()


async def test_a_schema_newer_than_the_code_is_refused_and_left_alone(url: str) -> None:
    database = await open_database(url)
    async with database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'future'"))
    with pytest.raises(SetupError, match=r"revision future, newer than .* update expertmesh"):
        await open_database(url)
    async with database.reading() as connection:
        assert await connection.scalar(text("SELECT version_num FROM alembic_version")) == "future"
    await database.close()


async def test_a_database_of_something_else_is_refused_and_left_alone(url: str) -> None:
    database = await open_database(url)
    async with database.writing() as connection:
        for table in ("alembic_version", "api_keys", "usage_records"):
            await connection.execute(text(f"DROP TABLE {table}"))
    # The first tables of the migration fit beside these; the third does not.
    with pytest.raises(SetupError, match=r"already exists; .* name an empty database"):
        await open_database(url)
    async with database.reading() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert set(tables) - {"sqlite_sequence"} == {
        "capacity_holds",
        "identity_version",
        "leases",
        "journal_entries",
        "node_holds",
        "provider_tariffs",
        "tenants",
    }
    await database.close()


async def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.writing() as connection:
            await connection.execute(
                text("INSERT INTO journal_entries (at_s, kind, payload_json) VALUES (1, 'a', '{}')")
            )
            raise ZeroDivisionError
    async with database.reading() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM journal_entries")) == 0


async def test_sqlite_is_set_up_for_several_processes(tmp_path: Path) -> None:
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path}/store.db")
    async with database.reading() as connection:
        pragmas = {
            name: await connection.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "busy_timeout", "foreign_keys", "synchronous")
        }
    await database.close()
    assert pragmas == {
        "journal_mode": "wal",
        "busy_timeout": 1_000,
        "foreign_keys": 1,
        "synchronous": 2,
    }


async def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(
            text("INSERT INTO journal_entries (at_s, kind, payload_json) VALUES (1, 'a', '{}')")
        )
        async with database.reading() as other:
            assert await other.scalar(text("SELECT count(*) FROM journal_entries")) == 0


async def test_plain_urls_get_the_right_driver(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    assert database.name == f"sqlite+aiosqlite:///{tmp_path}/store.db"
    await database.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "names no file, and several processes share the store; write sqlite"),
        ("sqlite+aiosqlite:///:memory:", "names no file"),
        ("mysql://em:hunter2@host/name", "'mysql' is not supported; write sqlite"),
        ("store.db", "'store.db'… is no database URL; write sqlite"),
        ("postgresql+asyncpg://em:hunter2@host:port/name", "is no database URL; write sqlite"),
        ("postgresql+asyncpg://em:hunter2@127.0.0.1:1/name", "check that the server runs there"),
    ],
)
async def test_a_url_that_cannot_work_is_refused_without_its_password(
    url: str, message: str
) -> None:
    with pytest.raises(SetupError, match=f"^store: .*{re.escape(message)}") as refusal:
        await open_database(url)
    assert "hunter2" not in str(refusal.value)


async def test_a_missing_folder_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nowhere/store\.db: the folder .* does not exist"):
        await open_database(f"sqlite:///{tmp_path}/nowhere/store.db")
    assert os.listdir(tmp_path) == []


async def test_a_missing_file_is_refused_where_it_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"store\.db: does not exist; check the path"):
        await open_database(f"sqlite:///{tmp_path}/store.db", create=False)
    assert os.listdir(tmp_path) == []


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"is a folder; name a file in it"):
        await open_database(f"sqlite:///{tmp_path}")


async def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"kind: Platform\n" * 100)
    with pytest.raises(SetupError, match=r"store\.db: .*the file is no SQLite database; move it"):
        await open_database(f"sqlite:///{path}")
    assert path.read_bytes() == b"kind: Platform\n" * 100


@pytest.fixture
def folder_of_another_user() -> Iterator[Path]:
    """Where this process may read but not write, which for root means being nobody for a while."""
    folder = Path(tempfile.mkdtemp(prefix="em-store-"))
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    folder.rmdir()


async def test_a_folder_that_is_not_writable_is_refused(folder_of_another_user: Path) -> None:
    with pytest.raises(SetupError, match=r"store\.db: .*folder must be writable by this user"):
        await open_database(f"sqlite:///{folder_of_another_user}/store.db")


async def test_a_locked_database_asks_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_LOCK_WAIT_S", 0.1)
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    ledger = Ledger(database)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UpstreamUnavailable, match=r"store\.db: database is locked; try again"):
        await ledger.add_usage([usage_record()])
    assert await ledger.usage() == ()

    other.execute("COMMIT")
    other.close()
    assert await ledger.add_usage([usage_record()]) == 1
    await database.close()


@pytest.mark.integration
async def test_a_server_that_went_away_asks_to_try_again_and_is_found_again() -> None:
    with postgresql_server() as server:
        database = await open_database(server.url("postgres"))
        ledger = Ledger(database)
        await ledger.add_usage([usage_record("before")])

        server.stop()
        with pytest.raises(UpstreamUnavailable, match="try again when it answers"):
            await ledger.add_usage([usage_record("after")])
        with pytest.raises(UpstreamUnavailable):
            await ledger.usage()

        server.start()
        assert await ledger.add_usage([usage_record("before"), usage_record("after")]) == 1
        await database.close()
