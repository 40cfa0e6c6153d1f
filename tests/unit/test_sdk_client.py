"""Requests, answers, repeats and errors of the SDK."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from typing import Any

import httpx2
import pytest
import stamina
from pydantic import BaseModel

import gnomon
import gnomon.events
import gnomon.metrics
import gnomon.plans
import gnomon.resources
import gnomon.specs
from gnomon import _http, errors
from gnomon._http import translated_errors
from gnomon.async_client import AsyncClient, AsyncJobHandle, AsyncRemoteDictionary
from gnomon.client import Client, JobHandle, RemoteDictionary
from gnomon.errors import InvalidRequest
from gnomon.specs import HarvestSpec, JobRequest
from tests.support.sdk_server import HARVEST, JOB_ID, KEY, NOW, URL, Script, answer, client_of, event, job, problem


@pytest.fixture(autouse=True)
def no_backoff() -> Any:
    """Repeats happen at once."""
    stamina.set_testing(True, attempts=4, cap=True)
    yield
    stamina.set_testing(False)


def test_submit_sends_the_spec_the_key_and_an_idempotency_key() -> None:
    script = Script(answer(job(), 201))
    handle = client_of(script).submit(HarvestSpec.model_validate(HARVEST), name="first", priority=3)
    request = script.requests[0]
    body = json.loads(request.content)
    assert (request.method, request.url.path) == ("POST", "/v1/jobs")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert len(request.headers["Idempotency-Key"]) == 32
    assert (body["name"], body["priority"], body["spec"]["hooks"]) == ("first", 3, ["model.layers.1"])
    assert (handle.id, handle.state) == (JOB_ID, "queued")


@pytest.mark.parametrize("key", ["schlüssel", "two words", "", "k" * 256, "new\nline", "\ud800", "key\x7f"])
def test_an_idempotency_key_that_no_header_carries_is_refused_before_it_is_sent(key: str) -> None:
    script = Script(answer(job(), 201))
    with pytest.raises(InvalidRequest, match="wanted 1 to 255 visible ASCII characters") as caught:
        client_of(script).submit(HARVEST, idempotency_key=key)
    assert caught.value.code == "invalid_idempotency_key"
    assert not script.requests


def test_two_submits_have_two_idempotency_keys_unless_told() -> None:
    script = Script(*[answer(job(), 201) for _ in range(3)])
    client = client_of(script)
    client.submit(HARVEST)
    client.submit(HARVEST)
    client.submit(HARVEST, idempotency_key="mine")
    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


@pytest.mark.parametrize(
    "spec",
    [
        HARVEST,
        {"spec": HARVEST, "priority": 5},
        JobRequest.model_validate({"spec": HARVEST, "priority": 5}),
    ],
)
def test_specs_requests_and_mappings_are_all_taken(spec: Any) -> None:
    script = Script(answer(job(), 201))
    client_of(script).submit(spec, name="n")
    body = json.loads(script.requests[0].content)
    assert body["name"] == "n"
    assert body["priority"] == (0 if spec is HARVEST else 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hooks": []}, "hooks"),
        ({"colour": "red"}, "colour"),
        ({"kind": "bake"}, "harvest"),
        ({"token_budget": 1}, "token_budget"),
    ],
)
def test_spec_that_can_never_work_is_not_sent(change: dict[str, Any], words: str) -> None:
    script = Script()
    with pytest.raises(errors.InvalidRequest, match=words):
        client_of(script).submit(HARVEST | change)
    assert script.requests == []


@pytest.mark.parametrize(
    "fault",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadError("reset"),
        httpx2.ReadTimeout("slow"),
        problem(503, "unavailable", "starting"),
        httpx2.Response(502, text="<html>bad gateway"),
    ],
)
def test_submit_is_repeated_with_the_same_key_when_the_answer_is_lost(fault: Any) -> None:
    script = Script(fault, fault, answer(job(), 201))
    assert client_of(script).submit(HARVEST).id == JOB_ID
    keys = {request.headers["Idempotency-Key"] for request in script.requests}
    assert len(script.requests) == 3
    assert len(keys) == 1


def test_submit_waits_while_the_service_reads_what_it_names(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than anything else is repeated: a large model takes minutes, and the service does the waiting."""
    monkeypatch.setattr(_http, "READING_PAUSE_S", 0.02)
    reading = [problem(503, "still_reading", "send the same request again", so_far_s=20 * n) for n in range(1, 10)]
    script, began = Script(*reading, answer(job(), 201)), time.monotonic()
    assert client_of(script).submit(HARVEST).id == JOB_ID
    assert time.monotonic() - began >= 9 * 0.02, "an answer at once is not asked for again at once"
    assert len({request.headers["Idempotency-Key"] for request in script.requests}) == 1
    assert script.is_over
    assert caplog.messages == [
        f"the service is still reading the model and text of the request, for {20 * n} s so far; waiting"
        for n in range(1, 10)
    ]


