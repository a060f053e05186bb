"""Nodes, tariffs of providers; when groups were ready, and what they do and draw."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    exact = sa.Numeric().with_variant(sa.String(), "sqlite")
    for name in (
        "ready_at_s",
        "draining_at_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "idle_watts",
        "busy_watts",
    ):
        op.add_column("capacity_holds", sa.Column(name, sa.Double))
    # Nobody noted when these were ready: what they did not serve stays idle time.
    op.execute("UPDATE capacity_holds SET ready_at_s = started_at_s")
    op.create_table(
        "node_holds",
        sa.Column("pool", sa.String, primary_key=True),
        sa.Column("node_id", sa.String, primary_key=True),
        sa.Column("started_at_s", sa.Double, primary_key=True),
        sa.Column("usd_per_hour", exact, nullable=False),
        sa.Column("seen_at_s", sa.Double, nullable=False),
        sa.Column("ended_at_s", sa.Double),
        sa.Column("idle_watts", sa.Double),
    )
    op.create_index(
        "ux_node_holds_open",
        "node_holds",
        ["pool", "node_id"],
        unique=True,
        sqlite_where=sa.text("ended_at_s IS NULL"),
        postgresql_where=sa.text("ended_at_s IS NULL"),
    )
    op.create_table(
        "provider_tariffs",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("pool", sa.String, primary_key=True),
        sa.Column("since_s", sa.Double, primary_key=True),
        sa.Column("usd_per_mtok_in", exact, nullable=False),
        sa.Column("usd_per_mtok_cached", exact, nullable=False),
        sa.Column("usd_per_mtok_out", exact, nullable=False),
    )
