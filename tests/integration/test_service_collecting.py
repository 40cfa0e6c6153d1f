"""Checkpoints of finished trainings are deleted, and nothing that anybody may still need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gnomon_service.db.engine import Database
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.jobs.held import HeldJob
from gnomon_storage.layout import ProjectLayout
from gnomon_workers.dictionaries.folder import publish
from gnomon_workers.runtime.protocol import dictionary_ids
from tests.support.service_jobs import DICTIONARY_RECORD, Bench, stored, train_spec
from tests.support.waiting import wait_until

VARIANTS = [{"name": "a", "k": 4}, {"name": "b", "k": 8}]


class Scene:
    """A queue, and the store that its trainings write to."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.bench = Bench(database)
        self.folder = folder
        self.projects = folder / "projects"
        self.collector = Collector(database, f"file://{self.projects}")
        self.bench.seal(store=7)

    def layout(self, project: str = "default") -> ProjectLayout:
        return ProjectLayout.of(f"file://{self.projects}", project)

    def train(self, variants: tuple[str, ...] = ("",)) -> HeldJob:
        """A training that runs, and has saved something of each variant."""
        fields = {"variants": VARIANTS} if variants != ("",) else {}
        self.bench.submit(train_spec(activations=stored(7), **fields), store=7)
        held = self.bench.claim()
        for variant in variants:
            place = self.layout().checkpoints(held.lease.job_id, variant).child("step-00000100.a0001")
            place.child("shard-0000-of-0001.safetensors").write_bytes(b"x" * 1000)
            place.child("manifest.json").write_json({})
        return held

    def publish(self, dictionary_id: str, attempt: str = "attempt-0002") -> dict[str, object]:
        """Publish a dictionary, of which an earlier attempt had uploaded the weights; returns its record."""
        dictionary = self.layout().dictionary(dictionary_id)
        dictionary.child("attempt-0001", "sae_weights.safetensors").write_bytes(b"x" * 1000)
        local = self.folder / f"local-{dictionary_id}"
        local.mkdir()
        (local / "cfg.json").write_text("{}")
        return publish(dictionary.child(attempt), local, DICTIONARY_RECORD)

    def succeed(self, held: HeldJob) -> str:
        """End a training as its dispatcher does."""
        assert held.dictionary_id is not None
        self.bench.leases.succeed(held.lease, {"records": [self.publish(held.dictionary_id)]})
        return held.lease.job_id

    def left(self, folder: str) -> set[str]:
        """Files below a folder of the project."""
        return set(self.layout().root.child(folder).walk()) if (self.projects / "default" / folder).exists() else set()


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene(database, tmp_path)


def test_a_finished_training_keeps_its_dictionary_alone(scene: Scene) -> None:
    held = scene.train()
    assert scene.collector.collect() == []
    job_id = scene.succeed(held)
    assert scene.collector.collect() == [job_id]
    assert scene.left("checkpoints") == set()
    assert scene.left("dictionaries") == {
        f"{held.dictionary_id}/attempt-0002/cfg.json",
        f"{held.dictionary_id}/attempt-0002/gnomon.json",
    }
    assert scene.collector.collect() == []


def test_of_a_training_with_variants_all_go(scene: Scene) -> None:
    held = scene.train(("a", "b"))
    assert held.dictionary_id is not None
    records = [scene.publish(each) for each in dictionary_ids(held.dictionary_id, 2)]
    scene.bench.leases.succeed(held.lease, {"records": records})
    assert scene.collector.collect() == [held.lease.job_id]
    assert scene.left("checkpoints") == set()
    assert len(scene.left("dictionaries")) == 4


def fail(scene: Scene, held: HeldJob) -> None:
    scene.bench.leases.fail(held.lease, code="x", message="x")


def cancel(scene: Scene, held: HeldJob) -> None:
    scene.bench.queue.cancel("default", held.lease.job_id)
    scene.bench.leases.cancelled(held.lease)


def lose(scene: Scene, held: HeldJob) -> None:
    scene.bench.leases.lose(held.lease, "x")


def publish_only(scene: Scene, held: HeldJob) -> None:
    """The attempt is lost between its dictionary's manifest and the word that the job is done."""
    assert held.dictionary_id is not None
    scene.publish(held.dictionary_id)
    scene.bench.leases.lose(held.lease, "x")


@pytest.mark.parametrize("end", [lambda *_: None, fail, cancel, lose, publish_only])
def test_a_training_that_may_go_on_keeps_its_checkpoints(scene: Scene, end: Callable[[Scene, HeldJob], None]) -> None:
    held = scene.train()
    end(scene, held)
    before = scene.left("checkpoints")
    assert len(before) == 2 and scene.collector.collect() == []
    assert scene.left("checkpoints") == before


def test_checkpoints_of_other_services_and_projects_and_what_is_no_job_stay(scene: Scene) -> None:
    job_id = scene.succeed(scene.train())
    others = [
        ("default", "job_" + "9" * 26),
        ("other", job_id),
        ("default", "notes"),
        ("default", "job_ odd"),
        ("no project", job_id),
    ]
    for project, name in others:
        (scene.projects / project / "checkpoints" / name / "step-00000100.a0001").mkdir(parents=True)
        (scene.projects / project / "checkpoints" / name / "step-00000100.a0001/manifest.json").write_text("{}")
    assert scene.collector.collect() == [job_id]
    assert all((scene.projects / project / "checkpoints" / name).exists() for project, name in others)


@pytest.mark.parametrize("gone", ["manifest", "folder"])
def test_where_the_dictionary_is_gone_its_checkpoints_are_the_last_copy_and_stay(scene: Scene, gone: str) -> None:
    held = scene.train()
    job_id = scene.succeed(held)
    folder = scene.projects / "default/dictionaries" / str(held.dictionary_id)
    shutil.rmtree(folder) if gone == "folder" else (folder / "attempt-0002/gnomon.json").unlink()
    assert scene.collector.collect() == [] == scene.collector.collect()
    assert len(scene.left("checkpoints")) == 2
    if gone == "manifest":
        (folder / "attempt-0002/gnomon.json").write_text("{}")
        assert scene.collector.collect() == [job_id]


def test_a_deletion_that_was_cut_off_is_gone_on_with(scene: Scene) -> None:
    job_id = scene.succeed(scene.train())
    scene.layout().checkpoints(job_id).child("step-00000100.a0001", "manifest.json").delete()
    other = Collector(scene.bench.database, f"file://{scene.projects}")
    with other.running(every_s=600.0):
        wait_until(lambda: scene.left("checkpoints") == set(), "the collection at the start")


def test_the_thread_collects_what_ends_later(scene: Scene) -> None:
    with scene.collector.running(every_s=0.02):
        scene.succeed(scene.train())
        wait_until(lambda: scene.left("checkpoints") == set(), "the collection")
