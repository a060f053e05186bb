"""Keys, ledger and journal."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    exact = sa.Numeric().with_variant(sa.String(), "sqlite")
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("prefix", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("expires_at_s", sa.Double),
        sa.Column("revoked_at_s", sa.Double),
    )
    op.create_table(
        "usage_records",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("finished_at_s", sa.Double, nullable=False),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("group_name", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("endpoint", sa.String, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("queue_s", sa.Double, nullable=False),
        sa.Column("ttft_s", sa.Double),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.Column("tariff_usd", exact, nullable=False),
    )
    op.create_index("ix_usage_records_at_s", "usage_records", ["at_s"])
    op.create_index("ix_usage_records_finished_at_s", "usage_records", ["finished_at_s"])
    op.create_table(
        "capacity_holds",
        sa.Column("group_name", sa.String, primary_key=True),
        sa.Column("started_at_s", sa.Double, primary_key=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("usd_per_hour", exact, nullable=False),
        sa.Column("seen_at_s", sa.Double, nullable=False),
        sa.Column("ended_at_s", sa.Double),
    )
    op.create_index(
        "ux_capacity_holds_open",
        "capacity_holds",
        ["group_name"],
        unique=True,
        sqlite_where=sa.text("ended_at_s IS NULL"),
        postgresql_where=sa.text("ended_at_s IS NULL"),
    )
    op.create_table(
        "journal_entries",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("model", sa.String),
        sa.Column("payload_json", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_journal_entries_model_seq", "journal_entries", ["model", "seq"])
