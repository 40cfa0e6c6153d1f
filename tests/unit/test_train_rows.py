"""Joint rows hold the activations of one token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gnomon_workers.train.sources import JointReader
from tests.support.stores import make_store


def test_hooks_are_joined_token_by_token_over_epochs(tmp_path: Path) -> None:
    """Hooks of one width hold the same rows here, so that a row of two hooks is the same row twice."""
    store = make_store(tmp_path, hooks={"model.layers.0": 16, "model.layers.1": 16, "model.layers.2": 24})
    names = ["model.layers.2", "model.layers.0", "model.layers.1"]
    n_steps = 3 * store.manifest.n_rows // 512
    with (
        JointReader(store, names, seed=3, batch_size=512) as joint,
        JointReader(store, names[:1], seed=3, batch_size=512) as alone,
    ):
        for step in range(n_steps):
            rows = joint.batch(step, 100, 500)
            assert rows.shape == (400, 24 + 16 + 16)
            np.testing.assert_array_equal(rows[:, 24:40], rows[:, 40:])
            np.testing.assert_array_equal(rows[:, :24], alone.batch(step, 100, 500))
        sample = joint.first_sample(100)
    assert sample.shape == (100, 56) and not np.array_equal(rows[:100], sample)
