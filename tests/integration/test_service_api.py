"""The REST API through the real ASGI application."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from gnomon.errors import GnomonError, StoreUnavailable, Unavailable
from gnomon_service import storage_root
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import cluster
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.jobs.deletions import begin_dictionary_deletion
from gnomon_service.rest.event_stream import EventStream
from gnomon_service.rest.key_gate import PUBLIC_PATHS
from gnomon_service.rest.news import News
from gnomon_service.rest.routes import health
from gnomon_service.tenancy.keys import Keys
from gnomon_storage.location import Location
from gnomon_workers.runtime.protocol import ClusterSnapshot
from tests.support.service_api import Service, expect_problem, running_service
from tests.support.service_jobs import DICTIONARY_RECORD, stored, train_spec
from tests.unit.test_spec_problems import TRAIN, WRONG


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path) as made:
        yield made


# ---------------------------------------------------------------------------------------------- keys


def routes_of(service: Service) -> list[tuple[str, str]]:
    """Every (method, path) that the application answers, the description of itself included."""
    document = service.app.openapi()
    found = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert len(found) >= 15
    return [*found, ("GET", "/v1/openapi.json")]


def test_no_route_answers_without_a_key_but_the_public_ones(service: Service) -> None:
    assert {"/healthz", "/readyz"} == PUBLIC_PATHS
    client = service.client("")
    for method, path in [*routes_of(service), ("GET", "/docs"), ("GET", "/absent"), ("OPTIONS", "/v1/jobs")]:
        answer = client.request(method, path.replace("{", "").replace("}", ""))
        if path in PUBLIC_PATHS:
            assert answer.status_code in (200, 503)
        else:
            expect_problem(answer, 401, "missing_key")
            assert answer.headers["www-authenticate"] == "Bearer"


def test_every_application_route_is_in_the_walk(service: Service) -> None:
    described = {path for _, path in routes_of(service)}
    assert {getattr(route, "path", "?") for route in service.app.routes if hasattr(route, "path")} <= described


@pytest.mark.parametrize(
    "change", [lambda key: key[:-1], lambda key: key[:-1] + ("a" if key[-1] != "a" else "b"), lambda key: "x" + key]
)
def test_wrong_keys_get_one_answer_whatever_is_wrong(service: Service, change: Any) -> None:
    wrong = expect_problem(service.client(change(service.key)).get("/v1/jobs"), 401, "invalid_key")
    other = service.new_key()
    swapped = service.key[:16] + other[16:]
    absent = "gnm_" + "0" * 12 + service.key[16:]
    for key in (swapped, absent):
        assert expect_problem(service.client(key).get("/v1/jobs"), 401, "invalid_key") == wrong


def test_expired_keys_are_refused_as_expired(service: Service) -> None:
    key = service.new_key(expires_in_s=-1)
    expect_problem(service.client(key).get("/v1/jobs"), 401, "expired_key")


def test_revoked_keys_are_refused_at_once(service: Service) -> None:
    made = service.client().post("/v1/keys", json={"name": "laptop", "scopes": ["read"]})
    key = made.json()
    assert made.status_code == 201
    client = service.client(key["key"])
    assert client.get("/v1/jobs").status_code == 200
    assert service.client().delete(f"/v1/keys/{key['id']}").status_code == 204
    expect_problem(client.get("/v1/jobs"), 401, "invalid_key")
    listed = {item["id"]: item for item in service.client().get("/v1/keys").json()["items"]}
    assert listed[key["id"]]["revoked_at"] is not None
    assert "key" not in listed[key["id"]]


def test_a_key_that_sends_too_much_is_told_when_to_come_again(tmp_path: Path) -> None:
    with running_service(tmp_path / "home", requests_per_s=0.001) as service:
        busy, other = service.new_key(), service.new_key()
        first, second = (service.client(busy).get("/v1/jobs") for _ in range(2))
        assert first.status_code == 200
        expect_problem(second, 429, "rate_limited")
        assert 500 < int(second.headers["Retry-After"]) <= 1000
        assert service.client(other).get("/v1/jobs").status_code == 200
        assert service.client(busy).get("/healthz").status_code == 200


def test_the_stream_of_a_revoked_key_ends(service: Service) -> None:
    job = service.submit(service.harvest())
    made = service.client().post("/v1/keys", json={"name": "laptop", "scopes": ["read"]}).json()
    keys, ended = Keys(service.bench.database), threading.Event()
    principal, news = keys.authenticate(made["key"]), News(service.bench.database, keys, poll_s=0.01)
    stream = EventStream(service.bench.database, keys, news, principal, job.id, after=0)

    async def read() -> list[str]:
        return [part async for part in stream._messages(stream._read())]

    def follow() -> None:
        assert any("queued" in part for part in asyncio.run(read()))
        ended.set()

    follower = threading.Thread(target=follow)
    follower.start()
    assert not ended.wait(0.5), "the job goes on, and so does the stream"
    assert service.client().delete(f"/v1/keys/{made['id']}").status_code == 204
    assert ended.wait(10)
    follower.join()


def test_keys_are_stored_as_hashes_only(service: Service) -> None:
    service.bench.database.close()
    stored = b"".join(path.read_bytes() for path in service.settings.home.glob("gnomon.db*"))
    secret = service.key.split("_")[2].encode()
    assert service.key.split("_")[1].encode() in stored
    assert secret not in stored


@pytest.mark.parametrize(
    ("scope", "method", "path", "expected"),
    [
        ("read", "POST", "/v1/jobs", 403),
        ("read", "GET", "/v1/jobs", 200),
        ("read", "GET", "/metrics", 200),
        ("read", "GET", "/v1/keys", 403),
        ("read", "DELETE", "/v1/activations/act_" + "0" * 32, 403),
        ("write", "DELETE", "/v1/activations/act_" + "0" * 32, 404),
        ("write", "GET", "/v1/cluster", 200),
        ("write", "POST", "/v1/keys", 403),
        ("admin", "GET", "/v1/keys", 200),
        ("read", "POST", "/v1/jobs/job_" + "0" * 26 + "/pause", 403),
        ("read", "GET", "/v1/project", 200),
        ("write", "PATCH", "/v1/project", 403),
        ("write", "PATCH", "/v1/cluster", 403),
        ("write", "PATCH", "/v1/cluster/nodes/n", 403),
    ],
)
def test_scopes(service: Service, scope: Any, method: str, path: str, expected: int) -> None:
    body = {"spec": service.harvest()} if path == "/v1/jobs" else {"name": "x"}
    client = service.client(service.new_key(scopes=(scope,)))
    answer = client.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == expected, answer.text


def test_what_another_project_has_looks_absent(service: Service) -> None:
    dictionary, store = publish(service)
    job = service.submit(service.harvest())
    other = service.client(service.new_key("other"))
    real = {"jobs": job.id, "activations": store, "dictionaries": dictionary}
    none = {"jobs": "job_" + "0" * 26, "activations": "act_" + "0" * 32, "dictionaries": "dict_" + "0" * 26}
    for kind, row_id in real.items():
        foreign, absent = other.get(f"/v1/{kind}/{row_id}"), other.get(f"/v1/{kind}/{none[kind]}")
        assert foreign.status_code == absent.status_code == 404
        assert foreign.text.replace(row_id, "") == absent.text.replace(none[kind], "")
        assert other.get(f"/v1/{kind}").json()["items"] == []
    for verb in ("cancel", "pause", "resume"):
        assert other.post(f"/v1/jobs/{job.id}/{verb}").status_code == 404
    assert other.patch(f"/v1/jobs/{job.id}", json={"priority": 1}).status_code == 404
    assert other.get(f"/v1/jobs/{job.id}/events").status_code == 404
    assert other.get(f"/v1/dictionaries/{dictionary}/files/cfg.json").status_code == 404
    assert other.delete(f"/v1/keys/{service.key.split('_')[1]}").status_code == 404
    assert other.delete(f"/v1/activations/{store}").status_code == 404
    assert service.client().get(f"/v1/activations/{store}").json()["state"] == "sealed"


# ---------------------------------------------------------------------------------------------- jobs


def test_submit_read_list_and_cancel(service: Service) -> None:
    client = service.client()
    answer = client.post("/v1/jobs", json={"spec": service.harvest(), "name": "first", "priority": 3})
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["name"], job["priority"], job["attempt"]) == ("queued", "first", 3, 0)
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    assert client.get("/v1/jobs?kind=harvest&state=queued").json()["items"] == [job]
    assert client.get("/v1/jobs?kind=train").json()["items"] == []
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"


def test_training_makes_its_harvest(service: Service) -> None:
    job = service.submit(service.train())
    store = service.client().get("/v1/activations").json()["items"][0]
    assert job.depends_on == (store["job_id"],)
    assert store["state"] == "harvesting"
    assert store["location"] == f"file://{service.settings.home}/store/projects/default/activations/{store['id']}"


def test_a_job_is_paused_changed_and_resumed(service: Service) -> None:
    client = service.client()
    job = service.submit(service.harvest())
    paused = client.post(f"/v1/jobs/{job.id}/pause").json()
    assert (paused["state"], paused["paused_by"].split(" ")[-1]) == ("queued", f"({service.key.split('_')[1]})")
    changed = client.patch(f"/v1/jobs/{job.id}", json={"job_class": "spare", "priority": -5}).json()
    assert (changed["job_class"], changed["priority"]) == ("spare", -5)
    assert client.post(f"/v1/jobs/{job.id}/resume").json()["paused_by"] is None
    client.post(f"/v1/jobs/{job.id}/cancel")
    expect_problem(client.post(f"/v1/jobs/{job.id}/pause"), 409, "job_ended")
    expect_problem(client.patch(f"/v1/jobs/{job.id}", json={"priority": 1}), 409, "job_ended")


@pytest.mark.parametrize("change", [{"priority": 101}, {"job_class": "now"}, {"colour": 1}])
def test_a_change_that_can_never_be_changes_nothing(service: Service, change: dict[str, Any]) -> None:
    job = service.submit(service.harvest())
    assert service.client().patch(f"/v1/jobs/{job.id}", json=change).status_code == 422
    assert service.client().get(f"/v1/jobs/{job.id}").json()["priority"] == 0


def test_urgent_needs_an_admin(service: Service) -> None:
    client = service.client(service.new_key(scopes=("write",)))
    expect_problem(
        client.post("/v1/jobs", json={"spec": service.harvest(), "job_class": "urgent"}), 403, "class_not_allowed"
    )
    assert service.count_jobs() == 0
    job = service.submit(service.harvest())
    expect_problem(client.patch(f"/v1/jobs/{job.id}", json={"job_class": "urgent"}), 403, "class_not_allowed")
    assert service.client().patch(f"/v1/jobs/{job.id}", json={"job_class": "urgent"}).status_code == 200


def test_a_project_is_held_and_the_cluster_drained(service: Service) -> None:
    client = service.client()
    assert client.get("/v1/project").json()["held_by"] is None
    assert client.patch("/v1/project", json={"is_held": True}).json()["held_by"]
    assert client.patch("/v1/project", json={"is_held": False}).json()["held_by"] is None
    assert client.patch("/v1/cluster", json={"is_drained": True}).json()["drained_by"]
    assert client.patch("/v1/cluster", json={"is_drained": False}).json()["drained_by"] is None
    expect_problem(client.patch("/v1/cluster/nodes/none", json={"is_drained": True}), 404, "node_not_found")


def test_idempotency_key(service: Service) -> None:
    headers = {"Idempotency-Key": "abc"}
    first = service.submit(service.harvest(), **headers)
    (service.inputs / "text.txt").unlink()
    assert service.submit(service.harvest(), **headers).id == first.id
    answer = service.client().post("/v1/jobs", json={"spec": service.train()}, headers=headers)
    expect_problem(answer, 409, "idempotency_conflict")
    assert service.count_jobs() == 1


def test_without_a_dispatcher_jobs_say_so(service: Service) -> None:
    job = service.submit(service.harvest())
    shown = service.client().get(f"/v1/jobs/{job.id}")
    assert shown.json()["queue"]["code"] == "no_dispatcher"
    assert "no dispatcher was ever seen" in shown.json()["queue"]["message"]
    Observations(service.bench.database).note(None)
    again = service.client().get(f"/v1/jobs/{job.id}", headers={"If-None-Match": shown.headers["etag"]})
    assert again.status_code == 200, "the answer is another"
    assert again.json()["queue"] is None


def test_an_etag_spares_the_answer_until_something_changes(service: Service) -> None:
    job = service.submit(service.harvest())
    client, path = service.client(), f"/v1/jobs/{job.id}"
    tag = client.get(path).headers["etag"]
    assert client.get(path, headers={"If-None-Match": tag}).status_code == 304
    held = service.bench.claim()
    assert client.get(path, headers={"If-None-Match": tag}).json()["state"] == "running"
    tag = client.get(path).headers["etag"]
    service.bench.leases.renew(held.lease)
    assert client.get(path, headers={"If-None-Match": tag}).status_code == 304


def test_pages_hold_every_job_once_newest_first(service: Service) -> None:
    made = [service.bench.submit(store=number).id for number in range(7)]
    client, found, cursor = service.client(), [], ""
    while True:
        page = client.get(f"/v1/jobs?limit=3{cursor}").json()
        found += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert found == sorted(made, reverse=True)


@pytest.mark.parametrize("cursor", ["x", "%00", "é", "JyBPUiAxPTE", "a" * 300])
def test_a_bad_cursor_is_refused(service: Service, cursor: str) -> None:
    code = "invalid_request" if len(cursor) > 256 else "invalid_cursor"
    for kind in ("jobs", "activations", "dictionaries"):
        expect_problem(service.client().get(f"/v1/{kind}?cursor={cursor}"), 422, code)


@pytest.mark.parametrize("odd", ["a%00b", "%ff%fe", "%F0%28%8C%28", "..", "a%20b", "a" * 65, "%ed%a0%80"])
def test_an_odd_id_in_a_path_is_refused_before_the_database_sees_it(service: Service, odd: str) -> None:
    paths = [(method, path) for method, path in routes_of(service) if "_id}" in path]
    assert len(paths) >= 9
    for method, path in paths:
        filled = re.sub(r"\{\w+_id\}", odd, path).replace("{name}", "cfg.json")
        answer = service.client().request(method, filled)
        assert answer.status_code in (404, 405, 422), (method, filled, answer.status_code)


@pytest.mark.parametrize("query", ["limit=0", "limit=1000000", "limit=x", "state=lost"])
def test_bad_queries_are_refused(service: Service, query: str) -> None:
    expect_problem(service.client().get(f"/v1/jobs?{query}"), 422, "invalid_request")


# ---------------------------------------------------------------------------------------------- events


def test_events_page_by_page(service: Service) -> None:
    job = service.bench.seal()
    client = service.client()
    page = client.get(f"/v1/jobs/{job.id}/events?limit=3").json()
    assert [item["id"] for item in page["items"]] == [1, 2, 3]
    rest = client.get(f"/v1/jobs/{job.id}/events?after={page['next_cursor']}").json()
    assert [item["data"]["to"] for item in rest["items"]] == ["succeeded"]
    assert rest["next_cursor"] is None


def test_the_stream_ends_after_the_last_event_and_resumes_anywhere(service: Service) -> None:
    job = service.bench.seal()
    path = f"/v1/jobs/{job.id}/events"
    for last in (None, 0, 2, 4):
        headers = {"Accept": "text/event-stream"} | ({} if last is None else {"Last-Event-ID": str(last)})
        answer = service.client().get(path, headers=headers)
        assert answer.headers["content-type"].startswith("text/event-stream")
        ids = [int(line[4:]) for line in answer.text.splitlines() if line.startswith("id: ")]
        assert ids == list(range((last or 0) + 1, 5))


def test_a_bad_last_event_id_is_refused(service: Service) -> None:
    job = service.bench.seal()
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "x; DROP"}
    expect_problem(service.client().get(f"/v1/jobs/{job.id}/events", headers=headers), 422, "invalid_cursor")


# ---------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("spec.activation.k", {"activation": {"kind": "topk", "k": 0}}),
        ("spec.activation.kk", {"activation": {"kind": "topk", "kk": 1}}),
        ("spec.activation", {"activation": {"k": 4}}),
        ("spec.activation.kind", {"activation": {"kind": "softmax"}}),
        ("spec.colour", {"colour": "red"}),
        ("spec.token_budget", {"token_budget": "many"}),
        ("spec.activations.hooks.0", {"activations": {"hooks": ["a b"]}}),
        ("spec", {"activation": {"kind": "topk", "k": 49}}),
        ("spec", {"mesh": {"features": 7}}),
    ],
)
def test_bad_fields_are_named_as_the_user_wrote_them(service: Service, path: str, change: dict[str, Any]) -> None:
    spec = service.train(**change)
    if "activations" in change:
        spec["activations"] = service.harvest(**change["activations"])
    problem = expect_problem(service.client().post("/v1/jobs", json={"spec": spec}), 422, "invalid_spec")
    assert path in problem["detail"]
    assert service.count_jobs() == 0


@pytest.mark.parametrize("case", WRONG)
def test_the_service_says_of_a_spec_what_the_sdk_says(service: Service, case: str) -> None:
    change, says = WRONG[case]
    answer = service.client().post("/v1/jobs", json={"spec": TRAIN | change})
    assert expect_problem(answer, 422, "invalid_spec")["detail"].startswith(f"spec.{says}")


def test_fields_beside_the_spec_are_refused_too(service: Service) -> None:
    answer = service.client().post("/v1/jobs", json={"spec": service.harvest(), "owner": "me"})
    assert expect_problem(answer, 422, "invalid_spec")["errors"][0]["path"] == "owner"
    answer = service.client().post("/v1/keys", json={"name": "k", "scope": ["read"]})
    assert "scope is not a field; did you mean 'scopes'?" in expect_problem(answer, 422, "invalid_spec")["detail"]


def test_a_transcoder_with_alignment_is_refused_by_name(service: Service) -> None:
    spec = service.train(hook_name="model.layers.1", target_hook_name="model.layers.0")
    expect_problem(service.client().post("/v1/jobs", json={"spec": spec}), 422, "transcoder_alignment")
    absent = spec | {"alignment": "none", "target_hook_name": "model.layers.9"}
    expect_problem(service.client().post("/v1/jobs", json={"spec": absent}), 422, "unknown_hook")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"spec": NaN}', b'"\xed\xa0\x80"', b"[1" + b"0" * 5000])
def test_bodies_that_are_no_json_are_refused(service: Service, body: bytes) -> None:
    answer = service.client().post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_two_megabytes_are_too_much_however_they_are_sent(service: Service) -> None:
    body = json.dumps({"spec": service.harvest(), "name": "x" * 2 * 2**20}).encode()
    headers = {"Content-Type": "application/json"}
    client = service.client()
    expect_problem(client.post("/v1/jobs", content=body, headers=headers), 413, "payload_too_large")
    pieces = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    expect_problem(client.post("/v1/jobs", content=pieces, headers=headers), 413, "payload_too_large")


def test_deep_nesting_is_refused_and_brackets_in_strings_are_not(service: Service) -> None:
    client, headers = service.client(), {"Content-Type": "application/json"}
    deep = b'{"spec":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    expect_problem(client.post("/v1/jobs", content=deep, headers=headers), 422, "json_too_deep")
    answer = client.post("/v1/jobs", json={"spec": service.harvest(), "name": '[{"' * 20})
    assert answer.status_code == 201, answer.text


def test_a_flood_of_quotes_is_scanned_in_time(service: Service) -> None:
    body = b'"' + b'\\"' * 500_000
    headers = {"Content-Type": "application/json"}
    assert service.client().post("/v1/jobs", content=body, headers=headers).status_code in (400, 422)


# ---------------------------------------------------------------------------------------------- errors


def test_absent_routes_and_methods_are_problems(service: Service) -> None:
    expect_problem(service.client().get("/v1/nothing"), 404, "no_such_route")
    expect_problem(service.client().delete("/v1/jobs"), 405, "method_not_allowed")


def test_an_unexpected_error_tells_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("gnomon_service.db.reads.list_jobs", fail)
    answer = service.client().get("/v1/jobs")
    expect_problem(answer, 500, "internal")
    assert "secret" not in answer.text


def test_a_locked_database_is_a_503(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job = service.submit(service.harvest())
    impatient = Database(service.settings.database_url, busy_timeout_s=0.0)
    monkeypatch.setattr(service.app.state.services.queue, "_database", impatient)
    with service.bench.database.write():
        answer = service.client().post(f"/v1/jobs/{job.id}/cancel")
    impatient.close()
    expect_problem(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"] == "1"


# ---------------------------------------------------------------------------------------------- files


def publish(service: Service, files: dict[str, bytes] | None = None) -> tuple[str, str]:
    """Train a dictionary that has these files in storage; returns its id and its store's."""
    files = files or {"cfg.json": b"{}"}
    service.bench.seal(store=7)
    service.bench.submit(train_spec(activations=stored(7)), store=7)
    held = service.bench.claim()
    location = f"{service.settings.project_root}/default/dictionaries/{held.dictionary_id}"
    for name, content in files.items():
        Location.open(location).child(name).write_bytes(content)
    sizes = {name: len(content) for name, content in files.items()}
    record = DICTIONARY_RECORD | {"location": location, "files": sizes}
    service.bench.leases.succeed(held.lease, {"records": [record]})
    assert held.dictionary_id is not None
    return held.dictionary_id, held.store_id


