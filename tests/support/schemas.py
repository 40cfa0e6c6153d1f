"""Databases that have the present schema and nothing in it, for tests that need thousands: migrating takes too long."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from sqlalchemy import text

from gnomon_service.db.engine import Database
from gnomon_service.db.tables import legal_transitions, metadata
from tests.support.databases import fresh_database


def empty_sqlite(folder: Path) -> str:
    """URL of a new file in a folder."""
    path = folder / "gnomon.db"
    shutil.copy(_migrated_file(), path)
    return f"sqlite:///{path}"


def emptied_postgresql() -> Database:
    """The one database of this process, without what was in it."""
    database = _migrated_postgresql()
    emptied = [table.name for table in metadata.sorted_tables if table is not legal_transitions]
    with database.write() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(emptied)}"))
    return database


@cache
def _migrated_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gnomon-schema-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    database = Database(f"sqlite:///{folder / 'empty.db'}")
    database.migrate()
    database.close()
    return folder / "empty.db"


@cache
def _migrated_postgresql() -> Database:
    until_the_end = ExitStack()
    database = Database(until_the_end.enter_context(fresh_database("postgresql", Path())))
    atexit.register(until_the_end.close)  # before its server's end, which was registered earlier
    atexit.register(database.close)
    database.migrate()
    return database
