"""Fixtures of the numerics tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import RankPool


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors are tiny here: threads that wait for each other on a busy machine would take most of the time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that form meshes."""
    pool = RankPool()
    yield pool
    pool.close()
