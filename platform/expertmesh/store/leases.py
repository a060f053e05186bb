"""A lease in the database, for controllers that share a store but no Kubernetes."""

import time
from collections.abc import Callable

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.store.database import Database
from expertmesh.store.schema import leases


class LeaseTable:
    """One row a lease; every write is one statement that names the version it replaces."""

    def __init__(
        self, database: Database, name: str, now_s: Callable[[], float] = time.time
    ) -> None:
        """`now_s`: Unix time, kept for people to read."""
        self._database = database
        self._name = name
        self._now_s = now_s

    async def read(self) -> LeaseRecord:
        query = select(leases).where(leases.c.name == self._name)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return LeaseRecord(holder=None)
        return LeaseRecord(
            holder=row.holder,
            url=row.url,
            duration_s=row.duration_s,
            transitions=row.transitions,
            version=str(row.version),
        )

    async def write(self, wanted: LeaseRecord) -> LeaseRecord | None:
        """None when another process has written since `wanted.version`."""
        known = int(wanted.version or 0)
        values = {
            "holder": wanted.holder,
            "url": wanted.url,
            "duration_s": wanted.duration_s,
            "transitions": wanted.transitions,
            "version": known + 1,
            "renewed_at_s": self._now_s(),
        }
        try:
            async with self._database.writing() as connection:
                if not wanted.version:
                    await connection.execute(insert(leases).values(name=self._name, **values))
                else:
                    columns = leases.c
                    statement = (
                        update(leases)
                        .where(columns.name == self._name, columns.version == known)
                        .values(**values)
                    )
                    if (await connection.execute(statement)).rowcount != 1:
                        return None
        except IntegrityError:
            return None
        return LeaseRecord(
            holder=wanted.holder,
            url=wanted.url,
            duration_s=wanted.duration_s,
            transitions=wanted.transitions,
            version=str(known + 1),
        )
