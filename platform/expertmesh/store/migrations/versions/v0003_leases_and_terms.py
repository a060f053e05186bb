"""Leases of controllers; the term in which a journal entry was written."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("holder", sa.String),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.Column("transitions", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("renewed_at_s", sa.Double, nullable=False),
    )
    op.add_column("journal_entries", sa.Column("term", sa.BigInteger))
    op.create_index("ix_journal_entries_term", "journal_entries", ["term"])
