"""Fixtures of the integration tests: each database once as SQLite, once as PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gnomon_service.db.engine import Database
from tests.support.databases import DIALECTS, fresh_database
from tests.support.waiting import LIMIT_S


@pytest.fixture(params=DIALECTS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with the present schema."""
    with fresh_database(request.param, tmp_path) as url:
        made = Database(url, busy_timeout_s=LIMIT_S)
        made.migrate()
        yield made
        made.close()
