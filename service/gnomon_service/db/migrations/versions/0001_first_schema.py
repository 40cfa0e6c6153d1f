"""The first schema: jobs and their events, stores, dictionaries, keys, and the rules that triggers hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TRANSITIONS = (
    ("queued", "scheduled"),
    ("queued", "succeeded"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("scheduled", "running"),
    ("scheduled", "queued"),
    ("scheduled", "failed"),
    ("scheduled", "cancelled"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
)

SQLITE_TRIGGERS = (
    """
    CREATE TRIGGER jobs_begin_queued BEFORE INSERT ON jobs WHEN NEW.state <> 'queued'
    BEGIN SELECT RAISE(ABORT, 'a job begins queued'); END
    """,
    """
    CREATE TRIGGER jobs_change_legally BEFORE UPDATE OF state ON jobs
    WHEN OLD.state <> NEW.state AND NOT EXISTS (
        SELECT 1 FROM legal_transitions WHERE from_state = OLD.state AND to_state = NEW.state)
    BEGIN SELECT RAISE(ABORT, 'illegal transition'); END
    """,
    """
    CREATE TRIGGER job_events_stay BEFORE UPDATE ON job_events
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
    """,
    """
    CREATE TRIGGER job_events_remain BEFORE DELETE ON job_events
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
    """,
)

POSTGRESQL_TRIGGERS = (
    """
    CREATE FUNCTION jobs_begin_queued() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.state <> 'queued'
        THEN RAISE integrity_constraint_violation USING MESSAGE = 'a job begins queued';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER jobs_begin_queued BEFORE INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_begin_queued()
    """,
    """
    CREATE FUNCTION jobs_change_legally() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF OLD.state <> NEW.state AND NOT EXISTS (
            SELECT 1 FROM legal_transitions WHERE from_state = OLD.state AND to_state = NEW.state)
        THEN RAISE integrity_constraint_violation USING MESSAGE = 'illegal transition';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER jobs_change_legally BEFORE UPDATE OF state ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_change_legally()
    """,
    """
    CREATE FUNCTION job_events_stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE integrity_constraint_violation USING MESSAGE = 'events are append-only';
    END $$
    """,
    """
    CREATE TRIGGER job_events_stay BEFORE UPDATE OR DELETE ON job_events
    FOR EACH ROW EXECUTE FUNCTION job_events_stay()
    """,
)


def upgrade() -> None:
    """Create everything."""
    create_jobs()
    create_histories()
    create_stores()
    create_dictionaries()
    create_operations()
    create_rules()


def create_jobs() -> None:
    """Jobs."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("store_id", sa.String(length=40), nullable=False),
        sa.Column("dictionary_id", sa.String(length=40), nullable=True),
        sa.Column("made_for", sa.String(length=40), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Float(), nullable=False),
        sa.Column("deadline_at", sa.Float(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("lease_owner", sa.String(length=128), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("progress", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("n_events", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("body_hash", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("project", "idempotency_key", name=op.f("uq_jobs_project")),
    )
    op.create_index("ix_jobs_of_project", "jobs", ["project", "created_at", "id"], unique=False)
    op.create_index("ix_jobs_ready", "jobs", ["state", "priority", "created_at"], unique=False)


def create_histories() -> None:
    """What belongs to a job."""
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id")),
        sa.PrimaryKeyConstraint("job_id", "id", name=op.f("pk_job_events")),
    )
    op.create_table(
        "job_dependencies",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("depends_on", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["depends_on"], ["jobs.id"], name=op.f("fk_job_dependencies_depends_on")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_dependencies_job_id")),
        sa.PrimaryKeyConstraint("job_id", "depends_on", name=op.f("pk_job_dependencies")),
    )
    op.create_index(op.f("ix_job_dependencies_depends_on"), "job_dependencies", ["depends_on"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lease_owner", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("last_report_seq", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("released", sa.Boolean(), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id")),
        sa.PrimaryKeyConstraint("job_id", "attempt", name=op.f("pk_attempts")),
    )
    op.create_index("ix_attempts_unreleased", "attempts", ["released", "ended_at"], unique=False)


def create_stores() -> None:
    """Activation stores."""
    op.create_table(
        "activation_stores",
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("n_rows", sa.BigInteger(), nullable=True),
        sa.Column("n_held_out_rows", sa.BigInteger(), nullable=True),
        sa.Column("n_bytes", sa.BigInteger(), nullable=True),
        sa.Column("hooks", sa.JSON(), nullable=False),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_activation_stores_job_id")),
        sa.PrimaryKeyConstraint("project", "id", name=op.f("pk_activation_stores")),
    )


def create_dictionaries() -> None:
    """Dictionaries."""
    op.create_table(
        "dictionaries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("store_id", sa.String(length=40), nullable=False),
        sa.Column("hook_name", sa.String(length=256), nullable=False),
        sa.Column("d_in", sa.Integer(), nullable=False),
        sa.Column("d_sae", sa.Integer(), nullable=False),
        sa.Column("activation", sa.String(length=32), nullable=False),
        sa.Column("alignment", sa.String(length=16), nullable=False),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_dictionaries_job_id")),
        sa.ForeignKeyConstraint(
            ["project", "store_id"],
            ["activation_stores.project", "activation_stores.id"],
            name=op.f("fk_dictionaries_project"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dictionaries")),
    )
    op.create_index("ix_dictionaries_of_project", "dictionaries", ["project", "created_at", "id"], unique=False)


def create_operations() -> None:
    """Keys and the cluster."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=12), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("secret_hash", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "cluster",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=True),
        sa.Column("n_cpus", sa.Float(), nullable=False),
        sa.Column("n_gpus", sa.Float(), nullable=False),
        sa.Column("n_nodes", sa.Integer(), nullable=False),
        sa.Column("dispatcher_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cluster")),
    )


def create_rules() -> None:
    """The legal transitions, and the triggers that hold them."""
    op.create_table(
        "legal_transitions",
        sa.Column("from_state", sa.String(length=16), nullable=False),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("from_state", "to_state", name=op.f("pk_legal_transitions")),
    )
    columns = (sa.column("from_state", sa.String), sa.column("to_state", sa.String))
    rows = [{"from_state": old, "to_state": new} for old, new in TRANSITIONS]
    op.bulk_insert(sa.table("legal_transitions", *columns), rows)
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in SQLITE_TRIGGERS if on_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)
