"""What the collector goes by: what jobs left in the store, deleted dictionaries, bytes of stores per project."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it; whatever there is, is taken to be kept, and looked at once."""
    op.add_column("jobs", sa.Column("leftovers", sa.String(8), nullable=False, server_default="kept"))
    op.create_index("ix_jobs_of_store", "jobs", ["project", "store_id"])
    op.add_column("activation_stores", sa.Column("deleted_why", sa.String))
    for column in (
        sa.Column("state", sa.String(16), nullable=False, server_default="published"),
        sa.Column("deleted_why", sa.String),
        sa.Column("purge_at", sa.Float),
    ):
        op.add_column("dictionaries", column)
    op.add_column("projects", sa.Column("n_store_bytes_most", sa.BigInteger))
    op.add_column("cluster", sa.Column("collected_at", sa.Float))
    op.add_column("cluster", sa.Column("collected", sa.JSON))
