"""The tables, as they stand after the newest migration; a test compares the two."""

from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    false,
)
from sqlalchemy.types import TypeDecorator, TypeEngine


class ExactNumeric(TypeDecorator[Decimal]):
    """A Decimal with all its digits: NUMERIC, or text on SQLite, whose numbers are binary."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(String() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if not isinstance(value, Decimal) or not value.is_finite():
            raise TypeError(f"an exact amount must be a finite Decimal, got {value!r}")
        return str(value) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value)


# SQLite counts up only columns that are plain INTEGER.
_Serial = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()


def _limits() -> tuple[Column[Any], ...]:
    """NULL means without limit."""
    return (
        Column("requests_per_min", BigInteger),
        Column("tokens_per_min", BigInteger),
        Column("concurrent_requests", BigInteger),
        Column("usd_per_day", ExactNumeric),
        Column("usd_per_month", ExactNumeric),
    )


tenants = Table(
    "tenants",
    metadata,
    Column("name", String, primary_key=True),
    Column("priority", String, nullable=False),
    Column("weight", Double, nullable=False),
    *_limits(),
    Column("created_at_s", Double, nullable=False),
    Column("disabled_at_s", Double),
    Column("version", BigInteger, nullable=False),
    Index("ix_tenants_version", "version"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("prefix", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
    Column("models_json", Text),
    Column("admin", Boolean, nullable=False, server_default=false()),
    *_limits(),
    Column("version", BigInteger, nullable=False, server_default="0"),
    Index("ix_api_keys_tenant", "tenant"),
    Index("ix_api_keys_version", "version"),
)

# One row: grows by every change of a tenant or key, which carries the new number. Gateways watch
# it and read only what is newer, so a change made by hand must count it up too.
identity_version = Table(
    "identity_version",
    metadata,
    Column("version", BigInteger, nullable=False),
)

usage_records = Table(
    "usage_records",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("at_s", Double, nullable=False),
    Column("finished_at_s", Double, nullable=False),
    Column("tenant", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("model", String, nullable=False),
    Column("group_name", String, nullable=False),
    Column("pool", String, nullable=False),
    Column("endpoint", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("queue_s", Double, nullable=False),
    Column("ttft_s", Double),
    Column("duration_s", Double, nullable=False),
    Column("tariff_usd", ExactNumeric, nullable=False),
    Index("ix_usage_records_at_s", "at_s"),
    Index("ix_usage_records_finished_at_s", "finished_at_s"),
)

capacity_holds = Table(
    "capacity_holds",
    metadata,
    Column("group_name", String, primary_key=True),
    Column("started_at_s", Double, primary_key=True),
    Column("model", String, nullable=False),
    Column("pool", String, nullable=False),
    Column("usd_per_hour", ExactNumeric, nullable=False),
    Column("seen_at_s", Double, nullable=False),
    Column("ended_at_s", Double),
    Column("ready_at_s", Double),
    Column("draining_at_s", Double),
    Column("prefill_tokens_per_s", Double),
    Column("decode_tokens_per_s", Double),
    Column("idle_watts", Double),
    Column("busy_watts", Double),
)
# Group names come back after a group is gone; at most one hold of a name is open.
Index(
    "ux_capacity_holds_open",
    capacity_holds.c.group_name,
    unique=True,
    sqlite_where=capacity_holds.c.ended_at_s.is_(None),
    postgresql_where=capacity_holds.c.ended_at_s.is_(None),
)

node_holds = Table(
    "node_holds",
    metadata,
    Column("pool", String, primary_key=True),
    Column("node_id", String, primary_key=True),
    Column("started_at_s", Double, primary_key=True),
    Column("usd_per_hour", ExactNumeric, nullable=False),
    Column("seen_at_s", Double, nullable=False),
    Column("ended_at_s", Double),
    Column("idle_watts", Double),
)
Index(
    "ux_node_holds_open",
    node_holds.c.pool,
    node_holds.c.node_id,
    unique=True,
    sqlite_where=node_holds.c.ended_at_s.is_(None),
    postgresql_where=node_holds.c.ended_at_s.is_(None),
)

provider_tariffs = Table(
    "provider_tariffs",
    metadata,
    Column("model", String, primary_key=True),
    Column("pool", String, primary_key=True),
    Column("since_s", Double, primary_key=True),
    Column("usd_per_mtok_in", ExactNumeric, nullable=False),
    Column("usd_per_mtok_cached", ExactNumeric, nullable=False),
    Column("usd_per_mtok_out", ExactNumeric, nullable=False),
)

journal_entries = Table(
    "journal_entries",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("at_s", Double, nullable=False),
    Column("kind", String, nullable=False),
    Column("model", String),
    Column("payload_json", Text, nullable=False),
    # NULL when whoever wrote it held no lease.
    Column("term", BigInteger),
    Index("ix_journal_entries_model_seq", "model", "seq"),
    Index("ix_journal_entries_term", "term"),
    # A number is never given out again, not even after the newest entries were deleted.
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("name", String, primary_key=True),
    # NULL when nobody holds it.
    Column("holder", String),
    Column("url", String, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("transitions", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    # For people: nobody judges a lease by another machine's clock.
    Column("renewed_at_s", Double, nullable=False),
)
