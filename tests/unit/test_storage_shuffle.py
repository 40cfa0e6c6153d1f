"""The order of rows: complete, shuffled, and the same however it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.errors import InvalidRequest
from gnomon_storage import writing
from gnomon_storage.activations import ActivationStore
from gnomon_storage.shuffle import BatchReader, RowOrder
from tests.support.activation_stores import make_counted_store

SIZES = (700, 513, 300)
N_ROWS = sum(SIZES)
BATCH = 96
GOLDEN = [347, 1482, 1469, 1406, 391, 1439, 1376, 412, 1509, 1466, 1483, 1398]
BUFFER_BYTES = 3 * 256 * 8 * 4
"""Three chunks: the store then has three buffers."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A store with seven chunks, the last of every segment short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(writing.CHUNK_BYTES, "file", 1)
        return make_counted_store(tmp_path_factory.mktemp("store"), sizes=SIZES)


def reader(store: ActivationStore, *, seed: int = 0, hook: str = "layers.0", buffer: int = BUFFER_BYTES) -> BatchReader:
    """A reader with small buffers."""
    return BatchReader(store, hook, seed=seed, batch_size=BATCH, buffer_bytes=buffer)


def numbers(store: ActivationStore, n_steps: int, *, seed: int = 0, buffer: int = BUFFER_BYTES) -> list[int]:
    """Numbers of the rows of the first batches, in order."""
    with reader(store, seed=seed, buffer=buffer) as batches:
        return [int(n) for step in range(n_steps) for n in batches.batch(step, 0, BATCH)[:, 0]]


@pytest.mark.parametrize("buffer", [1, BUFFER_BYTES, 1 << 30])
def test_each_row_once_an_epoch(store: ActivationStore, buffer: int) -> None:
    found = numbers(store, 4 * N_ROWS // BATCH, buffer=buffer)
    for epoch in range(3):
        assert sorted(found[epoch * N_ROWS : (epoch + 1) * N_ROWS]) == list(range(N_ROWS))
    assert found[:N_ROWS] != found[N_ROWS : 2 * N_ROWS]


def test_rows_are_shuffled_across_segments(store: ActivationStore) -> None:
    batch = numbers(store, 1)
    assert len({number // 256 for number in batch}) >= 2
    assert np.corrcoef(batch, range(BATCH))[0, 1] < 0.5


def test_seeds_differ_and_hooks_agree(store: ActivationStore) -> None:
    assert numbers(store, 2, seed=1) != numbers(store, 2, seed=2)
    with reader(store) as one, reader(store, hook="layers.1") as two:
        np.testing.assert_array_equal(one.batch(3, 0, BATCH)[:, 0], two.batch(3, 0, BATCH)[:, 0])


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_any_split_reads_the_same_rows(store: ActivationStore, n_ranks: int) -> None:
    expected = numbers(store, 40)
    share = BATCH // n_ranks
    ranks = [reader(store) for _ in range(n_ranks)]
    found = [
        int(number)
        for step in range(40)
        for rank in range(n_ranks)
        for number in ranks[rank].batch(step, rank * share, (rank + 1) * share)[:, 0]
    ]
    for rank_reader in ranks:
        rank_reader.close()
    assert found == expected


def test_resuming_at_any_step_reads_the_same_rows(store: ActivationStore) -> None:
    with reader(store) as whole:
        expected = [whole.batch(step, 0, BATCH) for step in range(50)]
    for first in (1, 7, 15, 16, 31, 49):
        with reader(store) as resumed:
            for step in range(first, 50):
                np.testing.assert_array_equal(resumed.batch(step, 0, BATCH), expected[step])
    with reader(store) as backwards:
        for step in (49, 3, 30, 0):
            np.testing.assert_array_equal(backwards.batch(step, 0, BATCH), expected[step])


def test_the_order_never_changes(store: ActivationStore) -> None:
    # Written down once: a resumed job depends on it across versions of NumPy and of this project.
    assert numbers(store, 1, seed=7)[:12] == GOLDEN


def test_first_sample_is_fixed_and_bounded(store: ActivationStore) -> None:
    with reader(store) as one, reader(store) as two:
        np.testing.assert_array_equal(one.first_sample(1000), two.first_sample(1000))
        assert sorted(one.first_sample(10**6)[:, 0]) == list(range(N_ROWS))


def test_a_batch_larger_than_the_store_wraps(store: ActivationStore) -> None:
    with BatchReader(store, "layers.0", seed=0, batch_size=4 * N_ROWS, buffer_bytes=BUFFER_BYTES) as batches:
        rows = batches.batch(0, 0, 4 * N_ROWS)[:, 0].astype(int)
    assert (np.bincount(rows) == 4).all()


def test_at_most_two_buffers_are_held(store: ActivationStore) -> None:
    with reader(store) as batches:
        for step in range(40):
            batches.batch(step, 0, BATCH)
            assert len(batches._loading) <= 2


def test_wrong_ranges_and_hooks_are_refused(store: ActivationStore) -> None:
    with reader(store) as batches, pytest.raises(IndexError):
        batches.batch(0, 0, BATCH + 1)
    with pytest.raises(InvalidRequest) as caught:
        reader(store, hook="layers.9")
    assert "layers.0" in caught.value.message


def test_buffers_of_an_epoch_are_of_even_size() -> None:
    order = RowOrder([10] * 11, seed=0, buffer_chunks=5)
    sizes = [len(order.buffer(0, index).order) for index in range(order.n_buffers)]
    assert sorted(sizes) == [30, 40, 40]
    assert order.locate(109)[:2] == (0, 2)
    assert order.locate(110) == (1, 0, 0)
