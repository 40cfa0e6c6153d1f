"""What does a narrower store cost? The rows of one store written as float32, bfloat16 and int8, and trained on.

    python benchmarks/stored_types.py STORE --steps 400 --batch-size 1024 --d-sae 2560 --k 32 --seeds 3

STORE is the folder of a sealed activation store. A line for each type: bytes of a row, the share of the hook's variance
that rounding took, batches read a second (warm, one core), and for each seed the FVU, on the given store's held-out
rows, of a dictionary that was trained on the narrower ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.ablation import held_out, make_spec, train_arm

from gnomon.specs import StoredDtype
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit, SegmentInfo
from gnomon_storage.shuffle import BatchReader
from gnomon_storage.writing import SegmentWriter, seal
from gnomon_workers.harvest.worker import as_stored

_ROWS: Final = 4096
"""Written at once."""


def main() -> None:
    """Write, read and train, a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder of an activation store")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2560)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = ActivationStore.open(Location.open(options.store.resolve().as_uri()))
    hook = next(iter(given.manifest.hooks))
    print(
        f"{hook}: {given.manifest.n_rows} rows of {given.manifest.hooks[hook].d_in}, stored as {given.manifest.dtype}"
    )
    for dtype in get_args(StoredDtype):
        with tempfile.TemporaryDirectory(prefix="gnomon-types-") as folder:
            store = rewrite(given, hook, dtype, Location.open(folder))
            print(f"{dtype:<9}{size_and_speed(store, hook, options)}", end="", flush=True)
            for seed in range(options.seeds):
                spec = make_spec({"seed": seed, "activation": {"kind": "topk", "k": options.k}}, options)
                step, _ = train_arm(spec, store)
                print(f"  {held_out(step, given)['fvu']:.4f}", end="", flush=True)
            print()


def rewrite(given: ActivationStore, hook: str, dtype: StoredDtype, place: Location) -> ActivationStore:
    """A store of one hook's rows in another type."""
    commits = [_rewrite_segment(given, segment, hook, dtype, place) for segment in given.manifest.segments]
    known = given.manifest.model_dump(
        include={"store_id", "spec", "context_length", "packing", "drop", "model", "tokenizer", "text", "versions"}
    )
    return seal(place, commits, dtype=dtype, **known)


def _rewrite_segment(
    given: ActivationStore, segment: SegmentInfo, hook: str, dtype: StoredDtype, place: Location
) -> SegmentCommit:
    writer = SegmentWriter(
        place,
        split=segment.split,
        index=segment.index,
        attempt=1,
        hooks={hook: given.manifest.hooks[hook].d_in},
        dtype=dtype,
        contexts=given.contexts(segment),
        tokens=given.column(segment, "tokens"),
        positions=given.column(segment, "positions"),
        context_ids=given.column(segment, "context_ids"),
        n_tokens=given.commit(segment).n_tokens,
    )
    for start in range(0, segment.n_rows, _ROWS):
        rows = given.read_rows(hook, segment, start, min(segment.n_rows, start + _ROWS))
        stored = as_stored(hook, torch.from_numpy(rows), dtype)
        writer.append({hook: stored.raw}, {hook: stored.squared_error})
    return writer.commit()


def size_and_speed(store: ActivationStore, hook: str, options: argparse.Namespace) -> str:
    """Bytes of a row, what rounding took, and batches read in a second of a core."""
    manifest = store.manifest
    lost = manifest.hooks[hook].rounding_error
    rows = manifest.n_rows + manifest.n_held_out_rows
    with BatchReader(store, hook, seed=0, batch_size=options.batch_size) as reader:
        n_batches = min(options.steps, reader.n_rows // options.batch_size)
        reader.batch(n_batches, 0, 1)  # every file is compared with its digest once
        began = time.process_time()
        for number in range(n_batches):
            reader.batch(number, 0, options.batch_size)
        per_s = n_batches / (time.process_time() - began)
    return f"{manifest.n_bytes / rows:7.0f} bytes a row, lost {lost:.2e}, {per_s:5.0f} batches/s, FVU"


if __name__ == "__main__":
    main()
