"""What nobody needs any more is deleted, and nothing that anybody may still need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from gnomon.errors import Conflict
from gnomon.resources import Job
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.reads import list_dictionaries, read_dictionary, read_store
from gnomon_service.db.tables import dictionaries, jobs
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.dispatch.garbage import DAY_S, Rules
from gnomon_service.jobs.deletions import begin_dictionary_deletion, begin_store_deletion, restore_dictionary
from gnomon_service.jobs.held import HeldJob
from gnomon_service.jobs.steering import Steering
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import publish
from gnomon_workers.runtime.protocol import dictionary_ids
from tests.support.service_jobs import DICTIONARY_RECORD, Bench, store_id, stored, train_spec
from tests.support.waiting import wait_until

VARIANTS = [{"name": "a", "k": 4}, {"name": "b", "k": 8}]
RULES = Rules(settled_s=0.0)
BY = "ann"


class Scene:
    """A queue, and the store that its jobs write to."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.folder = folder
        self.projects = folder / "projects"
        self.bench = Bench(database, projects=f"file://{self.projects}")
        self.collector = self.collector_with(RULES)
        self.bench.seal(store=7)

    def collector_with(self, rules: Rules) -> Collector:
        return Collector(self.bench.database, f"file://{self.projects}", rules)

    def collect(self, rules: Rules = RULES) -> list[tuple[str, str]]:
        """Kind and id of what is deleted; nothing of ended attempts is at work any more."""
        self.bench.release()
        return [(each.garbage.kind, each.garbage.id) for each in self.collector_with(rules).collect()]

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
        self.bench.release()
        return held.lease.job_id

    def trained(self) -> str:
        """A dictionary whose job has ended, and was collected; returns its id."""
        held = self.train()
        self.succeed(held)
        self.collect()
        return str(held.dictionary_id)

    def segments(self, number: int) -> Location:
        """A segment in a store."""
        place = self.layout().store(store_id(number))
        place.child("segments", "part-00000.a0001.zarr", "zarr.json").write_bytes(b"x" * 500)
        return place

    def left(self, folder: str) -> set[str]:
        """Files below a folder of the project."""
        return set(self.layout().root.child(folder).walk()) if (self.projects / "default" / folder).exists() else set()

    def age(self, job_id: str, days: float) -> None:
        """Let a job have ended so many days earlier."""
        values = {"finished_at": jobs.c.finished_at - days * DAY_S, "created_at": jobs.c.created_at - days * DAY_S}
        with self.bench.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))

    def delete_store(self, number: int, project: str = "default") -> None:
        with self.bench.database.write() as connection:
            begin_store_deletion(connection, project, store_id(number), why=f"by {BY}")

    def delete_dictionary(self, dictionary_id: str, grace_s: float = 3600.0) -> None:
        with self.bench.database.write() as connection:
            begin_dictionary_deletion(connection, "default", dictionary_id, why=f"by {BY}", grace_s=grace_s)

    def restore(self, dictionary_id: str) -> None:
        with self.bench.database.write() as connection:
            restore_dictionary(connection, "default", dictionary_id)

    def state_of(self, dictionary_id: str) -> str:
        with self.bench.database.read() as connection:
            return read_dictionary(connection, "default", dictionary_id).state

    def seal(self, number: int) -> Job:
        """A sealed store with a file in it."""
        self.segments(number)
        return self.bench.seal(number)


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene(database, tmp_path)


# ---------------------------------------------------------------------------------------------- leftovers


def test_a_finished_training_keeps_its_dictionary_alone(scene: Scene) -> None:
    held = scene.train()
    assert scene.collect() == []
    job_id = scene.succeed(held)
    (due,) = (each for each in scene.collector.due() if each.id == job_id)
    assert 2000 < scene.collector.count_bytes(due) < 2100, "what is counted is not what goes"
    assert scene.collect() == [("leftovers", job_id)]
    assert scene.left("checkpoints") == set()
    assert scene.left("dictionaries") == {
        f"{held.dictionary_id}/attempt-0002/cfg.json",
        f"{held.dictionary_id}/attempt-0002/gnomon.json",
    }
    assert scene.collect() == []


def test_of_a_training_with_variants_all_go(scene: Scene) -> None:
    held = scene.train(("a", "b"))
    assert held.dictionary_id is not None
    records = [scene.publish(each) for each in dictionary_ids(held.dictionary_id, 2)]
    scene.bench.leases.succeed(held.lease, {"records": records})
    assert scene.collect() == [("leftovers", held.lease.job_id)]
    assert scene.left("checkpoints") == set()
    assert len(scene.left("dictionaries")) == 4


def test_nothing_goes_before_what_is_left_of_attempts_was_killed_and_had_time_to_settle(scene: Scene) -> None:
    held = scene.train()
    assert held.dictionary_id is not None
    scene.bench.leases.succeed(held.lease, {"records": [scene.publish(held.dictionary_id)]})
    assert scene.collector.collect() == []
    scene.bench.release()
    assert scene.collector_with(Rules(settled_s=600.0)).collect() == []
    scene.age(held.lease.job_id, 601 / DAY_S)
    assert scene.collect(Rules(settled_s=600.0)) == [("leftovers", held.lease.job_id)]


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
    assert len(before) == 2 and scene.collect() == []
    assert scene.left("checkpoints") == before