def test_making_a_key_is_repeated_only_if_it_was_never_sent() -> None:
    lost = Script(httpx2.ReadError("reset"))
    with pytest.raises(errors.Unavailable):
        client_of(lost).create_key("k")
    assert lost.is_over
    refused = Script(httpx2.ConnectError("refused"), problem(403, "forbidden", "scope keys is missing"))
    with pytest.raises(errors.Forbidden):
        client_of(refused).create_key("k")
    assert refused.is_over


def test_a_request_too_many_is_sent_again_though_it_may_not_be_repeated() -> None:
    made = answer(
        {"id": "k", "project": "p", "name": "k", "scopes": ["read"], "created_at": NOW, "key": "gnm_k_s"}, 201
    )
    limited = Script(problem(429, "rate_limited", "too many"), made)
    assert client_of(limited).create_key("k").id == "k"
    assert limited.is_over
    quota = Script(problem(429, "quota_exceeded", "no more"))
    with pytest.raises(errors.TooManyRequests):
        client_of(quota).create_key("k")


def test_repeats_end() -> None:
    script = Script(*[httpx2.ConnectError("refused") for _ in range(4)])
    with pytest.raises(errors.Unavailable, match="gnomon up") as caught:
        client_of(script).cluster()
    assert caught.value.code == "unreachable"
    assert script.is_over


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "unauthenticated", errors.Unauthenticated),
        (403, "forbidden", errors.Forbidden),
        (404, "not_found", errors.NotFound),
        (409, "conflict", errors.Conflict),
        (409, "corrupt_artifact", errors.CorruptArtifact),
        (413, "payload_too_large", errors.PayloadTooLarge),
        (422, "unknown_hook", errors.InvalidRequest),
        (429, "too_many_requests", errors.TooManyRequests),
        (500, "internal", errors.GnomonError),
    ],
)
def test_refusals_become_the_error_they_stand_for(status: int, code: str, kind: type[errors.GnomonError]) -> None:
    script = Script(problem(status, code, "because", nearest=["model.layers.1"]))
    with pytest.raises(kind, match="because") as caught:
        client_of(script).job(JOB_ID)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert caught.value.detail == {"nearest": ["model.layers.1"]}


@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(200, text="<html>"),
        httpx2.Response(200, json={"id": 3}),
        httpx2.Response(404, text="nginx"),
        httpx2.Response(302, headers={"Location": "http://elsewhere/"}),
    ],
)
def test_answers_of_something_else_are_no_traceback(response: httpx2.Response) -> None:
    with pytest.raises(errors.GnomonError) as caught:
        client_of(Script(response)).job(JOB_ID)
    assert caught.value.code == "bad_response"


def subclasses(cls: type[Exception]) -> set[type[Exception]]:
    """A class and all below it."""
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(httpx2.RequestError) | {httpx2.InvalidURL}, key=str))
def test_every_error_of_the_http_library_is_translated(kind: type[Exception]) -> None:
    with pytest.raises(errors.GnomonError), translated_errors(URL):
        raise kind("boom")


