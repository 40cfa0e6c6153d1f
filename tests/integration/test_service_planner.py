"""What is refused before anything is queued, over REST and on real inputs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.collecting import Collector
from gnomon_storage.location import Location
from gnomon_workers.runtime.protocol import ClusterSnapshot, NodeSnapshot
from tests.support.service_api import N_POSITIONS, Service, expect_problem, running_service
from tests.support.service_jobs import STORE_RECORD
from tests.support.stores import HOOK, make_store


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path) as made:
        yield made


def refuse(service: Service, spec: dict[str, Any], status: int, code: str) -> dict[str, Any]:
    """Submit what must be refused; nothing may be left behind."""
    before = service.count_jobs()
    problem = expect_problem(service.client().post("/v1/jobs", json={"spec": spec}), status, code)
    assert service.count_jobs() == before
    return problem


def seal_real(service: Service) -> str:
    """A sealed store with real bytes; returns its id."""
    job = service.submit(service.harvest(hooks=["model.layers.0"]))
    (store,) = service.client().get("/v1/activations").json()["items"]
    make_store(service.settings.home / "store/projects/default", store_id=store["id"])
    record = STORE_RECORD | {"hooks": {HOOK: 16}}
    held = service.bench.claim()
    assert held.lease.job_id == job.id
    result = {"store_id": store["id"], "n_rows": 1, "n_held_out_rows": 1, "n_tokens": 1, "record": record}
    service.bench.leases.succeed(held.lease, result)
    return str(store["id"])


def test_harvests_of_unknown_things_are_refused(service: Service) -> None:
    absent = {"source": str(service.inputs / "absent")}
    refuse(service, service.harvest(model=absent), 422, "unknown_model")
    refuse(service, service.harvest(text=[{"url": str(service.inputs / "absent.txt")}]), 422, "missing_file")
    refuse(service, service.harvest(text=[{"url": str(service.inputs / "empty.txt")}]), 422, "empty_corpus")
    problem = refuse(service, service.harvest(hooks=["model.layer.1"]), 422, "unknown_hook")
    assert "model.layers.1" in problem["detail"]


@pytest.mark.parametrize("url", ["/etc/passwd", "http://127.0.0.1/x.txt", "file:///x::memory://", "s3://bucket/x.txt"])
def test_inputs_outside_the_roots_are_refused(service: Service, url: str) -> None:
    refuse(service, service.harvest(text=[{"url": url}]), 422, "location_not_allowed")


def test_a_context_longer_than_the_model_is_refused(service: Service) -> None:
    problem = refuse(service, service.harvest(context_length=128), 422, "context_too_long")
    assert str(N_POSITIONS) in problem["detail"]


def test_an_inline_harvest_is_checked_like_one_of_its_own(service: Service) -> None:
    spec = service.train(activations=service.harvest(hooks=["model.layers.7"]))
    refuse(service, spec, 422, "unknown_hook")


def test_the_same_harvest_has_the_same_store(service: Service) -> None:
    one = service.submit(service.train())
    two = service.submit(service.train(seed=1))
    assert one.depends_on == two.depends_on
    three = service.submit(service.train(activations=service.harvest(token_budget=2048)))
    assert three.depends_on != one.depends_on


def test_the_hook_must_be_named_where_there_are_several(service: Service) -> None:
    both = service.harvest(hooks=["model.layers.0", "model.layers.1"])
    refuse(service, service.train(activations=both), 422, "hook_name_required")
    refuse(service, service.train(activations=both, hook_name="model.layers.2"), 422, "unknown_hook")
    service.submit(service.train(activations=both, hook_name="model.layers.0"))


def test_a_shape_that_only_the_width_shows_to_be_wrong_is_refused(service: Service) -> None:
    spec = service.train(d_sae=None, expansion_factor=1.5)
    problem = refuse(service, spec, 422, "invalid_spec")
    assert "k=32 exceeds d_sae=24" in problem["detail"]
    spec |= {"activation": {"kind": "topk", "k": 8}, "variants": [{"name": "fits", "k": 24}, {"name": "wide", "k": 25}]}
    problem = refuse(service, spec, 422, "invalid_spec")
    assert "variant 'wide': k=25 exceeds d_sae=24" in problem["detail"]


def test_settings_without_effect_are_refused(service: Service) -> None:
    problem = refuse(service, service.train(schedule={"warmup_steps": 10_000_000}), 422, "invalid_spec")
    assert "schedule.warmup_steps=10000000 is not reached" in problem["detail"]
    problem = refuse(service, service.train(dead_after_tokens=10**9), 422, "invalid_spec")
    assert "no feature could ever count as dead" in problem["detail"]


def test_a_mesh_must_fit_the_cluster(service: Service) -> None:
    spec = service.train(mesh={"dp": 2, "features": 3}, batch_size=1024)
    service.submit(spec)
    node = NodeSnapshot(id="n", name="n", n_cpus=4, n_gpus=0)
    Observations(service.bench.database).note(ClusterSnapshot(nodes=(node,)))
    problem = refuse(service, spec, 422, "mesh_does_not_fit")
    assert "4 CPUs" in problem["detail"]
    assert problem["fitting"] == ["1 x 4", "2 x 2", "4 x 1", "1 x 3", "1 x 2", "2 x 1", "1 x 1"]
    service.submit(service.train(mesh={"dp": 2, "features": 2}, batch_size=1024))


def test_a_store_is_named_by_an_id_that_exists_and_is_sealed(service: Service) -> None:
    by_id = {"kind": "store", "id": "act_" + "0" * 32}
    refuse(service, service.train(activations=by_id), 404, "store_not_found")
    service.submit(service.harvest())
    by_id["id"] = service.client().get("/v1/activations").json()["items"][0]["id"]
    refuse(service, service.train(activations=by_id), 409, "store_not_sealed")


def test_a_sealed_store_is_used_and_a_damaged_one_refused(service: Service) -> None:
    store_id = seal_real(service)
    by_id = {"kind": "store", "id": store_id}
    inline = service.harvest(hooks=["model.layers.0"])
    assert service.submit(service.train(activations=by_id)).depends_on == ()
    assert service.submit(service.train(activations=inline)).depends_on == ()
    root = service.settings.home / "store/projects/default/activations" / store_id
    chunk = next(path for path in sorted(root.rglob("c/*")) if path.is_file())
    chunk.unlink()
    for activations in (by_id, inline):
        refuse(service, service.train(activations=activations), 409, "corrupt_artifact")
    # nothing would be left to do, were it not looked at
    refuse(service, inline, 409, "corrupt_artifact")


def collect(service: Service) -> None:
    """As a dispatcher does that has nothing else to do."""
    Collector(service.bench.database, service.settings.project_root).collect()


def test_a_damaged_store_is_deleted_and_harvested_again(service: Service) -> None:
    store_id = seal_real(service)
    inline = service.harvest(hooks=["model.layers.0"])
    root = service.settings.home / "store/projects/default/activations" / store_id
    next(path for path in sorted(root.rglob("c/*")) if path.is_file()).unlink()
    refuse(service, service.train(activations=inline), 409, "corrupt_artifact")
    assert service.client().delete(f"/v1/activations/{store_id}").status_code == 202
    collect(service)
    assert not root.exists()
    train = service.submit(service.train(activations=inline))
    assert len(train.depends_on) == 1
    in_use = service.client().delete(f"/v1/activations/{store_id}")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "store_in_use")
    absent = service.client().delete(f"/v1/activations/act_{'0' * 32}")
    assert (absent.status_code, absent.json()["code"]) == (404, "store_not_found")


def test_a_store_that_is_being_deleted_holds_up_nobody_but_its_own_harvest(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_id = seal_real(service)
    inline = service.harvest(hooks=["model.layers.0"])
    begun, go_on = threading.Event(), threading.Event()
    delete = Location.delete

    def slowly(self: Location) -> None:
        begun.set()
        assert go_on.wait(60)
        delete(self)

    monkeypatch.setattr(Location, "delete", slowly)
    answer = service.client().delete(f"/v1/activations/{store_id}")
    deleted = answer.json()
    assert (answer.status_code, deleted["state"], deleted["deleted_why"][:16]) == (202, "deleting", "deleted by test ")
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(collect, service)
        assert begun.wait(60)
        assert service.client().get(f"/v1/activations/{store_id}").json()["state"] == "deleting"
        refuse(service, inline, 409, "store_deleting")
        service.submit(service.harvest(hooks=["model.layers.1"]))  # the database is free
        go_on.set()
        deleting.result(timeout=60)
    deleted = service.client().get(f"/v1/activations/{store_id}").json()
    assert (deleted["state"], deleted["n_rows"], deleted["n_bytes"]) == ("deleted", None, None)
    assert service.submit(inline).state == "queued"


def test_an_unknown_dictionary_cannot_be_evaluated(service: Service) -> None:
    refuse(service, {"kind": "evaluate", "dictionary": "dict_" + "0" * 26}, 404, "dictionary_not_found")