@pytest.mark.parametrize("end", [fail, cancel])
def test_what_nobody_resumed_for_so_long_goes_and_the_job_then_begins_anew(
    scene: Scene, end: Callable[[Scene, HeldJob], None]
) -> None:
    held = scene.train()
    assert held.dictionary_id is not None
    scene.publish(held.dictionary_id)  # and died before it could say so: nobody knows of it
    end(scene, held)
    job_id = held.lease.job_id
    scene.age(job_id, 29.9)
    assert scene.collect() == []
    scene.age(job_id, 0.2)
    assert scene.collect(Rules(resumable_days=0.0)) == []
    assert scene.collect() == [("leftovers", job_id)]
    assert scene.left("checkpoints") == scene.left("dictionaries") == set()
    assert scene.bench.queue.resume("default", job_id).state == "queued"
    again = scene.bench.claim()
    end(scene, again)
    scene.age(job_id, 30.1)
    scene.layout().checkpoints(job_id).child("step-1", "manifest.json").write_json({})
    assert scene.collect() == [("leftovers", job_id)], "what it left the second time stays for ever"


def test_a_job_cannot_be_resumed_while_its_leftovers_are_deleted(scene: Scene) -> None:
    held = scene.train()
    fail(scene, held)
    with scene.bench.database.write() as connection:  # as a deletion that was cut off leaves it
        connection.execute(update(jobs).where(jobs.c.id == held.lease.job_id).values(leftovers="deleting"))
    with pytest.raises(Conflict, match="in a moment") as error:
        scene.bench.queue.resume("default", held.lease.job_id)
    assert error.value.code == "leftovers_deleting"
    assert scene.collect() == [("leftovers", held.lease.job_id)]
    assert scene.bench.queue.resume("default", held.lease.job_id).state == "queued"


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
    assert scene.collect() == [("leftovers", job_id)]
    assert all((scene.projects / project / "checkpoints" / name).exists() for project, name in others)


@pytest.mark.parametrize("gone", ["manifest", "folder"])
def test_where_the_dictionary_is_gone_its_checkpoints_are_the_last_copy_and_stay(scene: Scene, gone: str) -> None:
    held = scene.train()
    job_id = scene.succeed(held)
    folder = scene.projects / "default/dictionaries" / str(held.dictionary_id)
    shutil.rmtree(folder) if gone == "folder" else (folder / "attempt-0002/gnomon.json").unlink()
    assert scene.collect() == [] == scene.collect()
    assert len(scene.left("checkpoints")) == 2
    if gone == "manifest":
        (folder / "attempt-0002/gnomon.json").write_text("{}")
        assert scene.collect() == [("leftovers", job_id)]


# ---------------------------------------------------------------------------------------------- stores


def test_a_store_that_a_user_deletes_is_gone_at_the_next_look_and_can_be_made_anew(scene: Scene) -> None:
    scene.seal(2)
    scene.delete_store(2)
    with pytest.raises(Conflict) as error:
        scene.bench.submit(store=2)
    assert error.value.code == "store_deleting"
    assert scene.collect() == [("store", store_id(2))]
    assert scene.left("activations") == set()
    assert (scene.bench.store_row(2).state, scene.bench.store_row(2).deleted_why) == ("deleted", f"by {BY}")
    scene.bench.seal(2)
    assert (scene.bench.store_row(2).state, scene.bench.store_row(2).deleted_why) == ("sealed", None)


def test_a_store_in_use_cannot_be_deleted(scene: Scene) -> None:
    scene.bench.submit(train_spec(activations=stored(7)), store=7)
    with pytest.raises(Conflict) as error:
        scene.delete_store(7)
    assert error.value.code == "store_in_use"


def test_of_a_harvest_that_came_to_nothing_all_goes_when_nobody_resumes_it(scene: Scene) -> None:
    job = scene.bench.submit(store=2)
    scene.segments(2)
    scene.bench.leases.fail(scene.bench.claim().lease, code="x", message="x")
    assert scene.collect() == []
    scene.age(job.id, 30.1)
    assert scene.collect() == [("store", store_id(2))]
    assert scene.left("activations") == set()
    assert scene.bench.queue.resume("default", job.id).state == "queued"
    assert scene.bench.store_row(2).state == "harvesting"


def test_stores_that_were_not_used_for_so_long_go_and_others_stay(scene: Scene) -> None:
    old, read, needed = scene.seal(2), scene.seal(3), scene.seal(4)
    for job in (old, read, needed):
        scene.age(job.id, 20.0)
    rules = Rules(store_days=10.0, settled_s=1e9)
    trained = scene.bench.submit(train_spec(activations=stored(3)), store=3)
    scene.bench.leases.succeed(scene.bench.claim().lease, {"records": [DICTIONARY_RECORD]})
    scene.age(trained.id, 9.0)
    failed = scene.bench.submit(train_spec(activations=stored(4)), store=4)
    fail(scene, scene.bench.claim())
    scene.age(failed.id, 15.0)  # it can be resumed, and then needs its store
    assert scene.collect(rules) == [("store", store_id(2))]
    assert "10 days" in scene.bench.store_row(2).deleted_why
    scene.age(trained.id, 2.0)
    scene.age(failed.id, 16.0)
    assert sorted(scene.collect(rules)) == [("store", store_id(3)), ("store", store_id(4))]


