"""The dispatcher, turn by turn, on real databases and a cluster in memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gnomon.errors import InvalidRequest, Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import read_cluster
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.dispatch.loop import Dispatcher
from gnomon_service.jobs.held import Placement
from gnomon_service.settings import Settings
from gnomon_workers.runtime.protocol import Cluster, NodeSnapshot
from tests.support.service_cluster import MemoryCluster
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench


class Scene:
    """A queue, a cluster, and dispatchers that come and go."""

    def __init__(self, database: Database, home: Path) -> None:
        self.bench = Bench(database)
        self.cluster = MemoryCluster()
        self.settings = Settings(home=home, storage_root="file:///store", poll_s=0.01, cancel_grace_s=5.0)
        self.time_s = 0.0
        self.dispatcher = self.new_dispatcher("a")

    def new_dispatcher(self, owner: str) -> Dispatcher:
        cluster: Cluster = self.cluster
        return Dispatcher(
            leases=self.bench.leases,
            observations=Observations(self.bench.database),
            scheduler=Scheduler(self.bench.database),
            cluster=cluster,
            settings=self.settings,
            owner=owner,
            clock=lambda: self.time_s,
        )

    def turn(self, n_turns: int = 1) -> None:
        for _ in range(n_turns):
            self.dispatcher.step()


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene(database, tmp_path)


def test_a_job_runs_to_its_end_and_leaves_nothing_on_the_cluster(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    attempt = scene.cluster.only
    assert attempt.assignment.storage_root == "file:///store/projects/default"
    assert attempt.assignment.spec["kind"] == "harvest"
    attempt.report("phase", phase="harvest", total=1024, unit="tokens")
    scene.turn()
    attempt.report("progress", phase="harvest", done=1024, total=1024, unit="tokens")
    attempt.end("succeeded", STORE_RESULT)
    scene.turn(2)
    assert scene.bench.states(job.id) == ["queued", "scheduled", "running", "succeeded"]
    assert [event.kind for event in scene.bench.events(job.id)].count("progress") == 1
    assert scene.cluster.attempts == {}


def test_as_many_jobs_run_at_once_as_there_is_room_for(scene: Scene) -> None:
    scene.cluster.nodes = (NodeSnapshot(id="n", name="node", n_cpus=1, n_gpus=0),)
    first, second = (scene.bench.submit(store=number) for number in (1, 2))
    scene.turn(2)
    assert len(scene.cluster.attempts) == 1
    place = scene.bench.job(second.id).queue
    assert place is not None
    assert (place.position, place.code) == (1, "no_room")
    assert place.message.startswith(f"needs 1 core, 0 free of 1; {first.id} holds the rest")
    scene.cluster.only.end("succeeded", STORE_RESULT)
    scene.turn(3)
    assert scene.cluster.n_started == 2


def test_a_new_dispatcher_adopts_what_runs_and_stores_each_report_once(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.only.report("log", message="one")
    scene.turn()
    scene.cluster.only.report("log", message="two")
    scene.bench.let_lease_pass(job.id)
    scene.dispatcher = scene.new_dispatcher("b")  # the first one was killed: it did nothing more
    scene.turn()
    messages = [event.data["message"] for event in scene.bench.events(job.id) if event.kind == "log"]
    assert messages == ["one", "taken over by another dispatcher", "two"]
    assert (scene.cluster.n_started, scene.bench.job(job.id).attempt) == (1, 1)


def test_a_dispatcher_that_was_adopted_from_leaves_the_gang_alone(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.let_lease_pass(job.id)
    scene.new_dispatcher("b").step()
    scene.cluster.only.report("log", message="late")
    scene.turn()
    assert scene.cluster.killed == []
    assert len(scene.cluster.attempts) == 1


def test_a_dispatcher_that_slept_past_another_attempt_kills_its_gang(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.let_lease_pass(job.id)
    (held,) = scene.bench.leases.adopt("b")
    scene.bench.leases.lose(held.lease, "gone")
    scene.cluster.only.report("log", message="stale")
    scene.turn()
    assert (job.id, 1) in scene.cluster.killed
    assert "stale" not in str(scene.bench.events(job.id))


def test_a_claim_that_was_never_started_is_started_by_the_adopter(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.bench.claim_next("dead")
    scene.bench.let_lease_pass(job.id)
    scene.turn()
    assert scene.bench.job(job.id).state == "running"
    assert scene.cluster.n_started == 1


def test_an_unreachable_cluster_fails_no_job(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.is_reachable = False
    for _ in range(5):
        scene.time_s += 100.0
        scene.turn()
        scene.dispatcher.beat()
    assert scene.bench.states(job.id) == ["queued", "scheduled", "running"]
    scene.cluster.is_reachable = True
    scene.cluster.only.end("succeeded", STORE_RESULT)
    scene.turn()
    assert scene.bench.job(job.id).state == "succeeded"


def test_nothing_is_claimed_while_the_cluster_is_unreachable(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.cluster.is_reachable = False
    scene.turn(2)
    assert scene.bench.job(job.id).state == "queued"


def test_an_attempt_the_cluster_does_not_know_is_lost_and_runs_again(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.attempts.clear()
    scene.turn()
    assert scene.bench.job(job.id).attempt in (1, 2)
    scene.turn(2)
    assert (scene.bench.job(job.id).state, scene.bench.job(job.id).attempt) == ("running", 2)


def test_a_start_that_raises_is_a_loss(scene: Scene) -> None:
    job = scene.bench.submit(max_attempts=2)
    scene.cluster.start_error = RuntimeError("no room")
    scene.turn(4)
    failed = scene.bench.job(job.id)
    assert (failed.state, failed.attempt) == ("failed", 2)
    assert failed.error is not None
    assert (failed.error.code, "no room" in failed.error.message) == ("attempts_exhausted", True)


def test_a_start_that_refuses_the_job_fails_it(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.cluster.start_error = InvalidRequest("mesh too large", code="mesh_does_not_fit")
    scene.turn()
    failed = scene.bench.job(job.id)
    assert (failed.state, failed.error and failed.error.code) == ("failed", "mesh_does_not_fit")


def test_a_failed_outcome_is_final_and_keeps_its_reason(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.only.end("failed", code="empty_corpus", message="no text")
    scene.turn()
    failed = scene.bench.job(job.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code, failed.error.message) == ("failed", "empty_corpus", "no text")


def test_a_lost_outcome_runs_again(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.only.end("lost", message="rank 1 died")
    scene.turn(3)
    assert scene.bench.job(job.id).attempt == 2
    assert (job.id, 1) in scene.cluster.killed


def test_an_unusable_result_fails_the_job(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.only.end("succeeded", {"record": {}})
    scene.turn()
    failed = scene.bench.job(job.id)
    assert (failed.state, failed.error and failed.error.code) == ("failed", "invalid_result")


def test_cancel_asks_first_and_ends_as_cancelled(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.queue.cancel(PROJECT, job.id)
    scene.turn()
    assert scene.cluster.only.cancel_asked
    assert scene.bench.job(job.id).state == "running"
    scene.cluster.only.end("cancelled")
    scene.turn()
    assert scene.bench.job(job.id).state == "cancelled"


def test_cancel_kills_after_the_grace(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.queue.cancel(PROJECT, job.id)
    scene.turn()
    scene.time_s += 4.9
    scene.turn()
    assert scene.bench.job(job.id).state == "running"
    scene.time_s += 0.2
    scene.turn()
    assert scene.bench.job(job.id).state == "cancelled"
    assert scene.cluster.attempts == {}


def test_a_job_whose_supervisor_stands_still_is_cancelled_too(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.cluster.only.is_silent = True
    scene.bench.queue.cancel(PROJECT, job.id)
    scene.turn()
    assert scene.cluster.only.cancel_asked
    assert scene.bench.job(job.id).state == "running"
    scene.time_s += 5.1
    scene.turn()
    assert scene.bench.job(job.id).state == "cancelled"
    assert scene.cluster.attempts == {}


def test_a_clean_stop_of_dispatcher_and_cluster_is_no_loss(scene: Scene) -> None:
    """However often: five losses in a row would fail the job."""
    job = scene.bench.submit(max_attempts=2)
    scene.dispatcher.ends_with_cluster = True
    for _ in range(4):
        scene.turn()
        assert scene.bench.job(job.id).state == "running"
        scene.dispatcher.hand_back()
        scene.cluster.attempts.clear()
        assert scene.bench.job(job.id).state == "queued"
    scene.turn()
    scene.bench.queue.cancel(PROJECT, job.id)
    scene.dispatcher.hand_back()
    assert scene.bench.job(job.id).state == "cancelled"


def test_the_end_of_its_own_cluster_is_a_loss_of_what_ran_there(scene: Scene) -> None:
    """A job that ends the cluster itself would else do so again and again."""
    job = scene.bench.submit(max_attempts=2)
    scene.dispatcher.ends_with_cluster = True
    scene.dispatcher.has_gone.set()
    for state in ("queued", "failed"):
        scene.turn()
        assert scene.bench.job(job.id).state == "running"
        scene.dispatcher.hand_back()
        scene.cluster.attempts.clear()
        assert scene.bench.job(job.id).state == state
    (lost, _) = [event.data for event in scene.bench.events(job.id) if "code" in event.data]
    assert (lost["code"], lost["message"]) == ("attempt_lost", "the Ray of this service ended, with all that ran there")


def test_a_deadline_stops_a_running_job(scene: Scene) -> None:
    job = scene.bench.submit(deadline_s=1)
    scene.turn()
    deadline = threading.Event()
    while scene.bench.job(job.id).state == "running":
        deadline.wait(0.05)
        scene.turn()
    failed = scene.bench.job(job.id)
    assert failed.error is not None
    assert failed.error.code == "deadline_exceeded"
    scene.turn()
    assert scene.cluster.attempts == {}


def test_ended_attempts_of_a_dead_dispatcher_are_released(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    (run,) = scene.dispatcher._held_runs()
    scene.bench.leases.fail(run.lease, code="x", message="y")  # written, and then the dispatcher died
    scene.dispatcher = scene.new_dispatcher("b")
    scene.turn()
    assert scene.cluster.attempts == {}
    assert scene.bench.leases.unreleased() == []
    assert (job.id, 1) in scene.cluster.killed


def test_a_loop_that_stands_still_lets_its_leases_pass(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.let_lease_pass(job.id)
    scene.time_s += scene.settings.stall_s + 1
    scene.dispatcher.beat()
    assert [held.lease.job_id for held in scene.bench.leases.adopt("b")] == [job.id]


def test_beats_keep_a_lease(scene: Scene) -> None:
    job = scene.bench.submit()
    scene.turn()
    scene.bench.let_lease_pass(job.id)
    scene.dispatcher.beat()
    assert scene.bench.leases.adopt("b") == []


def test_stopping_hands_leases_back_and_leaves_the_gang(scene: Scene) -> None:
    scene.bench.submit()
    scene.turn()
    stop = threading.Event()
    stop.set()
    scene.dispatcher.run(stop)
    assert len(scene.cluster.attempts) == 1
    assert len(scene.bench.leases.adopt("b")) == 1


def test_a_database_that_does_not_answer_only_cuts_a_turn_short(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    job = scene.bench.submit()
    answers = scene.bench.leases.claim
    stop = threading.Event()
    calls: list[str] = []

    def fail_once(owner: str, job_id: str, placement: Placement) -> object:
        calls.append(owner)
        if len(calls) == 1:
            raise Unavailable("no answer")
        stop.set()
        return answers(owner, job_id, placement)

    monkeypatch.setattr(scene.bench.leases, "claim", fail_once)
    scene.dispatcher.run(stop)
    assert scene.bench.job(job.id).state == "running"


def test_the_cluster_is_written_down_for_the_api(scene: Scene) -> None:
    scene.turn()
    with scene.bench.database.read() as connection:
        seen = read_cluster(connection)
    assert (seen.n_cpus, seen.n_gpus, seen.n_nodes, seen.seen_at is None) == (4, 0, 1, False)
