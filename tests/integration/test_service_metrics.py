"""What /metrics tells of the scheduler: one project's jobs, and of the cluster what every key may see."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from gnomon.specs.request import JobChange
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.queue_reads import ended_attempts
from gnomon_service.db.tables import attempts, cluster, jobs
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.rest.metrics import Metrics
from gnomon_workers.runtime.protocol import ClusterSnapshot, NodeSnapshot
from tests.integration.test_service_scheduling import Steered
from tests.support.service_api import expect_problem, running_service
from tests.support.service_jobs import PROJECT, STORE_RESULT

Numbers = dict[str, float]
"""Samples by name and labels."""


def read(rendered: str) -> Numbers:
    """Samples by name and labels."""
    lines = (line.rsplit(" ", 1) for line in rendered.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in lines}


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Steered:
    made = Steered(database, tmp_path)
    made.cluster.nodes = tuple(NodeSnapshot(id=name, name=name, n_cpus=2, n_gpus=0) for name in "ab")
    return made


def numbers(scene: Steered, project: str = PROJECT) -> Numbers:
    return read(Metrics().render(scene.bench.database, project).decode())


def test_jobs_that_wait_are_told_by_class_and_reason(scene: Steered) -> None:
    scene.train(dp=2, features=2)
    scene.turn()
    first, second = scene.train(), scene.train()
    scene.train(dp=8)
    with scene.bench.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == first.id).values(created_at=database_now() - 5_000))
    scene.steering.change(PROJECT, second.id, JobChange(job_class="spare"))
    scene.time_s += 100.0
    scene.turn()
    scene.bench.submit(store=9)
    told = numbers(scene)
    queued = {name: value for name, value in told.items() if name.startswith("gnomon_queued_jobs")}
    assert queued == {
        'gnomon_queued_jobs{code="no_room",job_class="normal"}': 1,
        'gnomon_queued_jobs{code="no_room",job_class="spare"}': 1,
        'gnomon_queued_jobs{code="too_large",job_class="normal"}': 1,
        'gnomon_queued_jobs{code="unseen",job_class="normal"}': 1,
    }
    longest = 'gnomon_longest_wait_seconds{code="no_room",job_class="%s"}'
    assert told[longest % "normal"] >= 5_000 > told[longest % "spare"]
    assert told['gnomon_gangs{job_class="normal",kind="train"}'] == 1
    assert told["gnomon_leader_lease_seconds"] > 0
    with scene.bench.database.write() as connection:
        connection.execute(update(cluster).values(dispatcher_at=database_now() - 100, leader_until=database_now() - 9))
    silent = numbers(scene)
    assert silent['gnomon_queued_jobs{code="no_dispatcher",job_class="normal"}'] == 3
    assert silent["gnomon_leader_lease_seconds"] <= -9


def test_devices_are_free_held_or_drained_and_what_a_project_holds_is_told_to_it_alone(scene: Steered) -> None:
    scene.train(features=2)
    scene.turn()
    scene.bench.submit(store=3, project="other")
    scene.steering.drain_node("b", by="ann")
    held_by_state = {"free": 0, "held": 2, "drained": 2}
    told = numbers(scene)
    if told['gnomon_devices{device="cpu",state="drained"}'] == 0:  # the gang is on the other node
        held_by_state = {"free": 2, "held": 2, "drained": 0}
    for state, n_devices in held_by_state.items():
        assert told[f'gnomon_devices{{device="cpu",state="{state}"}}'] == n_devices
    assert told['gnomon_project_devices{device="cpu"}'] == 2
    other = numbers(scene, "other")
    assert other['gnomon_project_devices{device="cpu"}'] == 0
    assert other['gnomon_devices{device="cpu",state="held"}'] == 2
    assert [name for name in other if name.startswith(("gnomon_gangs{", "gnomon_attempts_ended{"))] == [
        f'gnomon_attempts_ended{{state="{state}"}}' for state in ("succeeded", "failed", "cancelled", "lost", "left")
    ]
    assert [value for name, value in other.items() if name.startswith("gnomon_attempts_ended{")] == [0] * 5
    assert [name for name in other if name.startswith("gnomon_jobs{")] == ['gnomon_jobs{kind="harvest",state="queued"}']


def test_losses_and_those_that_were_sent_away_are_counted_for_a_day(scene: Steered) -> None:
    bench = scene.bench
    for store, end in ((20, "lose"), (21, "put_back"), (22, "lose")):
        bench.submit(store=store)
        getattr(bench.leases, end)(bench.claim().lease, "why")
    bench.release()
    bench.leases.succeed(bench.claim().lease, STORE_RESULT)
    ended = 'gnomon_attempts_ended{state="%s"}'
    told = numbers(scene)
    assert (told[ended % "lost"], told[ended % "left"], told[ended % "succeeded"]) == (2, 1, 2)
    with bench.database.write() as connection:
        connection.execute(
            update(attempts).where(attempts.c.state == "lost").values(ended_at=database_now() - 2 * 86_400)
        )
    assert numbers(scene)[ended % "lost"] == 0


def test_ended_attempts_are_found_by_their_index(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'gnomon.db'}")  # PostgreSQL's choice depends on what it counted
    database.migrate()
    with database.read() as connection:
        asked = ended_attempts(PROJECT).compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}").all()
    assert any("ix_attempts_unreleased" in str(row) for row in plan), plan
    database.close()


def test_before_a_cluster_was_seen_nothing_is_said_of_one(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        told = read(service.client().get("/metrics").text)
        assert not any(name.startswith(("gnomon_devices", "gnomon_project_devices")) for name in told)
        assert told["gnomon_leader_lease_seconds"] == 0
        node = NodeSnapshot(id="n", name="n", n_cpus=16, n_gpus=4)
        Observations(service.bench.database).note(ClusterSnapshot(nodes=(node,)))
        reader = service.client(service.new_key("other", scopes=("read",)))
        assert reader.get("/v1/cluster").status_code == 200, "who may see the cluster may see its devices"
        assert read(reader.get("/metrics").text)['gnomon_devices{device="gpu",state="free"}'] == 4
        expect_problem(service.client("").get("/metrics"), 401, "missing_key")
