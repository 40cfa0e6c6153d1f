"""SDK and CLI against the real API: in process through the transport seam, and over a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gnomon import cli, errors
from gnomon.async_client import AsyncClient
from gnomon.client import Client
from gnomon.specs import HarvestSpec, TrainSpec
from gnomon_service.app import make_app
from gnomon_service.settings import load_settings
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.serving import serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """An API without a dispatcher: jobs stay queued."""

    url: str
    key: str
    app: Any
    harvest: HarvestSpec


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The API on a socket, with a key, a model and a text."""
    home = tmp_path_factory.mktemp("api")
    inputs = home / "inputs"
    inputs.mkdir()
    make_glassllm(inputs / "model")
    make_corpus(inputs / "corpus.jsonl", n_documents=50)
    app = make_app(load_settings(home=home, input_roots=(str(inputs),), poll_s=0.05))
    key = app.state.services.keys.create(project="default", name="test", scopes=("admin",)).key
    harvest = {
        "model": {"source": str(inputs / "model")},
        "text": [{"url": str(inputs / "corpus.jsonl")}],
        "hooks": ["model.layers.1"],
        "token_budget": 4096,
    }
    with serving(app) as url:
        yield Api(url=url, key=key, app=app, harvest=HarvestSpec.model_validate(harvest))


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    """A client over the socket."""
    with Client(api.url, api.key) as client:
        yield client


def test_job_is_submitted_listed_followed_and_cancelled(api: Api, client: Client) -> None:
    handle = client.submit(api.harvest, name="mine")
    assert handle.state == "queued"
    assert handle.id in {job.id for job in client.jobs(state="queued", kind="harvest")}
    canceller = threading.Timer(0.2, lambda: client.cancel(handle.id))
    canceller.start()
    events = list(handle.events(follow=True))
    canceller.join()
    assert [event.data.get("to") for event in events if event.kind == "state"][-1] == "cancelled"
    assert [event.id for event in handle.events()] == [event.id for event in events]
    with pytest.raises(errors.JobFailed, match="was cancelled"):
        handle.wait()


def test_train_job_waits_for_the_harvest_inside_it(api: Api, client: Client) -> None:
    train = TrainSpec(activations=api.harvest, d_sae=256, token_budget=4096, batch_size=512)
    handle = client.submit(train)
    (harvest,) = handle.job.depends_on
    assert client.job(harvest).job.kind == "harvest"
    with pytest.raises(TimeoutError):
        handle.wait(timeout_s=0.3)
    handle.cancel()


def test_same_idempotency_key_is_the_same_job(api: Api, client: Client) -> None:
    first = client.submit(api.harvest, idempotency_key="once")
    assert client.submit(api.harvest, idempotency_key="once").id == first.id
    with pytest.raises(errors.Conflict):
        client.submit(api.harvest, name="other", idempotency_key="once")
    first.cancel()


def test_lists_are_paged_through(api: Api, client: Client) -> None:
    submitted = [client.submit(api.harvest, name=str(number)).id for number in range(5)]
    ids = [job.id for job in client.jobs(limit=None)]
    assert len(ids) == len(set(ids))
    assert ids[:5] == submitted[::-1]
    assert [job.id for job in client.jobs(limit=3)] == ids[:3]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"hooks": ["model.layers.9"]}, "unknown_hook", "model.layers.3"),
        ({"model": {"source": "/etc"}}, "location_not_allowed", "/etc"),
    ],
)
def test_refusals_arrive_with_their_code(
    api: Api, client: Client, change: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=words) as caught:
        client.submit(api.harvest.model_dump() | change)
    assert caught.value.code == code


@pytest.mark.parametrize("key", [None, "gnm_wrong_key"])
def test_without_a_good_key_nothing_is_told(api: Api, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_HOME", "/nonexistent")
    with Client(api.url, key) as stranger, pytest.raises(errors.Unauthenticated):
        stranger.jobs()


def test_keys_are_made_used_and_revoked(api: Api, client: Client) -> None:
    made = client.create_key("reader", scopes=("read",), expires_in_s=3600)
    known = client.keys()
    assert made.id in {key.id for key in known}
    with Client(api.url, made.key) as reader:
        reader.jobs()
        with pytest.raises(errors.Forbidden):
            reader.submit(api.harvest)
        client.revoke_key(made.id)
        with pytest.raises(errors.Unauthenticated):
            reader.jobs()


@pytest.mark.parametrize("call", ["job", "activation_store", "dictionary", "cancel", "revoke_key"])
def test_absent_things_are_not_found(client: Client, call: str) -> None:
    with pytest.raises(errors.NotFound):
        getattr(client, call)("nothing")


def test_cluster_is_unknown_until_a_dispatcher_has_seen_it(client: Client) -> None:
    assert client.cluster().seen_at is None


def test_async_client_runs_against_the_application_in_process(api: Api) -> None:
    async def run() -> None:
        transport = httpx2.ASGITransport(app=api.app)
        async with AsyncClient("http://service", api.key, transport=transport) as client:
            handle = await client.submit(api.harvest)
            assert (await client.cancel(handle.id)).state == "cancelled"
            events = [event async for event in handle.events(follow=True)]
            assert events[-1].data["to"] == "cancelled"
            assert [event.id async for event in handle.events()] == [event.id for event in events]

    asyncio.run(run())


def test_command_line_over_the_socket(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GNOMON_URL", api.url)
    monkeypatch.setenv("GNOMON_API_KEY", api.key)
    spec = tmp_path / "spec.json"
    spec.write_text(api.harvest.model_dump_json())
    assert cli.run(["submit", str(spec), "--name", "by hand"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert cli.run(["jobs", "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "by hand"
    assert cli.run(["cancel", job_id]) == 0
    assert cli.run(["watch", job_id]) == 1
    assert "was cancelled" in capsys.readouterr().err
    assert cli.run(["logs", job_id, "--follow"]) == 0
    assert "cancelled" in capsys.readouterr().out.splitlines()[-1]
