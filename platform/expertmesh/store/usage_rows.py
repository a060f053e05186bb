"""Usage records on their way into the store: many rows in one statement.

A statement for each row, or SQLAlchemy's way of making one, would cost the gateway more than the
requests themselves.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
from sqlalchemy import Dialect
from sqlalchemy.dialects import sqlite

from expertmesh.core.metering.usage import UsageRecord
from expertmesh.store.schema import ExactNumeric, usage_records

MOST_ROWS = 256
"""In one statement. Their values are made within about half a millisecond."""

_COLUMNS: Final = tuple(usage_records.columns)
_NAMES: Final = ", ".join(column.name for column in _COLUMNS)
_TEXT: Final = sqlite.dialect()
_exact_text: Final = ExactNumeric().process_bind_param
_as_json: Final = msgspec.json.Encoder(decimal_format="string").encode

_Values = tuple[Any, ...]


def inserts(dialect: Dialect, records: Sequence[UsageRecord]) -> Iterator[tuple[str, _Values]]:
    """Statements for the driver, with their values; rows whose id exists are left alone.

    Raises TypeError for an amount that is no finite Decimal.
    """
    if dialect.name == "postgresql":
        for start in range(0, len(records), MOST_ROWS):
            part = records[start : start + MOST_ROWS]
            for record in part:
                _exact_text(record.tariff_usd, _TEXT)
            yield _of_json(dialect), (_as_json(part).decode(),)
        return
    start = 0
    while left := len(records) - start:
        # Powers of two: a connection prepares each of these few statements once.
        count = min(MOST_ROWS, 1 << left.bit_length() - 1)
        values: list[Any] = []
        for record in records[start : start + count]:
            values += _row(record)
        yield _of_rows(count), tuple(values)
        start += count


def _row(record: UsageRecord) -> _Values:
    """In the order of the table."""
    return (
        record.request_id,
        record.at_s,
        record.at_s + record.duration_s,
        record.tenant,
        record.key_id,
        record.model,
        record.group,
        record.pool,
        record.endpoint,
        record.outcome.value,
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        record.queue_s,
        record.ttft_s,
        record.duration_s,
        _exact_text(record.tariff_usd, _TEXT),
    )


@lru_cache
def _of_rows(count: int) -> str:
    """SQLite: one step of its engine, during which Python runs on."""
    row = f"({', '.join('?' * len(_COLUMNS))})"
    rows = ", ".join([row] * count)
    return f"INSERT INTO usage_records ({_NAMES}) VALUES {rows} ON CONFLICT DO NOTHING"


@lru_cache(maxsize=4)
def _of_json(dialect: Dialect) -> str:
    """PostgreSQL: one value for all rows, as the driver takes long over each value. Floats and
    decimals are written with all their digits, and read so."""
    fields, values = [], []
    for column in _COLUMNS:
        if column.name == "finished_at_s":
            values.append("at_s + duration_s")
            continue
        field = '"group"' if column.name == "group_name" else column.name
        fields.append(f"{field} {column.type.compile(dialect)}")
        values.append(field)
    return (
        f"INSERT INTO usage_records ({_NAMES}) SELECT {', '.join(values)} "
        f"FROM json_to_recordset($1::JSON) AS added ({', '.join(fields)}) ON CONFLICT DO NOTHING"
    )
