"""Open the store: SQLite in a file, or PostgreSQL, brought to the newest schema.

Several processes use one store at once (gateways, controller, commands); nothing here may assume
to be alone.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from expertmesh.errors import ExpertMeshError, SetupError, UpstreamUnavailable
from expertmesh.store.migrations.upgrade import is_current, upgrade_to_head

_LOCK_WAIT_S = 30
"""A writer waits this long for the others; a batch of the ledger takes milliseconds."""
_LOCK_TRY_S = 1
"""SQLite waits so long at a time: a thread that waits cannot be stopped."""
_CONNECT_TIMEOUT_S = 10
_MIGRATION_LOCK = 0x65_78_70_6D_65_73_68
"""Number of the PostgreSQL advisory lock, the same in every version ("expmesh")."""
_JOURNAL_LOCK = _MIGRATION_LOCK + 1
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
_URL_FORMS = (
    "write sqlite+aiosqlite:////folder/store.db or postgresql+asyncpg://user:password@host/name"
)


class Database:
    """Transactions raise UpstreamUnavailable when the database is locked or out of reach."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._writer = engine.execution_options(em_writes=True)

    @property
    def name(self) -> str:
        """The URL without its password, for messages."""
        return _shown(self.engine.url)

    async def close(self) -> None:
        await self.engine.dispose()

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return self._transaction(self.engine)

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """All or nothing, also when this process is killed in the middle."""
        return self._transaction(self._writer)

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        try:
            async with engine.begin() as connection:
                yield connection
        except (DBAPIError, OSError) as error:
            if not _is_out_of_reach(error):
                raise
            raise UpstreamUnavailable(
                f"store: {self.name}: {_reason(error)}; try again when it answers"
            ) from error

    async def lock_journal(self, connection: AsyncConnection) -> None:
        """Until the end of the transaction; SQLite's single writer has it already."""
        if connection.dialect.name == "postgresql":
            await _advisory_lock(connection, _JOURNAL_LOCK)


async def open_database(url: str, *, create: bool = True) -> Database:
    """Migrates to the newest schema. Without `create`, a missing SQLite file is refused."""
    target = _parse(url)
    database = Database(_engine(target))
    try:
        if target.get_backend_name() == "sqlite":
            # Not through the engine: a connection that fails leaves its thread behind for a moment.
            await asyncio.to_thread(_prepare_file, Path(str(target.database)), create)
        await _migrate(database)
    except BaseException as error:
        await database.close()
        if isinstance(error, Exception):
            raise _refused(target, error) from error
        raise
    return database


async def _migrate(database: Database) -> None:
    engine = database.engine
    async with engine.begin() as connection:
        if await connection.run_sync(is_current):
            return
    async with database._writer.begin() as connection:
        if engine.dialect.name == "postgresql":
            await _advisory_lock(connection, _MIGRATION_LOCK)
        # Another process may have migrated while this one waited for the lock.
        if not await connection.run_sync(is_current):
            await connection.run_sync(upgrade_to_head)


def _engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() == "postgresql":
        return create_async_engine(
            url, pool_pre_ping=True, connect_args={"timeout": _CONNECT_TIMEOUT_S}
        )
    # The driver's own BEGIN comes late and cannot wait for a writer, so it is switched off.
    engine = create_async_engine(
        url,
        connect_args={"timeout": min(_LOCK_TRY_S, _LOCK_WAIT_S), "isolation_level": None},
    )
    event.listen(engine.sync_engine, "connect", _configure_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    # What the ledger has taken survives a power cut, not only the end of the process.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that first reads and then writes would fail at once instead of waiting.
    if not connection.get_execution_options().get("em_writes"):
        connection.exec_driver_sql("BEGIN")
        return
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            return
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() >= deadline_s:
                raise


async def _advisory_lock(connection: AsyncConnection, number: int) -> None:
    await connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # What cannot be read may hold a password, so only its beginning is shown.
        scheme = url.partition(":")[0][:40]
        raise SetupError(f"store: {scheme!r}… is no database URL; {_URL_FORMS}") from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise SetupError(
            f"store: {_shown(parsed)}: {parsed.drivername!r} is not supported; {_URL_FORMS}"
        )
    parsed = parsed.set(drivername=driver)
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise SetupError(
            f"store: {url!r} names no file, and several processes share the store; {_URL_FORMS}"
        )
    return parsed


def _prepare_file(path: Path, create: bool) -> None:
    """The file exists and can be shared: in WAL mode readers and the writer do not block."""
    if path.is_dir():
        raise SetupError(f"is a folder; name a file in it, e.g. {path / 'store.db'}")
    if not path.parent.is_dir():
        raise SetupError(f"the folder {path.parent} does not exist; create it first")
    if not create and not path.exists():
        raise SetupError("does not exist; check the path, or start the system that writes it")
    with closing(sqlite3.connect(path)) as connection:
        mode = _enter_wal_mode(connection)
    if mode != "wal":
        raise SetupError(
            f"its file system cannot share the file between processes (journal mode {mode!r} "
            "instead of 'wal'); use a local disk, or PostgreSQL"
        )


def _enter_wal_mode(connection: sqlite3.Connection) -> str:
    """SQLite does not wait its busy timeout here, so processes that start together need a loop."""
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _refused(url: URL, error: Exception) -> ExpertMeshError:
    place = str(url.database) if url.get_backend_name() == "sqlite" else _shown(url)
    if isinstance(error, ExpertMeshError):
        return SetupError(f"store: {place}: {error}")
    reason = _reason(error)
    return SetupError(f"store: {place}: {reason}; {_remedy(url, reason)}")


def _remedy(url: URL, reason: str) -> str:
    if "already exists" in reason:
        return "the database holds tables of something else; name an empty database"
    if url.get_backend_name() == "postgresql":
        return "check that the server runs there and that user, password and database are right"
    if "not a database" in reason or "malformed" in reason:
        return "the file is no SQLite database; move it away or name another file"
    if "locked" in reason:
        return "another process holds it; stop that process or wait for it"
    return (
        "the file and its folder must be writable by this user, because SQLite keeps its log "
        "beside the file"
    )


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def _is_out_of_reach(error: DBAPIError | OSError) -> bool:
    if isinstance(error, OperationalError | InterfaceError | OSError):
        return True
    # Without a statement it was connecting or committing that failed.
    return error.connection_invalidated or error.statement is None


def _reason(error: Exception) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    return lines[0].removesuffix(".") if lines else type(cause).__name__
