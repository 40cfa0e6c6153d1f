"""Plans over REST, on real inputs: they queue nothing, refuse what a submit refuses, and learn from what finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from gnomon.plans import JobPlan
from gnomon.specs import Mesh
from gnomon_service.db.tables import activation_stores, jobs
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.planning.costs import Room
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.runtime.protocol import ClusterSnapshot, NodeSnapshot
from tests.support.service_api import Service, expect_problem, running_service

LARGE = {"d_sae": 2**16, "batch_size": 1024, "token_budget": 1024 * 1000}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path, price_cpu_hour=0.5, currency="EUR") as made:
        yield made


def plan(service: Service, spec: dict[str, Any]) -> JobPlan:
    """A plan that must be made, and leaves nothing behind."""
    before = service.count_jobs()
    answer = service.client().post("/v1/plans", json={"spec": spec})
    assert answer.status_code == 200, answer.text
    assert service.count_jobs() == before
    assert service.client().get("/v1/activations").json()["items"] == [] or before
    return JobPlan.model_validate_json(answer.content)


def see(service: Service, n_cpus: int = 4, n_gpus: int = 0) -> None:
    """Let the dispatcher have seen a cluster."""
    node = NodeSnapshot(id="n", name="n", n_cpus=n_cpus, n_gpus=n_gpus)
    Observations(service.bench.database).note(ClusterSnapshot(nodes=(node,)))


def finish(service: Service, spec: dict[str, Any], **run: Any) -> None:
    """A training of the project that has succeeded, and what it ran on."""
    job = service.submit(spec)
    result = {
        "dictionary_id": "dict_" + "0" * 26,
        "store_id": "act_" + "0" * 32,
        "n_steps": 1,
        "metrics": {},
        "run": {"mesh": {"dp": 1, "features": 1}, "device": "cpu", "d_in": 16, **run},
    }
    with service.bench.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state="scheduled", places=["n"]))
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state="running"))
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state="succeeded", result=result))


def test_a_plan_says_what_would_be_made_and_queues_nothing(service: Service) -> None:
    found = plan(service, service.train(**LARGE))
    assert (found.kind, found.reuses, found.job_id, found.n_devices) == ("train", "nothing", None, 0)
    assert found.harvest is not None and found.harvest.n_tokens == len("a few words") // 4
    assert found.disk.store_bytes is not None and found.disk.dictionary_bytes is not None
    assert found.disk.checkpoint_bytes is not None
    assert found.disk.checkpoint_bytes == pytest.approx(24 * 16 * 2**16, rel=0.25)
    assert found.disk.checkpoints_peak_bytes == found.disk.checkpoints_kept_bytes == 2 * found.disk.checkpoint_bytes
    assert found.chosen is not None and found.chosen.memory.n_bytes == sum(found.chosen.memory.parts.values())


def test_meshes_of_the_cluster_are_priced(service: Service) -> None:
    see(service)
    found = plan(service, service.train(**LARGE))
    assert {(each.mesh.dp, each.mesh.features) for each in found.meshes} == {
        (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)
    }  # fmt: skip
    assert found.currency == "EUR" and found.mesh == Mesh(features=4) and "times as fast" in (found.why or "")
    for each in found.meshes:
        assert each.training.device_hours == pytest.approx(each.n_ranks * each.training.hours)
        assert each.training.cost == pytest.approx(0.5 * each.training.device_hours)
        assert each.training.hours == pytest.approx(1024 * 1000 / each.training.tokens_per_s / 3600)
        assert (each.training.error, each.training.n_jobs, each.fits) == (1.0, 0, None)


def test_a_mesh_that_is_asked_for_is_planned(service: Service) -> None:
    see(service)
    found = plan(service, service.train(**LARGE, mesh={"dp": 2, "features": 2}))
    assert (found.mesh, found.why) == (Mesh(dp=2, features=2), "the spec says so")


def test_gpus_have_no_price_unless_it_is_set(service: Service) -> None:
    see(service, n_gpus=2)
    found = plan(service, service.train(**LARGE))
    assert found.device == "gpu" and {each.training.cost for each in found.meshes} == {None}
    assert found.chosen is not None and found.chosen.memory.parts["loader"] == 0


def test_a_harvest_under_way_is_told(service: Service) -> None:
    job = service.submit(service.harvest())
    found = plan(service, service.train())
    assert (found.reuses, found.job_id) == ("harvest_under_way", job.id)
    assert service.client().post(f"/v1/jobs/{job.id}/cancel").status_code == 200
    assert plan(service, service.train()).reuses == "nothing"


def test_a_harvest_and_an_evaluation_have_no_meshes(service: Service) -> None:
    found = plan(service, service.harvest())
    assert found.kind == "harvest" and found.meshes == () and found.disk.dictionary_bytes is None
    expect_problem(
        service.client().post("/v1/plans", json={"spec": {"kind": "evaluate", "dictionary": "dict_" + "0" * 26}}),
        404,
        "dictionary_not_found",
    )


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"activations": {"kind": "store", "id": "act_" + "0" * 32}}, 404, "store_not_found"),
        ({"hook_name": "model.layers.9"}, 422, "unknown_hook"),
        ({"dead_after_tokens": 10**9}, 422, "invalid_spec"),
        ({"mesh": {"dp": 8, "features": 8}, "batch_size": 1024}, 422, "mesh_does_not_fit"),
        ({"activations": {"model": {"source": "MODEL/absent"}}}, 422, "unknown_model"),
        ({"activations": {"text": [{"url": "/etc/passwd"}]}}, 422, "location_not_allowed"),
        ({"colour": "red"}, 422, "invalid_spec"),
    ],
)
def test_a_plan_refuses_what_a_submit_refuses(
    service: Service, changes: dict[str, Any], status: int, code: str
) -> None:
    see(service)
    if isinstance(inner := changes.get("activations"), dict) and "kind" not in inner:
        text = json.dumps(inner).replace("MODEL", str(service.inputs))
        changes = {"activations": service.harvest(**json.loads(text))}
    spec = service.train(**changes)
    refusals = [
        expect_problem(service.client().post(path, json={"spec": spec}), status, code)
        for path in ("/v1/plans", "/v1/jobs")
    ]
    assert refusals[0] == refusals[1]
    assert service.count_jobs() == 0


def test_what_can_never_fit_is_neither_planned_nor_queued(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    see(service)
    room = Room(n_places=4, what="CPUs", memory_bytes_per_place=2.0**20)
    monkeypatch.setattr(Room, "of", classmethod(lambda cls, cluster: room))
    for path in ("/v1/plans", "/v1/jobs"):
        answer = service.client().post(path, json={"spec": service.train(**LARGE)})
        problem = expect_problem(answer, 422, "does_not_fit")
        assert "W_enc, W_dec and their moments alone need" in problem["detail"]
        assert problem["term"] == "state" and problem["memory_bytes"] == 2**20
    assert service.count_jobs() == 0
    assert plan(service, service.train(d_sae=48)).mesh is not None


def test_what_fits_no_gpu_that_was_seen_is_neither_planned_nor_queued(service: Service) -> None:
    def see_gpus(n_bytes: int | None) -> None:
        node = NodeSnapshot(id="n", name="n", n_cpus=4, n_gpus=1, gpu_memory_bytes=n_bytes)
        Observations(service.bench.database).note(ClusterSnapshot(nodes=(node,)))

    see_gpus(2**20)
    assert service.client().get("/v1/cluster").json()["nodes"][0]["gpu_memory_bytes"] == 2**20
    for path in ("/v1/plans", "/v1/jobs"):
        answer = service.client().post(path, json={"spec": service.train(**LARGE)})
        assert expect_problem(answer, 422, "does_not_fit")["memory_bytes"] == 2**20
    see_gpus(80 * 2**30)
    assert [each.fits for each in plan(service, service.train(**LARGE)).meshes] == [True]
    see_gpus(None)
    assert [each.fits for each in plan(service, service.train(**LARGE)).meshes] == [None]


def test_reading_is_enough_for_a_plan_and_not_for_a_submit(service: Service) -> None:
    client = service.client(service.new_key(scopes=("read",)))
    assert client.post("/v1/plans", json={"spec": service.train()}).status_code == 200
    expect_problem(client.post("/v1/jobs", json={"spec": service.train()}), 403, "missing_scope")


def test_a_finished_job_of_the_same_shape_is_what_the_plan_says(service: Service) -> None:
    see(service)
    finish(service, service.train(**LARGE), tokens_per_s=123.0)
    one = next(each for each in plan(service, service.train(**LARGE)).meshes if each.mesh == Mesh())
    assert one.training.tokens_per_s == pytest.approx(123, rel=1e-6)
    assert one.training.n_jobs == 1 and one.training.error == pytest.approx(0.1)
    wider = next(
        each for each in plan(service, service.train(**LARGE | {"d_sae": 2**18})).meshes if each.mesh == Mesh()
    )
    assert wider.training.tokens_per_s < 60 and 0.3 < wider.training.error < 0.6


def test_what_others_ran_and_what_cannot_be_read_teaches_nothing(service: Service) -> None:
    see(service)
    finish(service, service.train(**LARGE), tokens_per_s=123.0, device="tpu")
    finish(service, service.train(**LARGE), tokens_per_s=123.0, device="gpu")
    first = plan(service, service.train(**LARGE)).meshes[0]
    assert first.training.n_jobs == 0
    finish(service, service.train(**LARGE), tokens_per_s=123.0)
    other = service.client(service.new_key("other"))
    answer = other.post("/v1/plans", json={"spec": service.train(**LARGE)})
    assert JobPlan.model_validate_json(answer.content).meshes[0].training.n_jobs == 0


def test_a_store_that_is_being_deleted_is_planned_as_little_as_queued(service: Service) -> None:
    service.submit(service.harvest())
    with service.bench.database.write() as connection:
        connection.execute(update(activation_stores).values(state="deleting"))
    for path in ("/v1/plans", "/v1/jobs"):
        answer = service.client().post(path, json={"spec": service.train()})
        expect_problem(answer, 409, "store_deleting")


def test_a_sealed_store_is_reused_as_it_is(service: Service) -> None:
    from tests.integration.test_service_planner import seal_real

    store_id = seal_real(service)
    by_id = {"kind": "store", "id": store_id}
    found = plan(service, service.train(activations=by_id))
    record = service.client().get(f"/v1/activations/{store_id}").json()
    assert (found.reuses, found.store_id, found.harvest) == ("sealed_store", store_id, None)
    assert (found.n_rows, found.disk.store_bytes) == (record["n_rows"], record["n_bytes"])
    root = service.settings.home / "store/projects/default/activations" / store_id
    assert ActivationStore.open(Location.open(f"file://{root}")).manifest.n_rows > 0