def test_files_are_streamed_whole(service: Service) -> None:
    content = bytes(range(256)) * (9 * 2**12)
    dictionary_id, _ = publish(service, {"sae_weights.safetensors": content, "cfg.json": b"{}"})
    answer = service.client().get(f"/v1/dictionaries/{dictionary_id}/files/sae_weights.safetensors")
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name", ["absent", "..%2Fcfg.json", "../cfg.json", "%2Fetc%2Fpasswd", "cfg.json%00", "cfg.json/", ".", "CFG.JSON"]
)
def test_only_listed_files_are_given(service: Service, name: str) -> None:
    dictionary_id, _ = publish(service)
    answer = service.client().get(f"/v1/dictionaries/{dictionary_id}/files/{name}")
    assert answer.status_code == 404, answer.text


def test_a_dictionary_is_deleted_shown_as_such_and_restored(service: Service) -> None:
    dictionary_id, _ = publish(service)
    client, path = service.client(), f"/v1/dictionaries/{dictionary_id}"
    gone = client.delete(path)
    assert (gone.status_code, gone.json()["state"]) == (202, "deleting")
    assert gone.json()["deleted_why"].startswith("deleted by test (")
    assert client.get(f"{path}/files/cfg.json").status_code == 200
    spec = {"kind": "evaluate", "dictionary": dictionary_id}
    expect_problem(client.post("/v1/jobs", json={"spec": spec}), 409, "dictionary_deleted")
    found = client.get("/v1/collection").json()
    (upcoming,) = (each for each in found["upcoming"] if each["kind"] == "dictionary")
    assert (upcoming["id"], upcoming["at"]) == (dictionary_id, client.get(path).json()["purge_at"])
    assert found["removed"] == [] and service.client(service.new_key("other")).get("/v1/collection").json() == {
        "collected_at": None, "upcoming": [], "removed": [],
    }  # fmt: skip
    assert client.post(f"{path}/restore").json()["state"] == "published"


