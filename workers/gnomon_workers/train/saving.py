"""Writing checkpoints while training goes on.

At a step's end every rank copies its state to a file of its machine; that is all that training waits for. One thread
then takes the file's digest, uploads it (replica 0 of each shard) and leaves a receipt. Rank 0's thread waits for the
receipts of all ranks, compares the replicas, writes the manifest, and only then deletes older checkpoints. The threads
speak through the store alone: collectives belong to the training thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Final, Self

import torch

from gnomon.errors import Conflict, CorruptArtifact, GnomonError, StoreUnavailable
from gnomon_storage.backends import mapped_errors
from gnomon_storage.digests import fast_digest
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import FORMAT, NAME, Checkpoint, Shard, committed_checkpoints
from gnomon_workers.checkpoints.tensor_file import write_tensors
from gnomon_workers.runtime.failpoints import Failpoint, failing_during, failpoint
from gnomon_workers.runtime.scratch import scratch_folder
from gnomon_workers.sae.costs import N_KEPT
from gnomon_workers.train.metrics import max_alignment_deviation
from gnomon_workers.train.state import file_tensors
from gnomon_workers.train.step import TrainStep

RECEIPTS_S: Final = 600.0
"""Longest wait of rank 0 for the others' receipts once its own shard is uploaded."""
SETTLE_S: Final = 5.0
"""How often ranks that wait for a checkpoint tell each other so: well below the timeout of a collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed checkpoint, and what it cost."""

    checkpoint: Checkpoint
    copy_s: float
    """Seconds for which training stood still."""
    duration_s: float
    """Seconds from the step's end to the commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """A state that was copied out."""

    file: Path
    checkpoint: Checkpoint
    """What will be committed, still without its shards: other ranks' are not known yet."""
    n_bytes: int
    began: float
    copy_s: float


