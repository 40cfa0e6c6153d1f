"""A working cluster whose attempts leave in the store what real ones leave there."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from gnomon.specs import TrainSpec
from gnomon_storage.layout import ProjectLayout, attempt_name
from gnomon_workers.dictionaries.folder import publish
from gnomon_workers.runtime.protocol import Assignment, dictionary_ids
from tests.support.service_cluster import Attempt
from tests.support.service_jobs import DICTIONARY_RECORD, PROJECT
from tests.support.stores import make_store
from tests.support.working_cluster import Habits, WorkingCluster


class WritingCluster(WorkingCluster):
    """Each attempt saves something at its start, and what it makes at its end."""

    def __init__(self, habits: Habits, home: Path) -> None:
        super().__init__(habits)
        self.layout = ProjectLayout.of(f"file://{home}/projects", PROJECT)
        self.n_saved = 0
        self._local = home / "local"
        self._local.mkdir()
        (self._local / "cfg.json").write_text("{}")

    def start(self, assignment: Assignment) -> None:
        if (assignment.job_id, assignment.attempt) not in self.attempts:
            self._save(assignment)
        super().start(assignment)

    def _save(self, assignment: Assignment) -> None:
        self.n_saved += 1
        suffix = f"a{assignment.attempt:04d}"
        if assignment.kind == "train":
            saved = self.layout.checkpoints(assignment.job_id).child(f"step-00000001.{suffix}", "manifest.json")
        else:
            saved = self.layout.store(assignment.store_id).child("segments", f"part-00099.{suffix}.zarr", "zarr.json")
        saved.write_bytes(b"x" * 10)

    def _finish(self, attempt: Attempt, fate: float) -> None:
        super()._finish(attempt, fate)
        assert attempt.outcome is not None
        if attempt.outcome.status != "succeeded":
            return
        assignment = attempt.assignment
        if assignment.kind == "harvest":
            place = self.layout.store(assignment.store_id).local_path()
            assert place is not None
            shutil.copytree(sealed_store(), place, dirs_exist_ok=True)
        else:
            attempt.end("succeeded", {"records": [self._publish(assignment, each) for each in _trained_by(assignment)]})

    def _publish(self, assignment: Assignment, dictionary_id: str) -> dict[str, object]:
        folder = self.layout.dictionary(dictionary_id)
        folder.child(attempt_name(0), "sae_weights.safetensors").write_bytes(b"x")  # of an attempt that was lost
        return publish(folder.child(attempt_name(assignment.attempt)), self._local, DICTIONARY_RECORD)


def _trained_by(assignment: Assignment) -> tuple[str, ...]:
    assert assignment.dictionary_id is not None
    return dictionary_ids(assignment.dictionary_id, len(TrainSpec.read(assignment.spec).variant_names))


@cache
def sealed_store() -> Path:
    """A small sealed store, to be copied."""
    folder = Path(mkdtemp(prefix="gnomon-sealed-"))
    make_store(folder, n_segments=1, n_contexts=1)
    return folder / "activations" / ("act_" + "1" * 32)
