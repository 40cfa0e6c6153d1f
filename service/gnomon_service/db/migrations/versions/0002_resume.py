"""Losses are counted apart from attempts, and an ended job may be resumed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TRANSITIONS = (("failed", "queued"), ("cancelled", "queued"))


def upgrade() -> None:
    """Add the count, and the transitions that a resumed job makes."""
    op.add_column("jobs", sa.Column("n_losses", sa.Integer, nullable=False, server_default="0"))
    rules = sa.table("legal_transitions", sa.column("from_state", sa.String), sa.column("to_state", sa.String))
    op.bulk_insert(rules, [{"from_state": old, "to_state": new} for old, new in TRANSITIONS])
