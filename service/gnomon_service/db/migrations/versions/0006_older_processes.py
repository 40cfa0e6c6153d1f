"""What a process of an earlier release may still write, once the schema is this one's.

Such a dispatcher knows neither pauses nor devices: what it claimed could be a job that somebody paused, on devices that
another holds. It is refused. And whatever ends or gives back an attempt, the job no longer has what belongs to one.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

REFUSAL = "this dispatcher is of an earlier release than the database; stop it and start the present one"

SQLITE_TRIGGERS = (
    f"""
    CREATE TRIGGER jobs_claimed_with_places BEFORE UPDATE OF state ON jobs
    WHEN OLD.state = 'queued' AND NEW.state = 'scheduled' AND NEW.places IS NULL
    BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END
    """,
    """
    CREATE TRIGGER jobs_let_go AFTER UPDATE OF state ON jobs
    WHEN NEW.state NOT IN ('scheduled', 'running')
        AND COALESCE(NEW.places, NEW.places_wanted, NEW.guest_until, NEW.leave_why) IS NOT NULL
    BEGIN
        UPDATE jobs SET places = NULL, places_wanted = NULL, guest_until = NULL, leave_why = NULL WHERE id = NEW.id;
    END
    """,
)

POSTGRESQL_TRIGGERS = (
    f"""
    CREATE FUNCTION jobs_claimed_with_places() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF OLD.state = 'queued' AND NEW.state = 'scheduled' AND NEW.places IS NULL
        THEN RAISE integrity_constraint_violation USING MESSAGE = '{REFUSAL}';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER jobs_claimed_with_places BEFORE UPDATE OF state ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_claimed_with_places()
    """,
    """
    CREATE FUNCTION jobs_let_go() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.state NOT IN ('scheduled', 'running') THEN
            NEW.places := NULL; NEW.places_wanted := NULL; NEW.guest_until := NULL; NEW.leave_why := NULL;
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER jobs_let_go BEFORE UPDATE OF state ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_let_go()
    """,
)


def upgrade() -> None:
    """Add the rules."""
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in SQLITE_TRIGGERS if on_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)
