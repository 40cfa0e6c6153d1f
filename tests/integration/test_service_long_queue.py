"""What is asked of PostgreSQL about a long queue is asked once, and not for each of its jobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sqlalchemy import event

from gnomon_service.db.engine import Database
from gnomon_service.jobs.waiting import read_waiting
from tests.support.databases import fresh_database
from tests.support.service_jobs import Bench


def test_what_jobs_wait_for_is_looked_up_once_for_all_of_them(tmp_path: Path) -> None:
    """Asked for each of ten thousand, it took longer than a statement may, and nothing was started any more."""
    asked: list[tuple[str, Any]] = []
    with fresh_database("postgresql", tmp_path) as url:
        database = Database(url)
        database.migrate()
        Bench(database).submit()

        def note(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
            asked.append((statement, values))

        event.listen(database._engine, "before_cursor_execute", note)
        with database.read() as connection:
            read_waiting(connection)
            (statement, values), *_ = asked
            plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN VERBOSE {statement}", values)]
        database.close()
    parts = re.findall(r"(hashed )?SubPlan \d+\)", "\n".join(plan))
    assert parts and all(parts), "\n".join(plan)
