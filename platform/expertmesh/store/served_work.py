"""What our groups were given to do, minute by minute, summed up by the database."""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, Integer, cast, func, select

from expertmesh.core.scaling.hindsight import Served
from expertmesh.store.database import Database
from expertmesh.store.schema import usage_records

_HOUR_S = 3600.0


async def served_work(
    database: Database, since_s: float, until_s: float, bin_s: float
) -> Mapping[tuple[str, str, int], Served]:
    """By model, pool and number of the bin, which begins `bin_s` times that after `since_s`: of the
    requests that were accepted then and have ended. Hour by hour, so that nobody waits for long.

    Raises UpstreamUnavailable.
    """
    found: dict[tuple[str, str, int], Served] = {}
    at_s = since_s
    while at_s < until_s:
        next_s = min(until_s, at_s + _HOUR_S)
        for key, served in (await _within(database, at_s, next_s, since_s, bin_s)).items():
            found[key] = found.get(key, Served()) + served
        at_s = next_s
    return found


async def _within(
    database: Database, from_s: float, to_s: float, since_s: float, bin_s: float
) -> dict[tuple[str, str, int], Served]:
    columns = usage_records.c
    ratio = (columns.at_s - since_s) / bin_s
    # A cast cuts on SQLite and rounds on PostgreSQL.
    number: ColumnElement[int] = cast(ratio, Integer)
    if database.engine.dialect.name == "postgresql":
        number = cast(func.floor(ratio), Integer)
    number = number.label("number")
    statement = (
        select(
            columns.model,
            columns.pool,
            number,
            func.count().label("requests"),
            func.sum(columns.prompt_tokens - columns.cached_tokens).label("prompt_tokens"),
            func.sum(columns.completion_tokens).label("output_tokens"),
            func.sum(columns.duration_s - columns.queue_s).label("at_groups_s"),
        )
        .where(columns.at_s >= from_s, columns.at_s < to_s)
        .group_by(columns.model, columns.pool, number)
    )
    async with database.reading() as connection:
        return {
            (row.model, row.pool, int(row.number)): Served(
                float(row.requests),
                float(row.prompt_tokens),
                float(row.output_tokens),
                max(0.0, float(row.at_groups_s)),
            )
            for row in await connection.execute(statement)
        }