def test_of_a_dictionary_whose_files_are_gone_it_is_said(service: Service) -> None:
    dictionary_id, _ = publish(service)
    with service.bench.database.write() as connection:
        begin_dictionary_deletion(connection, "default", dictionary_id, why="by ann", grace_s=0.0)
    Collector(service.bench.database, service.settings.project_root).collect()
    client, path = service.client(), f"/v1/dictionaries/{dictionary_id}"
    assert client.get(path).json()["state"] == "deleted"
    expect_problem(client.get(f"{path}/files/cfg.json"), 409, "dictionary_deleted")
    expect_problem(client.post(f"{path}/restore"), 409, "dictionary_deleted")
    (removed,) = client.get("/v1/collection").json()["removed"]
    assert (removed["kind"], removed["id"], removed["why"]) == ("dictionary", dictionary_id, "by ann")
    assert removed["n_bytes"] > 0


def test_a_listed_file_that_is_gone_is_a_404(service: Service) -> None:
    dictionary_id, _ = publish(service)
    Location.open(service.settings.project_root).delete()
    answer = service.client().get(f"/v1/dictionaries/{dictionary_id}/files/cfg.json")
    assert answer.status_code == 404


# ---------------------------------------------------------------------------------------------- health


def test_health_readiness_and_metrics(service: Service) -> None:
    service.submit(service.harvest())
    public = service.client("")
    assert public.get("/healthz").json() == {"status": "ok"}
    assert public.get("/readyz").json() == {
        "status": "ready",
        "database": "ok",
        "store": "ok",
        "dispatcher": "never seen",
        "dispatcher_age_s": None,
    }
    metrics = service.client().get("/metrics").text
    assert 'gnomon_jobs{kind="harvest",state="queued"} 1.0' in metrics
    assert 'gnomon_requests_total{method="POST",route="/v1/jobs",status="201"} 1.0' in metrics


