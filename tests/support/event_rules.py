"""The rule of a database that lets events go, but for states; for tests, as long as no step of the schema brings it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import text

from gnomon_service.db.engine import Database

_STATEMENTS: Final = {
    "sqlite": (
        "DROP TRIGGER IF EXISTS job_events_remain",
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


def let_events_go(database: Database) -> None:
    """Give a database that rule."""
    with database.write() as connection:
        for statement in _STATEMENTS[database.dialect]:
            connection.execute(text(statement))
