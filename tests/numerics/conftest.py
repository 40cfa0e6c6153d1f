"""Fixtures of the numerics tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.numerics.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four processes that form meshes."""
    pool = RankPool(4)
    yield pool
    pool.close()
