"""The dispatcher as a scheduler, turn by turn, on real databases and a cluster in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, update

from gnomon.errors import Conflict, NotFound
from gnomon.resources import Job
from gnomon.specs import Mesh
from gnomon.specs.request import JobChange
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import read_cluster, read_project
from gnomon_service.db.tables import jobs
from gnomon_service.dispatch import deciding
from gnomon_service.jobs.steering import Steering
from gnomon_service.jobs.waiting import Waiting, read_waiting
from gnomon_workers.runtime.protocol import NodeSnapshot
from gnomon_workers.sae.costs import TrainJob
from tests.integration.test_service_dispatcher import Scene
from tests.support.service_cluster import Attempt
from tests.support.service_jobs import PROJECT, harvest_spec, train_spec

BY = "ann (key)"


class Steered(Scene):
    """A scene that people steer."""

    def __init__(self, database: Database, home: Path) -> None:
        super().__init__(database, home)
        self.steering = Steering(database)
        self.bench.seal()

    def train(self, dp: int = 1, features: int = 1, **fields: Any) -> Job:
        """Queue a training on the sealed store."""
        return self.bench.submit(train_spec(mesh=Mesh(dp=dp, features=features), batch_size=1024), **fields)

    def attempt(self, job: Job) -> Attempt:
        """The attempt of a job that is on the cluster."""
        (found,) = (attempt for (job_id, _), attempt in self.cluster.attempts.items() if job_id == job.id)
        return found

    def runs(self, job: Job) -> bool:
        """Whether an attempt of it is on the cluster."""
        return any(job_id == job.id for job_id, _ in self.cluster.attempts)

    def reason(self, job: Job) -> tuple[str, str]:
        """Why it waits."""
        place = self.bench.job(job.id).queue
        assert place is not None
        return place.code, place.message


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Steered:
    return Steered(database, tmp_path)


def test_a_gang_is_given_its_places_and_its_mesh(scene: Steered) -> None:
    scene.cluster.nodes = tuple(NodeSnapshot(id=name, name=name, n_cpus=2, n_gpus=0) for name in "ab")
    job = scene.train(dp=2, features=2)
    scene.turn()
    assignment = scene.attempt(job).assignment
    assert (assignment.places, assignment.mesh) == (("a", "a", "b", "b"), (2, 2))
    shown = scene.bench.job(job.id)
    assert (shown.n_devices, shown.mesh, shown.queue) == (4, (2, 2), None)


def test_a_mesh_of_auto_is_fixed_by_the_first_attempt(scene: Steered) -> None:
    job = scene.bench.submit(train_spec(batch_size=1024))
    scene.turn()
    first = scene.attempt(job).assignment
    assert first.mesh is not None
    scene.cluster.attempts.clear()
    scene.cluster.nodes = (NodeSnapshot(id="n", name="node", n_cpus=64, n_gpus=0),)
    scene.time_s += 10.0
    scene.turn(3)
    again = scene.attempt(job).assignment
    assert (again.attempt, again.mesh) == (2, first.mesh)


def test_a_mesh_of_auto_has_the_memory_that_the_training_needs(scene: Steered) -> None:
    """Eight GPUs of 64 MiB cannot hold its weights, and it waits; of those of 4 GiB two can train it, and not one."""
    fields: dict[str, Any] = {"batch_size": 1024, "d_sae": 2**21}

    def gpus(gpu_memory_bytes: int) -> tuple[NodeSnapshot, ...]:
        return (NodeSnapshot(id="g", name="gpus", n_cpus=8, n_gpus=8, gpu_memory_bytes=gpu_memory_bytes),)

    scene.cluster.nodes = gpus(64 << 20)
    job = scene.bench.submit(train_spec(**fields))
    scene.turn()
    assert scene.reason(job)[0] == "too_large"
    assert "16 GPUs" in scene.reason(job)[1]
    scene.cluster.nodes = gpus(4 << 30)
    scene.time_s += 10.0
    scene.turn(3)
    mesh = scene.attempt(job).assignment.mesh
    assert mesh is not None
    spec, of_job = train_spec(**fields), Mesh(dp=mesh[0], features=mesh[1])
    training = TrainJob.of(spec, 16, device="gpu")
    assert training.memory(of_job).n_bytes <= 4 << 30 < training.memory(Mesh()).n_bytes


def test_a_mesh_of_auto_stays_when_there_is_less_room_at_its_return(scene: Steered) -> None:
    job = scene.bench.submit(train_spec(batch_size=4096, d_sae=1 << 20))
    scene.turn()
    first = scene.attempt(job).assignment
    assert len(first.places) > 1, "it would also run on less"
    scene.steering.pause(PROJECT, job.id, by=BY)
    scene.turn()
    scene.attempt(job).end("left")
    scene.turn(2)
    other = scene.train()
    scene.turn()
    scene.bench.queue.resume(PROJECT, job.id)
    scene.turn(2)
    assert scene.runs(other)
    assert scene.reason(job)[0] == "no_room"
    scene.attempt(other).end("failed", code="x", message="y")
    scene.turn(3)
    assert scene.attempt(job).assignment.mesh == first.mesh


def test_a_job_that_is_to_leave_before_it_began_does_not_begin(scene: Steered) -> None:
    job = scene.train()
    held = scene.bench.claim_next("a")
    assert held is not None
    scene.steering.pause(PROJECT, job.id, by=BY)
    scene.bench.let_lease_pass(job.id)
    scene.turn(2)
    assert scene.cluster.n_started == 0
    assert (scene.bench.job(job.id).state, scene.bench.job(job.id).paused_by) == ("queued", BY)


def test_small_jobs_run_around_a_large_one_that_waits(scene: Steered) -> None:
    running = scene.train(features=3)
    scene.turn()
    large, small = scene.train(features=4), scene.train(features=1)
    scene.turn()
    assert scene.reason(large)[0] == "no_room"
    assert scene.reason(small) == (
        "behind",
        f"needs 1 core, 1 free of 4, which are kept for job {large.id} ahead of it",
    )
    scene.attempt(running).end("failed", code="x", message="y")
    scene.turn(3)
    assert scene.runs(large)
    assert not scene.runs(small)


def test_an_urgent_job_takes_the_place_of_another_which_loses_nothing(scene: Steered) -> None:
    normal = scene.train(features=4)
    scene.turn()
    urgent = scene.train(features=2, job_class="urgent")
    scene.turn(2)
    assert scene.attempt(normal).leave_asked
    assert scene.reason(urgent) == ("room_is_made", f"starts as soon as {normal.id} made room")
    assert scene.bench.job(normal.id).leave_why == f"job {urgent.id!r} needs its place"
    scene.attempt(normal).end("left")
    scene.turn(3)
    assert scene.runs(urgent)
    waits = scene.bench.job(normal.id)
    assert (waits.state, waits.n_losses, waits.leave_why, waits.mesh) == ("queued", 0, None, (1, 4))
    scene.attempt(urgent).end("failed", code="x", message="y")
    scene.turn(3)
    assert scene.attempt(normal).assignment.attempt == 2
    assert [event.data.get("code") for event in scene.bench.events(normal.id) if event.kind == "state"][3] == "put_back"


def test_one_that_does_not_leave_in_time_is_ended_and_loses_no_attempt(scene: Steered) -> None:
    job = scene.train()
    scene.turn()
    scene.steering.pause(PROJECT, job.id, by=BY)
    scene.turn()
    assert scene.attempt(job).leave_asked
    scene.time_s += scene.settings.leave_grace_s + 1
    scene.turn()
    paused = scene.bench.job(job.id)
    assert (paused.state, paused.n_losses) == ("queued", 0)
    assert (job.id, 1) in scene.cluster.killed
    assert "did not save in 120 s" in scene.bench.events(job.id)[-1].data["message"]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_paused_job_waits_until_it_is_resumed(scene: Steered, is_running: bool) -> None:
    job = scene.train()
    if is_running:
        scene.turn()
    scene.steering.pause(PROJECT, job.id, by=BY)
    scene.steering.pause(PROJECT, job.id, by="another")
    scene.turn()
    if is_running:
        scene.attempt(job).end("left")
    scene.turn(3)
    assert scene.bench.job(job.id).paused_by == BY
    assert scene.reason(job) == ("paused", f"paused by {BY}; `gnomon resume` lets it go on")
    assert not scene.runs(job)
    scene.bench.queue.resume(PROJECT, job.id)
    scene.turn(2)
    assert scene.attempt(job).assignment.attempt == 1 + is_running
    assert scene.bench.job(job.id).paused_by is None


def test_a_paused_job_can_be_cancelled(scene: Steered) -> None:
    job = scene.train()
    scene.turn()
    scene.steering.pause(PROJECT, job.id, by=BY)
    scene.bench.queue.cancel(PROJECT, job.id)
    scene.turn()
    assert scene.attempt(job).cancel_asked
    scene.attempt(job).end("cancelled")
    scene.turn()
    assert scene.bench.job(job.id).state == "cancelled"


def test_what_has_ended_is_neither_paused_nor_changed(scene: Steered) -> None:
    job = scene.train()
    scene.bench.queue.cancel(PROJECT, job.id)
    before = (scene.bench.job(job.id), scene.bench.events(job.id))
    with pytest.raises(Conflict, match="has ended as cancelled and cannot be paused"):
        scene.steering.pause(PROJECT, job.id, by=BY)
    with pytest.raises(Conflict, match="has ended as cancelled and cannot be changed"):
        scene.steering.change(PROJECT, job.id, JobChange(priority=3))
    with pytest.raises(NotFound):
        scene.steering.pause("another", job.id, by=BY)
    assert (scene.bench.job(job.id), scene.bench.events(job.id)) == before


def test_a_change_goes_to_the_harvest_that_was_made_for_the_job(scene: Steered) -> None:
    job = scene.bench.submit(train_spec(), store=7)
    (harvest,) = job.depends_on
    scene.steering.change(PROJECT, job.id, JobChange(job_class="urgent", priority=7))
    for job_id in (job.id, harvest):
        changed = scene.bench.job(job_id)
        assert (changed.job_class, changed.priority) == ("urgent", 7)
        assert scene.bench.events(job_id)[-1].data["message"] == "job_class is now urgent, priority is now 7"


def test_a_harvest_takes_what_gangs_leave_and_gives_it_back(scene: Steered) -> None:
    harvest = scene.bench.submit(harvest_spec(token_budget=1 << 20, segment_tokens=1 << 14), store=9)
    scene.turn()
    assert scene.attempt(harvest).assignment.places == ("n",) * 4
    training = scene.train(features=3)
    scene.turn(2)
    assert scene.attempt(harvest).wanted == ("n",)
    assert scene.reason(training)[0] == "room_is_made"
    scene.attempt(harvest).places = ("n", "n")
    scene.turn(2)
    assert not scene.runs(training), "one device is not given back yet"
    scene.attempt(harvest).places = ("n",)
    scene.turn(2)
    assert scene.runs(training)
    scene.attempt(training).end("failed", code="x", message="y")
    scene.turn(3)
    assert scene.attempt(harvest).wanted == ("n",) * 4


def test_a_held_project_starts_nothing_and_others_do(scene: Steered) -> None:
    mine, theirs = scene.train(), scene.bench.submit(project="other", store=4)
    scene.steering.hold(PROJECT, by=BY)
    scene.turn(2)
    assert scene.reason(mine) == ("held", f"project default is held by {BY}: nothing of it is started")
    assert scene.bench.job(theirs.id, "other").state == "running"
    scene.steering.hold(PROJECT, by=None)
    scene.turn(2)
    assert scene.runs(mine)
    with scene.bench.database.read() as connection:
        assert read_project(connection, PROJECT).held_by is None


def test_a_drained_cluster_finishes_what_runs_and_starts_nothing(scene: Steered) -> None:
    running = scene.train()
    scene.turn()
    waiting = scene.train()
    scene.steering.drain(by=BY)
    scene.turn(2)
    assert not scene.attempt(running).leave_asked
    assert scene.reason(waiting) == ("drained", f"the cluster is drained by {BY}: nothing is started")
    scene.steering.drain(by=None)
    scene.turn(2)
    assert scene.runs(waiting)


def test_a_job_that_is_cancelled_while_it_is_decided_about_stops_nobody(
    scene: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = scene.train(), scene.train()

    def read_then_cancel(connection: Connection) -> list[Waiting]:
        waiting = read_waiting(connection)
        scene.bench.queue.cancel(PROJECT, job.id)
        return waiting

    monkeypatch.setattr(deciding, "read_waiting", read_then_cancel)
    scene.turn()
    assert (scene.runs(job), scene.runs(other)) == (False, True)


def test_what_runs_on_a_drained_node_goes_on_elsewhere(scene: Steered) -> None:
    scene.cluster.nodes = tuple(NodeSnapshot(id=name, name=name, n_cpus=1, n_gpus=0) for name in "ab")
    job = scene.train()
    scene.turn()
    (node,) = scene.attempt(job).assignment.places
    scene.steering.drain_node(node, by=BY)
    scene.turn(2)
    scene.attempt(job).end("left")
    scene.turn(3)
    (other,) = scene.attempt(job).assignment.places
    assert {node, other} == {"a", "b"}
    with scene.bench.database.read() as connection:
        drained = {each.id: each.drained_by for each in read_cluster(connection).nodes}
    assert drained == {node: BY, other: None}
    with pytest.raises(NotFound):
        scene.steering.drain_node("c", by=BY)


def test_one_dispatcher_decides_and_another_takes_over(scene: Steered) -> None:
    other = scene.new_dispatcher("b")
    scene.turn()
    first = scene.train()
    other.step()
    assert not scene.runs(first), "the first to ask leads"
    scene.turn()
    assert scene.runs(first)
    scene.dispatcher.hand_back()
    second = scene.train()
    other.step()
    assert scene.runs(second)


def test_what_a_newcomer_asks_for_is_told_in_order(scene: Steered) -> None:
    scene.cluster.nodes = (NodeSnapshot(id="n", name="node", n_cpus=1, n_gpus=0),)
    running = scene.train()
    scene.turn()
    low, high = scene.train(priority=-1), scene.train(priority=1)
    harvest = scene.bench.submit(store=5)
    waits = scene.bench.submit(train_spec(), store=5)
    scene.turn(2)
    places = {job.id: scene.bench.job(job.id).queue for job in (low, high, harvest, waits)}
    assert [job_id for job_id, _ in sorted(places.items(), key=lambda item: (item[1] and item[1].position) or 9)] == [
        high.id,
        harvest.id,
        low.id,
        waits.id,
    ]
    told = places[low.id]
    assert told is not None
    assert told.ahead == (high.id, harvest.id)
    assert scene.reason(waits) == ("waits_for_job", f"waits for job {harvest.id}")
    assert running.id in scene.reason(high)[1]


def test_the_remaining_time_is_told_with_its_spread(scene: Steered) -> None:
    job = scene.train()
    scene.turn()
    for done, rate in ((100, 10.0), (200, 40.0), (300, 20.0)):
        scene.attempt(job).report("progress", phase="train", done=done, total=1300, unit="tokens", rate=rate)
        scene.turn()
    left = scene.bench.job(job.id).remaining_s
    assert left is not None
    assert (left.expected, left.least, left.most) == (50.0, 25.0, 100.0)


def test_a_quota_is_kept_and_never_set_below_what_runs(scene: Steered) -> None:
    one, two = scene.train(), scene.train()
    scene.steering.set_project(PROJECT, weight=None, n_jobs_most=1, n_devices_most=None)
    scene.turn(2)
    assert scene.runs(one)
    assert scene.reason(two) == ("quota", "quota of project default: 1 of 1 running")
    scene.steering.set_project(PROJECT, weight=2.0, n_jobs_most=0, n_devices_most=None)
    scene.turn(2)
    assert scene.runs(two)
    for quotas in ({"n_jobs_most": 1, "n_devices_most": None}, {"n_jobs_most": None, "n_devices_most": 1}):
        with pytest.raises(Conflict, match="has 2 ") as caught:
            scene.steering.set_project(PROJECT, weight=None, **quotas)
        assert caught.value.code == "quota_below_use"
    with scene.bench.database.read() as connection:
        assert read_project(connection, PROJECT).model_dump(exclude={"name"}) == {
            "weight": 2.0,
            "n_jobs_most": None,
            "n_devices_most": None,
            "n_store_bytes_most": None,
            "held_by": None,
        }


def test_a_job_that_nobody_can_read_harms_no_other(scene: Steered) -> None:
    odd, other = scene.train(), scene.train()
    with scene.bench.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == odd.id).values(spec={"kind": "train", "d_sae": "many"}))
    scene.turn(2)
    assert scene.attempt(odd).assignment.places == ("n",), "its supervisor says what is wrong with it"
    assert scene.runs(other)


def test_a_long_queue_is_looked_up_in_turns_the_hasty_first(scene: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "N_LOOKED_UP", 2)
    slow = [scene.train(features=4) for _ in range(3)]
    urgent = scene.train(features=4, job_class="urgent")
    scene.turn()
    assert scene.runs(urgent)
    scene.turn(3)
    assert [scene.reason(job)[0] for job in slow] == ["no_room"] * 3
