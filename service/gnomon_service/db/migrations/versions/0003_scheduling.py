"""What the scheduler decides by: classes, pauses and places of jobs; nodes; projects; a dispatcher that leads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them; jobs that run go on, and are counted as holding nothing until they say what they hold."""
    for column in (
        sa.Column("job_class", sa.String(8), nullable=False, server_default="normal"),
        sa.Column("paused_by", sa.String(128)),
        sa.Column("leave_why", sa.String),
        sa.Column("places", sa.JSON),
        sa.Column("places_wanted", sa.JSON),
        sa.Column("mesh", sa.JSON),
        sa.Column("expected_s", sa.Float),
        sa.Column("guest_until", sa.Float),
        sa.Column("waits_in_queue", sa.JSON),
    ):
        op.add_column("jobs", column)
    op.add_column("attempts", sa.Column("n_devices", sa.Integer, nullable=False, server_default="0"))
    for column in (
        sa.Column("leader", sa.String(128)),
        sa.Column("leader_until", sa.Float),
        sa.Column("drained_by", sa.String(128)),
    ):
        op.add_column("cluster", column)
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("n_cpus", sa.Float, nullable=False),
        sa.Column("n_gpus", sa.Float, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger),
        sa.Column("seen_at", sa.Float, nullable=False),
        sa.Column("drained_by", sa.String(128)),
    )
    op.create_table(
        "projects",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("weight", sa.Float, nullable=False, server_default="1"),
        sa.Column("n_jobs_most", sa.Integer),
        sa.Column("n_devices_most", sa.Integer),
        sa.Column("held_by", sa.String(128)),
    )
