"""The queue from the users' side, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from gnomon.errors import Conflict, CorruptArtifact, NotFound
from gnomon.specs import EvaluateSpec, JobRequest, TrainVariant
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import LEGAL_TRANSITIONS, dictionaries, jobs, legal_transitions, metadata
from gnomon_service.jobs.submission import Plan
from gnomon_workers.runtime.protocol import dictionary_ids
from tests.support.service_jobs import DICTIONARY_RECORD, PROJECT, STORE_RESULT, Bench, store_id, stored, train_spec


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def test_migrations_make_the_tables_the_code_knows(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        rows = connection.execute(select(legal_transitions)).all()
    assert {tuple(row) for row in rows} == set(LEGAL_TRANSITIONS)


def test_migrate_twice_changes_nothing(database: Database) -> None:
    database.migrate()
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert len(connection.execute(select(legal_transitions)).all()) == len(LEGAL_TRANSITIONS)


@pytest.mark.parametrize(
    ("state", "to"),
    [("succeeded", "queued"), ("failed", "running"), ("cancelled", "scheduled"), ("failed", "succeeded")],
)
def test_the_database_itself_refuses_to_leave_a_terminal_state(bench: Bench, state: str, to: str) -> None:
    job = bench.submit()
    with bench.database.write() as connection:
        connection.execute(text("UPDATE jobs SET state = :state WHERE id = :id"), {"state": state, "id": job.id})
    with pytest.raises(IntegrityError, match="illegal transition"), bench.database.write() as connection:
        connection.execute(text("UPDATE jobs SET state = :to WHERE id = :id"), {"to": to, "id": job.id})


@pytest.mark.parametrize("statement", ["UPDATE job_events SET kind = 'log'", "DELETE FROM job_events"])
def test_the_database_itself_refuses_to_change_events(bench: Bench, statement: str) -> None:
    bench.submit()
    with pytest.raises(IntegrityError, match=r"append-only|states are kept"), bench.database.write() as connection:
        connection.execute(text(statement))


def test_same_key_and_body_give_the_same_job(bench: Bench) -> None:
    assert bench.submit(key="k").id == bench.submit(key="k").id


def test_same_key_with_another_body_is_a_conflict(bench: Bench) -> None:
    bench.submit(key="k")
    with pytest.raises(Conflict) as caught:
        bench.submit(key="k", name="other")
    assert caught.value.code == "idempotency_conflict"


def test_a_key_counts_within_its_project_only(bench: Bench) -> None:
    assert bench.submit(key="k").id != bench.submit(key="k", project="other").id


def test_parallel_sends_with_one_key_make_one_job(bench: Bench) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = set(pool.map(lambda _: bench.submit(key="k").id, range(16)))
    with bench.database.read() as connection:
        n_jobs = connection.execute(select(func.count()).select_from(jobs)).scalar_one()
    assert (len(made), n_jobs) == (1, 1)


def test_parallel_trainings_share_one_harvest(bench: Bench) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda seed: bench.submit(train_spec(seed=seed)), range(8)))
    assert len({job.depends_on for job in made}) == 1
    assert len(made[0].depends_on) == 1


def test_training_waits_for_its_harvest_and_then_runs(bench: Bench) -> None:
    job = bench.submit(train_spec())
    harvest = bench.claim()
    assert (harvest.kind, harvest.lease.job_id) == ("harvest", job.depends_on[0])
    assert bench.claim_next("b") is None
    bench.leases.succeed(harvest.lease, STORE_RESULT)
    training = bench.claim("b")
    assert training.lease.job_id == job.id
    assert bench.store_row().state == "sealed"
    assert bench.store_row().n_rows == 900


def test_training_on_a_sealed_store_harvests_nothing(bench: Bench) -> None:
    bench.seal()
    assert bench.submit(train_spec()).depends_on == ()


def test_harvesting_a_sealed_store_again_succeeds_at_once(bench: Bench) -> None:
    bench.seal()
    job = bench.submit()
    assert (job.state, job.result and job.result["n_tokens"]) == ("succeeded", 0)
    assert bench.claim_next("a") is None


def test_a_second_harvest_of_a_store_under_way_waits_and_harvests_nothing(bench: Bench) -> None:
    bench.submit()
    second = bench.submit()
    bench.leases.succeed(bench.claim().lease, STORE_RESULT)
    job = bench.job(second.id)
    assert (job.state, job.attempt, job.result and job.result["n_tokens"]) == ("succeeded", 0, 0)


def test_a_failed_store_is_harvested_again_by_a_new_job(bench: Bench) -> None:
    first = bench.submit()
    bench.leases.fail(bench.claim().lease, code="x", message="y")
    assert bench.store_row().state == "failed"
    second = bench.submit()
    assert (bench.store_row().state, bench.store_row().job_id) == ("harvesting", second.id)
    assert bench.claim_next("b") is None, "the first attempt may still write to the same store"
    bench.release()
    assert bench.claim("b").lease.job_id == second.id != first.id


def test_success_of_training_publishes_its_dictionary(bench: Bench) -> None:
    bench.seal()
    job = bench.submit(train_spec(activations=stored(), hook_name="model.layers.1"), name="mine")
    held = bench.claim()
    bench.leases.succeed(held.lease, {"dictionary_id": held.dictionary_id, "records": [DICTIONARY_RECORD]})
    with bench.database.read() as connection:
        row = connection.execute(select(dictionaries)).one()
    assert (row.id, row.job_id, row.name, row.project) == (held.dictionary_id, job.id, "mine", PROJECT)
    assert bench.job(job.id).result == {"dictionary_id": held.dictionary_id}


def test_what_is_measured_later_is_added_to_the_dictionary(bench: Bench) -> None:
    bench.seal()
    bench.submit(train_spec(activations=stored(), hook_name="model.layers.1"))
    held = bench.claim()
    assert held.dictionary_id is not None
    bench.leases.succeed(held.lease, {"dictionary_id": held.dictionary_id, "records": [DICTIONARY_RECORD]})
    bench.release()
    request = JobRequest(spec=EvaluateSpec(dictionary=held.dictionary_id))
    bench.queue.submit(PROJECT, request, Plan(spec=request.spec, store_id=store_id()))
    measured = {"fvu": 0.1, "ce_loss_score": 0.98}
    bench.leases.succeed(bench.claim().lease, {"dictionary_id": held.dictionary_id, "metrics": measured})
    with bench.database.read() as connection:
        metrics = connection.execute(select(dictionaries.c.metrics)).scalar_one()
    assert metrics == {**DICTIONARY_RECORD["metrics"], **measured}


def test_success_of_training_publishes_all_variants_or_none(bench: Bench) -> None:
    bench.seal()
    variants = (TrainVariant(name="k8", k=8), TrainVariant(name="k4", k=4))
    job = bench.submit(train_spec(activations=stored(), hook_name="model.layers.1", variants=variants), name="m" * 128)
    held = bench.claim()
    assert held.dictionary_id is not None
    spoiled = {**DICTIONARY_RECORD, "d_sae": "many"}
    for records, wrong in (([DICTIONARY_RECORD], "1 records for 2"), ([DICTIONARY_RECORD, spoiled], "d_sae")):
        with pytest.raises(CorruptArtifact, match=wrong):
            bench.leases.succeed(held.lease, {"records": records})
        with bench.database.read() as connection:
            assert connection.execute(select(func.count()).select_from(dictionaries)).scalar_one() == 0
    bench.leases.succeed(held.lease, {"n_steps": 2, "records": [DICTIONARY_RECORD, {**DICTIONARY_RECORD, "d_in": 17}]})
    with bench.database.read() as connection:
        rows = connection.execute(select(dictionaries).order_by(dictionaries.c.d_in)).all()
    assert [row.id for row in rows] == list(dictionary_ids(held.dictionary_id, 2))
    assert [row.name for row in rows] == ["m" * 125 + "/k8", "m" * 125 + "/k4"]
    assert {row.job_id for row in rows} == {job.id} and bench.job(job.id).result == {"n_steps": 2}


def test_a_failed_harvest_fails_what_waits_for_it(bench: Bench) -> None:
    job = bench.submit(train_spec())
    bench.leases.fail(bench.claim().lease, code="empty_corpus", message="no text")
    failed = bench.job(job.id)
    assert (failed.state, failed.error and failed.error.code) == ("failed", "dependency_failed")
    assert failed.error is not None
    assert "no text" in failed.error.message


def test_cancelling_a_waiting_job_ends_it_at_once(bench: Bench) -> None:
    job = bench.submit()
    assert bench.queue.cancel(PROJECT, job.id).state == "cancelled"
    assert bench.claim_next("a") is None
    assert bench.store_row().state == "failed"


def test_cancelling_training_stops_the_harvest_made_for_it(bench: Bench) -> None:
    job = bench.submit(train_spec())
    harvest = bench.claim()
    bench.queue.cancel(PROJECT, job.id)
    assert bench.job(harvest.lease.job_id).cancel_requested


def test_cancelling_training_leaves_a_harvest_that_others_need(bench: Bench) -> None:
    first, second = bench.submit(train_spec()), bench.submit(train_spec(seed=1))
    bench.queue.cancel(PROJECT, first.id)
    assert bench.job(second.depends_on[0]).state == "queued"


def test_a_harvest_that_is_being_cancelled_is_not_waited_for(bench: Bench) -> None:
    first = bench.submit()
    bench.claim()
    bench.queue.cancel(PROJECT, first.id)
    second = bench.submit()
    assert second.depends_on == ()
    assert bench.store_row().job_id == second.id


def test_cancelling_a_finished_job_changes_nothing(bench: Bench) -> None:
    job = bench.seal()
    n_events = len(bench.events(job.id))
    assert bench.queue.cancel(PROJECT, job.id).state == "succeeded"
    assert len(bench.events(job.id)) == n_events


def test_jobs_of_another_project_look_absent(bench: Bench) -> None:
    job = bench.submit()
    for project_job in (job.id, "job_" + "0" * 26):
        with pytest.raises(NotFound, match="in this project"):
            bench.queue.cancel("other", project_job)
    assert bench.job(job.id).state == "queued"


def test_every_change_has_its_event_and_ids_have_no_gaps(bench: Bench) -> None:
    job = bench.seal()
    assert bench.states(job.id) == ["queued", "scheduled", "running", "succeeded"]
    assert [event.id for event in bench.events(job.id)] == [1, 2, 3, 4]
