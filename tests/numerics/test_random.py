"""Counter-based draws: independent of each other, and of what else is drawn."""

from __future__ import annotations

import torch

from gnomon_workers.sae.random import make_generator, random_unit_rows


def test_no_two_rows_are_alike() -> None:
    """Blocks of rows come from generators of their own; equal ones would make features that tie for ever."""
    rows = random_unit_rows(3, "init", 0, 2000, 16)
    cosines = rows @ rows.t() - 2 * torch.eye(2000)
    assert cosines.max() < 0.99
    assert torch.allclose(rows.norm(dim=1), torch.ones(2000))


def test_rows_do_not_depend_on_the_range_asked_for() -> None:
    rows = random_unit_rows(3, "init", 0, 1000, 16)
    assert torch.equal(random_unit_rows(3, "init", 300, 777, 16), rows[300:777])


def test_seed_purpose_and_index_all_matter() -> None:
    draws = {
        tuple(make_generator(*key).standard_normal(4))
        for key in [(0, "init", 0), (1, "init", 0), (0, "other", 0), (0, "init", 1), (2**63 - 1, "init", 0)]
    }
    assert len(draws) == 5
