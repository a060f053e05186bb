"""Tenants with limits; scopes and limits of keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("priority", sa.String, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        *_limits(),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("disabled_at_s", sa.Double),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_tenants_version", "tenants", ["version"])
    op.add_column("api_keys", sa.Column("models_json", sa.Text))
    op.add_column(
        "api_keys", sa.Column("admin", sa.Boolean, nullable=False, server_default=sa.false())
    )
    for column in _limits():
        op.add_column("api_keys", column)
    op.add_column(
        "api_keys", sa.Column("version", sa.BigInteger, nullable=False, server_default="0")
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    op.create_index("ix_api_keys_version", "api_keys", ["version"])
    op.create_table("identity_version", sa.Column("version", sa.BigInteger, nullable=False))
    op.execute("INSERT INTO identity_version (version) VALUES (1)")
    op.execute(
        "INSERT INTO tenants (name, priority, weight, created_at_s, version) "
        "SELECT tenant, 'standard', 1.0, min(created_at_s), 1 FROM api_keys GROUP BY tenant"
    )


def _limits() -> tuple[sa.Column[object], ...]:
    exact = sa.Numeric().with_variant(sa.String(), "sqlite")
    return (
        sa.Column("requests_per_min", sa.BigInteger),
        sa.Column("tokens_per_min", sa.BigInteger),
        sa.Column("concurrent_requests", sa.BigInteger),
        sa.Column("usd_per_day", exact),
        sa.Column("usd_per_month", exact),
    )