def test_it_is_told_when_a_dispatcher_was_last_seen(service: Service) -> None:
    Observations(service.bench.database).note(ClusterSnapshot(nodes=()))
    fresh = service.client("").get("/readyz").json()
    assert fresh["dispatcher"] == "ok" and 0 <= fresh["dispatcher_age_s"] < 30
    with service.bench.database.write() as connection:
        connection.execute(update(cluster).values(dispatcher_at=database_now() - 100))
    stale = service.client("").get("/readyz").json()
    assert stale["dispatcher_age_s"] == pytest.approx(100, abs=20)
    assert stale["dispatcher"] == f"not seen for {stale['dispatcher_age_s']:.0f} s"


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (Unavailable("read again", code="still_reading", so_far_s=3), logging.INFO),
        (Unavailable("too many", code="busy"), logging.INFO),
        (Unavailable("the database broke", code="database_unavailable"), logging.ERROR),
        (StoreUnavailable("no answer"), logging.ERROR),
        (GnomonError("a fault"), logging.ERROR),
    ],
)
def test_only_faults_of_the_service_are_logged_with_their_trace(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: GnomonError,
    level: int,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(service.app.state.services.inspector, "harvest", fail)
    caplog.set_level(logging.INFO)
    answer = service.client().post("/v1/jobs", json={"spec": service.harvest()})
    assert (answer.status_code, answer.json()["code"]) == (error.status, error.code)
    (record,) = [record for record in caplog.records if record.name == "gnomon_service.rest.problems"]
    assert (record.levelno, record.exc_info is not None) == (level, level == logging.ERROR)


def test_a_store_that_is_gone_makes_the_service_not_ready(service: Service) -> None:
    (service.settings.home / "store").rmdir()
    answer = service.client("").get("/readyz")
    assert (answer.status_code, answer.json()["store"]) == (503, "unavailable")


def test_a_full_disk_makes_the_service_not_ready(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_root, "LEAST_FREE_BYTES", 1 << 62)
    answer = service.client("").get("/readyz")
    assert (answer.status_code, answer.json()["store"]) == (503, "full")


def test_a_store_that_hangs_stops_nobody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask whether the service is ready, one thread waits, and all else is answered."""
    opened = threading.Event()
    n_waiting: list[int] = []

    def hang(_: Any) -> str:
        n_waiting.append(1)
        opened.wait()
        return "ok"

    monkeypatch.setattr(health, "_store_state", hang)
    monkeypatch.setattr(health, "_CHECK_S", 2.0)

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=service.app)
        headers = {"Authorization": f"Bearer {service.key}"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            waiting = [asyncio.create_task(client.get("/readyz")) for _ in range(100)]
            await asyncio.sleep(0)
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/v1/jobs")).status_code == 200
            assert not any(task.done() for task in waiting)
            answers = await asyncio.gather(*waiting)
            opened.set()
            return answers

    answers = asyncio.run(ask())
    assert {(answer.status_code, answer.json()["store"]) for answer in answers} == {(503, "unavailable")}
    assert len(n_waiting) == 1


def test_methods_that_nobody_knows_are_one_label(service: Service) -> None:
    for number in range(20):
        service.client("").request(f"METHOD{number}", "/healthz")
    metrics = service.client().get("/metrics").text
    assert "METHOD" not in metrics
    assert 'method="other"' in metrics


def test_a_body_of_many_items_is_refused_before_they_are_looked_at(service: Service) -> None:
    body = b"[" + b"1," * 400_000 + b"1]"
    answer = service.client().post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    expect_problem(answer, 413, "payload_too_large")
