"""Bringing a schema up to date while processes of this and of the previous release work on it.

All steps are one transaction: a process that is killed in the middle leaves the schema as it was. On PostgreSQL every
table is locked before the first step, and each lock is waited for shorter than the server looks for deadlocks: it is
the upgrade that gives way and tries again, and no transaction of somebody else's is ended for it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from gnomon.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from gnomon_service.db.engine import Database

PATIENCE_S: Final = 120.0
"""How long an upgrade tries to get the database for itself."""
_MIGRATION_LOCK: Final = 7_600_001
_LOCK_MS: Final = 500
"""For one lock, behind which everybody else waits too; the server looks for deadlocks after 1000."""
_IN_USE: Final = ("55P03", "40P01")
"""What PostgreSQL says: the lock was not to be had in time, or two waited for each other."""
_SQLITE_BUSY: Final = 5


def upgrade(database: Database, *, to: str = "head", patience_s: float = PATIENCE_S) -> None:
    """Bring the schema up to date, or to one revision; those who do so at once wait for each other.

    Raises Conflict, code "database_newer", if a later release made the schema; Unavailable, code "database_in_use", if
    somebody else held it for patience_s.
    """
    config = _config()
    if not _is_behind(database, ScriptDirectory.from_config(config), to):
        return  # without a lock: every process asks this when it starts
    deadline = time.monotonic() + patience_s
    while True:
        try:
            _try_once(database, config, to)
            return
        except Unavailable as error:
            if not _is_in_use(error):
                raise
            if time.monotonic() > deadline:
                raise _in_use(patience_s) from error
        time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - in which those who waited behind this one get their turn


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _is_behind(database: Database, steps: ScriptDirectory, to: str) -> bool:
    """Whether anything is to be done; raises Conflict where this release does not know the schema."""
    with database.read() as connection:
        present = MigrationContext.configure(connection).get_current_revision()
    known = [step.revision for step in steps.walk_revisions()]
    if present is not None and present not in known:
        raise Conflict(
            f"the database has the schema of a newer release, {present!r}, and this one knows it up to {known[0]!r}; "
            "run the newer release, or restore the backup that was made before its upgrade",
            code="database_newer",
        )
    return present != (known[0] if to == "head" else to)


def _try_once(database: Database, config: Config, to: str) -> None:
    with database.write() as connection:
        if database.dialect == "postgresql":
            _lock_all(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, to)


def _lock_all(connection: Connection) -> None:
    connection.execute(text("SET LOCAL statement_timeout = 0"))  # a large table takes what it takes
    connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_MS}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    tables = sorted(inspect(connection).get_table_names())
    if tables:
        quoted = ", ".join(f'"{name}"' for name in tables)
        connection.execute(text(f"LOCK TABLE {quoted} IN ACCESS EXCLUSIVE MODE"))


def _is_in_use(error: Unavailable) -> bool:
    """Whether somebody else holds what the upgrade needs; a database that does not answer is another matter."""
    cause = getattr(error.__cause__, "orig", None)
    on_sqlite = getattr(cause, "sqlite_errorcode", 0) & 0xFF == _SQLITE_BUSY
    return on_sqlite or getattr(cause, "sqlstate", None) in _IN_USE


def _in_use(patience_s: float) -> Unavailable:
    return Unavailable(
        f"the schema is as it was: another process held the database for {patience_s:g} s (one that stands still in a "
        "transaction, or a backup; PostgreSQL lists them in pg_stat_activity); end it, then upgrade again",
        code="database_in_use",
    )
