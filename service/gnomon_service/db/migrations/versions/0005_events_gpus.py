"""Events but states may go; the memory of nodes' GPUs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATEMENTS = {
    "sqlite": (
        "DROP TRIGGER job_events_remain",
        """
        CREATE TRIGGER job_events_remain BEFORE DELETE ON job_events WHEN OLD.kind = 'state'
        BEGIN SELECT RAISE(ABORT, 'states are kept'); END
        """,
    ),
    "postgresql": (
        """
        CREATE OR REPLACE FUNCTION job_events_stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF TG_OP = 'DELETE' AND OLD.kind <> 'state'
            THEN RETURN OLD;
            END IF;
            RAISE integrity_constraint_violation USING MESSAGE = 'events are not changed, and states are kept';
        END $$
        """,
    ),
}


def upgrade() -> None:
    """Change the rule, and add the column."""
    for statement in STATEMENTS[op.get_bind().dialect.name]:
        op.execute(statement)
    op.add_column("nodes", sa.Column("gpu_memory_bytes", sa.BigInteger))
