"""Every test of the store runs on SQLite, and as an integration test on a real PostgreSQL."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.store.postgresql import PostgresqlServer, postgresql_server

from expertmesh.store.database import Database, open_database


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that nobody has opened yet."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/store.db"
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    # Far quicker than a database for each test.
    server.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return server.url("postgres")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    opened = await open_database(url)
    yield opened
    await opened.close()