def test_lists_follow_all_pages_up_to_the_limit() -> None:
    pages = [
        answer({"items": [job(), job()], "next_cursor": "c1"}),
        answer({"items": [job()], "next_cursor": None}),
    ]
    script = Script(*pages)
    assert len(client_of(script).jobs(state="queued", kind="harvest")) == 3
    first, second = (dict(request.url.params) for request in script.requests)
    assert first == {"state": "queued", "kind": "harvest", "limit": "100"}
    assert second["cursor"] == "c1"
    script = Script(answer({"items": [job(), job()], "next_cursor": "c1"}))
    assert len(client_of(script).jobs(limit=2)) == 2
    assert script.is_over


def test_past_events_follow_all_pages() -> None:
    full = answer({"items": [event(i + 1) for i in range(100)]})
    script = Script(full, answer({"items": [event(101)]}))
    found = list(client_of(script).events(JOB_ID))
    assert [e.id for e in found] == list(range(1, 102))
    assert [request.url.params["after"] for request in script.requests] == ["0", "100"]


def test_ids_cannot_leave_their_place_in_the_path() -> None:
    script = Script(problem(404, "not_found", "no"))
    with pytest.raises(errors.NotFound):
        client_of(script).job("../keys?x=1")
    assert script.requests[0].url.raw_path == b"/v1/jobs/..%2Fkeys%3Fx%3D1"


def test_async_client_does_the_same() -> None:
    async def run() -> None:
        script = Script(httpx2.ConnectError("no"), answer(job(), 201), answer({"items": [job()]}))
        async with AsyncClient(URL, KEY, transport=script.transport) as client:
            handle = await client.submit(HARVEST)
            assert handle.id == JOB_ID
            assert len(await client.jobs()) == 1
        assert script.is_over

    asyncio.run(run())


@pytest.mark.parametrize(
    ("blocking", "awaiting"),
    [(Client, AsyncClient), (JobHandle, AsyncJobHandle), (RemoteDictionary, AsyncRemoteDictionary)],
)
def test_both_clients_offer_the_same_calls(blocking: type, awaiting: type) -> None:
    def surface(cls: type) -> dict[str, list[str]]:
        members = ((name, value) for name, value in vars(cls).items() if not name.startswith("_"))
        return {name: list(inspect.signature(value).parameters) if callable(value) else [] for name, value in members}

    assert surface(blocking) == surface(awaiting)


def test_public_names_are_sorted_and_exist() -> None:
    assert gnomon.__all__ == sorted(gnomon.__all__)
    assert all(getattr(gnomon, name) is not None for name in gnomon.__all__)
    assert set(gnomon.__all__) < set(dir(gnomon))
    inner = {"Spec", "Document", "Measured"}
    for module in (gnomon.specs, gnomon.events, gnomon.metrics, gnomon.resources, gnomon.plans):
        models = {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__.startswith("gnomon.")
        }
        assert models - inner - {"Page"} <= set(gnomon.__all__), module.__name__
    public_errors = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert public_errors <= set(gnomon.__all__)


def test_a_plan_is_asked_for_with_the_body_of_a_submit() -> None:
    plan = {"kind": "harvest", "store_id": "act_" + "0" * 32, "reuses": "nothing", "disk": {}, "device": "cpu"}
    script = Script(httpx2.ConnectError("no"), answer(plan | {"n_devices": 4, "a_later_field": 1}))
    found = client_of(script).plan(HARVEST)
    assert (found.kind, found.reuses, found.n_devices, found.chosen) == ("harvest", "nothing", 4, None)
    request = script.requests[1]  # it changes nothing, and was sent again
    assert (request.method, request.url.path) == ("POST", "/v1/plans")
    assert json.loads(request.content)["spec"]["hooks"] == ["model.layers.1"]
    with pytest.raises(errors.InvalidRequest, match="hooks"):
        client_of(Script()).plan({**HARVEST, "hooks": []})


def test_the_async_client_plans_the_same() -> None:
    async def run() -> None:
        plan = {"kind": "train", "store_id": "act_" + "0" * 32, "reuses": "nothing", "disk": {}, "device": "gpu"}
        async with AsyncClient(URL, KEY, transport=Script(answer(plan | {"n_devices": 1})).transport) as client:
            assert (await client.plan(HARVEST)).device == "gpu"

    asyncio.run(run())