class CheckpointWriter:
    """The checkpoints of one rank's run, at most one of them under way; a context manager."""

    def __init__(
        self,
        folder: Location,
        step: TrainStep,
        *,
        attempt: int,
        on_commit: Callable[[Saved], None] = lambda _: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """on_commit is called on rank 0 alone, from another thread; beat while the training thread waits."""
        self._folder = folder
        self._step = step
        self._mesh = step.mesh
        self._attempt = attempt
        self._on_commit = on_commit
        self._beat = beat
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._stopped = Event()
        self._scratch = ExitStack()

    def __enter__(self) -> Self:
        with mapped_errors("the folder for temporary files"):
            self._local = self._scratch.enter_context(scratch_folder())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Give up what is under way: after an error, others may wait for this rank."""
        self._stopped.set()
        self._thread.shutdown(wait=kind is None)
        self._scratch.close()

    def begin(self, number: int) -> None:
        """Copy the state after `number` steps out and leave the rest to a thread; collective.

        Waits while the checkpoint before is under way. Raises what became of that one: StoreUnavailable, or
        CorruptArtifact where replicas differ.
        """
        began = time.monotonic()
        self.settle()
        self.copy(number, began)

    def copy(self, number: int, began: float) -> None:
        """The same once the one before is done; `began`, of time.monotonic(), is when training came to a stand."""
        failpoint(Failpoint.COPY_BEFORE)
        deviation = max_alignment_deviation(self._step)
        checkpoint = Checkpoint(
            step=number,
            attempt=self._attempt,
            state=dict(self._step.state),  # a copy: by the time of the commit, training is steps ahead
            max_alignment_deviation=deviation,
            shards=(),
            dp=self._mesh.dp,
        )
        path = self._local / f"step-{number:08d}"
        with mapped_errors(str(path)), path.open("wb") as stream:
            n_bytes = write_tensors(stream, file_tensors(self._step))
        copy_s = time.monotonic() - began
        failpoint(Failpoint.COPY_AFTER)
        copy = _Copy(file=path, checkpoint=checkpoint, n_bytes=n_bytes, began=began, copy_s=copy_s)
        self._under_way = self._thread.submit(self._save, copy)

    def check(self) -> None:
        """Raise what became of the checkpoint under way, if it failed; costs nothing."""
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()

    def finish(self) -> None:
        """Wait for the last checkpoint: on rank 0 until it is committed. Raises as `begin`."""
        while self._is_busy(SETTLE_S):
            self._beat()
        self.check()

    def settle(self) -> None:
        """Wait until no rank has a checkpoint under way; collective, and raises as `begin`.

        Ranks tell each other that they wait, and again and again: one that waited alone for a slow store would let
        the others run into the timeout of the next collective.
        """
        while True:
            busy = self._is_busy(SETTLE_S)
            self.check()
            self._beat()
            if not int(self._mesh.all_reduce(torch.tensor([int(busy)]), "world")):
                return

    def _is_busy(self, timeout_s: float) -> bool:
        return self._under_way is not None and bool(wait([self._under_way], timeout_s).not_done)

    def _save(self, copy: _Copy) -> None:
        place = self._folder.child(copy.checkpoint.name)
        mesh = self._mesh
        try:
            # before the upload: what is uploaded must be what was read here, whatever the store makes of it
            receipt = self._receipt(copy)
            if mesh.replica == 0:
                with failing_during(Failpoint.UPLOAD_DURING):
                    place.child(receipt["shard"]["file"]).upload(copy.file)
        finally:
            copy.file.unlink(missing_ok=True)
        failpoint(Failpoint.UPLOAD_AFTER)
        # after the upload: rank 0 takes a receipt for the word that the shard is there
        name = _receipt_name(mesh.shard, mesh.features, mesh.replica)
        if not place.child(name).create_json(receipt):
            raise Conflict(f"{place.child(name).url} is there already: two gangs work at one attempt; one must end")
        if mesh.rank == 0:
            self._commit(place, copy)

    def _receipt(self, copy: _Copy) -> dict[str, Any]:
        """What this rank has of its shard, with the digest of the very bytes."""
        mesh = self._mesh
        start, stop = mesh.feature_range(self._step.plan.d_sae)
        with mapped_errors(str(copy.file)), copy.file.open("rb") as stream:
            digest = fast_digest(stream)
        shard = Shard(
            file=f"shard-{mesh.shard:04d}-of-{mesh.features:04d}.safetensors",
            start=start,
            stop=stop,
            n_bytes=copy.n_bytes,
            digest=digest,
        )
        return {"format": FORMAT, "shard": asdict(shard), "state": copy.checkpoint.state}

    def _commit(self, place: Location, copy: _Copy) -> None:
        mesh = self._mesh
        names = {
            (shard, replica): _receipt_name(shard, mesh.features, replica)
            for shard in range(mesh.features)
            for replica in range(mesh.dp)
        }
        self._wait_for(place, names.values())
        shards = []
        for shard in range(mesh.features):
            receipts = [place.child(names[shard, replica]).read_json() for replica in range(mesh.dp)]
            _compare(shard, receipts, copy.checkpoint.state)
            shards.append(Shard(**receipts[0]["shard"]))
        checkpoint = replace(copy.checkpoint, shards=tuple(shards))
        failpoint(Failpoint.MANIFEST_BEFORE)
        place.child("manifest.json").write_json({"format": FORMAT, **asdict(checkpoint)})
        failpoint(Failpoint.MANIFEST_AFTER)
        duration_s = time.monotonic() - copy.began
        self._on_commit(Saved(checkpoint=checkpoint, copy_s=copy.copy_s, duration_s=duration_s))
        delete_older(self._folder, checkpoint, keep=N_KEPT)

    def _wait_for(self, place: Location, names: Iterable[str]) -> None:
        """Wait until files are there; their writers share nothing with this thread but the store."""
        deadline = time.monotonic() + RECEIPTS_S
        pause_s = 0.01
        while missing := set(names) - set(place.list()):
            if self._stopped.wait(pause_s):
                raise StoreUnavailable(f"{place.url} was given up: this rank failed before it was complete")
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"{place.url}: no {sorted(missing)} after {RECEIPTS_S:.0f} s; is the store slow?"
                )
            pause_s = min(2 * pause_s, 1.0)


def begin_all(writers: Sequence[CheckpointWriter], number: int) -> None:
    """Begin the checkpoints of dictionaries that are trained together; collective, and raises as `begin`.

    None is begun before all of the step before are committed: else one writer, ahead of another, could delete the last
    step of which there are checkpoints of all.
    """
    began = time.monotonic()
    for writer in writers:
        writer.settle()
    for writer in writers:
        writer.copy(number, began)
        began = time.monotonic()


def save_checkpoint(folder: Location, step: TrainStep, *, number: int, attempt: int) -> Checkpoint:
    """Write the state after `number` steps, and wait until it is committed; collective, and fails on all ranks."""
    failure: GnomonError | None = None
    with CheckpointWriter(folder, step, attempt=attempt) as writer:
        writer.begin(number)
        try:
            writer.finish()
        except GnomonError as error:
            failure = error
    n_failed = int(step.mesh.all_reduce(torch.tensor([int(failure is not None)]), "world"))
    if failure is not None:
        raise failure
    if n_failed:
        raise StoreUnavailable(f"{n_failed} other ranks could not save step {number}; they say why")
    return next(committed_checkpoints(folder))


def delete_older(folder: Location, last: Checkpoint, *, keep: int) -> None:
    """Delete what this and earlier attempts left, but for the last `keep` steps up to `last`, just committed.

    An earlier attempt may have left later steps: they were passed over, as damaged or as not saved by all that train
    together, and would otherwise take the place of those that are made now.
    """
    kept: dict[int, str] = {}
    for checkpoint in committed_checkpoints(folder):
        if checkpoint.step <= last.step and checkpoint.attempt <= last.attempt and len(kept) < keep:
            kept.setdefault(checkpoint.step, checkpoint.name)
    for match in filter(None, map(NAME.match, folder.list())):
        if int(match[2]) <= last.attempt and match[0] not in kept.values():
            # first what makes it a checkpoint: half of one must never look whole
            folder.child(match[0], "manifest.json").delete()
            failpoint(Failpoint.DELETE_DURING)
            folder.child(match[0]).delete()


def _compare(shard: int, receipts: list[dict[str, Any]], state: dict[str, float]) -> None:
    differ = [i for i, receipt in enumerate(receipts) if receipt["shard"] != receipts[0]["shard"]]
    differ = differ or [i for i, receipt in enumerate(receipts) if receipt["state"] != state]
    if differ:
        raise CorruptArtifact(
            f"replicas {differ} of shard {shard} differ from replica 0: a device computes wrongly, or memory is "
            "damaged; the last checkpoint is intact"
        )


def _receipt_name(shard: int, n_shards: int, replica: int) -> str:
    return f"receipt-{shard:04d}-of-{n_shards:04d}.r{replica:04d}.json"