def test_above_its_quota_a_project_loses_what_it_used_longest_ago(scene: Scene) -> None:
    sealed = {number: scene.seal(number) for number in (2, 3, 4)}
    for number, job in sealed.items():
        scene.age(job.id, 10.0 - number)
    n_bytes = scene.bench.store_row(2).n_bytes
    assert n_bytes
    steering = Steering(scene.bench.database)
    scene.bench.submit(train_spec(activations=stored(2)), store=2)  # the oldest is in use
    steering.set_project("default", weight=None, n_jobs_most=None, n_devices_most=None, n_store_bytes_most=4 * n_bytes)
    assert scene.collect() == []
    steering.set_project("default", weight=None, n_jobs_most=None, n_devices_most=None, n_store_bytes_most=3 * n_bytes)
    assert scene.collect() == [("store", store_id(3))]
    assert "used longest ago" in scene.bench.store_row(3).deleted_why
    assert scene.collect() == []


def test_a_training_whose_store_is_gone_is_not_resumed_into_a_failure(scene: Scene) -> None:
    scene.seal(2)
    job = scene.bench.submit(train_spec(activations=stored(2)), store=2)
    fail(scene, scene.bench.claim())
    scene.delete_store(2)
    scene.collect()
    with pytest.raises(Conflict, match=f"by {BY}") as error:
        scene.bench.queue.resume("default", job.id)
    assert error.value.code == "store_deleted"
    scene.bench.seal(2)
    assert scene.bench.queue.resume("default", job.id).state == "queued"


# ---------------------------------------------------------------------------------------------- dictionaries


def test_a_deleted_dictionary_can_be_restored_until_its_files_go(scene: Scene) -> None:
    dictionary_id = scene.trained()
    scene.delete_dictionary(dictionary_id)
    assert scene.state_of(dictionary_id) == "deleting" and scene.collect() == []
    scene.restore(dictionary_id)
    assert scene.state_of(dictionary_id) == "published"
    scene.delete_dictionary(dictionary_id)
    with scene.bench.database.write() as connection:
        connection.execute(update(dictionaries).values(purge_at=database_now() - 1.0))
    with pytest.raises(Conflict) as error:
        scene.restore(dictionary_id)
    assert error.value.code == "dictionary_deleted"
    assert scene.collect() == [("dictionary", dictionary_id)]
    assert scene.left("dictionaries") == set()
    assert scene.state_of(dictionary_id) == "deleted"
    with scene.bench.database.read() as connection:
        assert list_dictionaries(connection, "default", cursor=None, limit=9).items == []
    with pytest.raises(Conflict):
        scene.restore(dictionary_id)


# ---------------------------------------------------------------------------------------------- the collector


def test_a_deletion_that_was_cut_off_is_gone_on_with(scene: Scene) -> None:
    job_id = scene.succeed(scene.train())
    scene.seal(2)
    scene.delete_store(2)
    scene.layout().checkpoints(job_id).child("step-00000100.a0001", "manifest.json").delete()
    with scene.collector_with(RULES).running(every_s=600.0):
        wait_until(lambda: scene.left("checkpoints") == scene.left("activations") == set(), "the collection at once")


def test_the_thread_collects_what_is_deleted_later(scene: Scene) -> None:
    with scene.collector.running(every_s=0.02):
        scene.seal(2)
        scene.delete_store(2)
        wait_until(lambda: scene.left("activations") == set(), "the collection")


def test_only_the_dispatcher_that_leads_collects(scene: Scene) -> None:
    observations = Observations(scene.bench.database)
    observations.note(None)
    scene.succeed(scene.train())
    asked: list[str] = []

    def collector_of(owner: str) -> Collector:
        def leads() -> bool:
            asked.append(owner)
            return observations.leads(owner)

        return Collector(scene.bench.database, f"file://{scene.projects}", RULES, may_collect=leads)

    assert observations.lead("b", 600.0)
    with collector_of("a").running(every_s=0.01):
        wait_until(lambda: asked.count("a") > 3, "several looks")
    assert scene.left("checkpoints")
    with collector_of("b").running(every_s=0.01):
        wait_until(lambda: scene.left("checkpoints") == set(), "the collection")


def test_one_that_cannot_be_deleted_does_not_keep_the_others(scene: Scene) -> None:
    broken, other = scene.seal(2), scene.train()
    scene.layout().store(store_id(2)).child("manifest.json").write_bytes(b"no manifest")
    job_id = scene.succeed(other)
    assert scene.collect() == [("leftovers", job_id)]
    assert scene.bench.job(broken.id).state == "succeeded"
    with scene.bench.database.read() as connection:
        assert read_store(connection, "default", store_id(2)).state == "sealed"
