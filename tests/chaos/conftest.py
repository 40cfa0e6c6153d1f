"""Fixtures of the faults: each database once as SQLite, once as PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gnomon_service.db.engine import Database
from tests.chaos.counts import IS_CHAOS
from tests.chaos.scene import Scene, scene_of
from tests.integration.conftest import database
from tests.support.databases import DIALECTS, fresh_database

__all__ = ["database"]

# They watch processes against the clock: beside others they take minutes, and only `make chaos` has those.
_CLOCKED = ("clocks", "failing_store", "full_disk", "garbage", "kills", "outages", "pauses", "ray_loss")
collect_ignore = [] if IS_CHAOS else [f"test_{name}.py" for name in _CLOCKED]


@pytest.fixture(params=DIALECTS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """A scene on either database."""
    with fresh_database(request.param, tmp_path) as url:
        migrate(url)
        with scene_of(url, tmp_path) as made:
            yield made


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """URL of a PostgreSQL database with the present schema."""
    with fresh_database("postgresql", tmp_path) as url:
        migrate(url)
        yield url


def migrate(url: str) -> None:
    """Give a database the present schema."""
    database = Database(url)
    database.migrate()
    database.close()
