"""The room that a harvest is said to need is that which it takes, and no text is taken for more than it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gnomon.specs import HarvestSpec, StoredDtype, TextSource
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit, Split
from gnomon_storage.writing import SegmentWriter
from gnomon_workers.harvest.readers import text_bytes
from gnomon_workers.harvest.room import expected_tokens, needed_bytes, store_size
from gnomon_workers.harvest.telling import warn_of_short_text
from gnomon_workers.harvest.text import resolve_text
from gnomon_workers.runtime.reporting import Reporter
from tests.support.stored_rows import as_stored


def spec(**changes: Any) -> HarvestSpec:
    """A harvest of two hooks."""
    fields = {"model": {"source": "m"}, "text": [{"url": "/a"}], "hooks": ["h", "i"], "context_length": 100}
    return HarvestSpec.model_validate({**fields, "token_budget": 10**6, **changes})


@pytest.mark.parametrize(("dtype", "n_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_rows_columns_and_contexts_are_counted(dtype: str, n_bytes: int) -> None:
    needed = needed_bytes(spec(dtype=dtype, drop={"first_positions": 10}), {"h": 64, "i": 32, "j": 999}, 1000)
    assert needed == 900 * (96 * n_bytes + 3 * 4) + 1000 * 4
    assert needed_bytes(spec(), {}, -5) == 0


def test_a_budget_beyond_the_text_is_not_counted() -> None:
    assert expected_tokens(spec(token_budget=10**12), 1000, 4000, 40_000) == 10_000
    assert expected_tokens(spec(token_budget=2000), 1000, 4000, 40_000) == 2000


@pytest.mark.parametrize(("n_tokens", "is_told"), [(100, True), (900, True), (901, False), (1000, False)])
def test_a_text_that_ends_before_the_budget_is_told_of(n_tokens: int, is_told: bool) -> None:
    fields: dict[str, Any] = {"name": "part-00000", "index": 0, "attempt": 1, "n_contexts": 9, "chunk_rows": 1}
    fields |= {"files": {}, "sums": {}}
    halves = [
        SegmentCommit(split="segments", n_rows=70, n_tokens=n_tokens - 40, **fields),
        SegmentCommit(split="held_out", n_rows=30, n_tokens=40, **fields),
    ]
    reporter = Reporter()
    warn_of_short_text(spec(token_budget=1000), halves, reporter)
    said = [report.data["message"] for report in reporter.after(0)]
    assert len(said) == is_told
    assert all(f"after {n_tokens} of token_budget=1000 tokens: the store has 70 rows, and 30" in each for each in said)


def test_the_bytes_of_a_text_are_those_of_its_column(tmp_path: Path) -> None:
    texts = [f"{number} " * 500 for number in range(1000)]
    pq.write_table(pa.table({"text": texts, "other": texts}), tmp_path / "x.parquet", use_dictionary=False)
    (tmp_path / "x.txt").write_text("abc")
    files = resolve_text([TextSource(url=f"{tmp_path}/x.{end}") for end in ("parquet", "txt")], [str(tmp_path)])
    unpacked, plain = map(text_bytes, files)
    assert plain == 3 and unpacked == pytest.approx(sum(map(len, texts)), rel=0.02)


@pytest.mark.parametrize(("dtype", "d_in"), [("float32", 1024), ("bfloat16", 2048), ("int8", 4092)])
def test_a_store_takes_what_it_is_said_to_with_the_rest_of_its_last_chunks(
    tmp_path: Path, dtype: StoredDtype, d_in: int
) -> None:
    """Chunks of 4 MiB hold 1,024 rows of four kilobytes: 1,270 rows take two of them, a fifth of which is empty."""
    harvest = spec(
        dtype=dtype, context_length=128, hooks=["h"], token_budget=128 * 32, held_out_every=4, segment_tokens=1280
    )
    store, commits = Location.open(str(tmp_path)), []
    splits: dict[Split, tuple[int, ...]] = {"segments": (10, 10, 4), "held_out": (8,)}
    for split, sizes in splits.items():
        for index, n_contexts in enumerate(sizes):
            contexts = np.zeros((n_contexts, 128), dtype=np.int32)
            column = np.zeros(n_contexts * 127, dtype=np.int32)
            writer = SegmentWriter(
                store, split=split, index=index, attempt=1, hooks={"h": d_in}, dtype=dtype, contexts=contexts,
                tokens=column, positions=column, context_ids=column, n_tokens=contexts.size,
            )  # fmt: skip
            writer.append({"h": as_stored(np.ones((len(column), d_in), dtype=np.float32), dtype)})
            commits.append(writer.commit())
    size = store_size(harvest, {"h": d_in}, 128 * 32, "file")
    written = sum(file.n_bytes for commit in commits for file in commit.files.values())
    assert size.n_bytes == pytest.approx(written, rel=0.02)
    assert (size.n_rows, size.n_held_out_rows) == (24 * 127, 8 * 127)
