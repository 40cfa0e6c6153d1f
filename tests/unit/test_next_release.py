"""Documents of another release: one of the next is listed and shown by this one, those of 0.1 are read by all after.

What is written is strict, what is read is lenient: a field, a kind or a state that this release does not know is
passed over or kept unread, and never an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import gnomon
from gnomon import _command_parts, cli
from gnomon.events import EVENTS, UnknownEvent, read_event
from gnomon.resources import Event, Job
from gnomon.specs import HarvestSpec, JobRequest, TrainSpec, UnknownSpec
from gnomon.specs.base import unread_fields
from gnomon_storage.manifest import parse_commit, parse_manifest
from tests.support.sdk_server import HARVEST, HARVEST_RESULT, JOB_ID, Script, answer, client_of, event, job, sse

GOLDEN = Path(__file__).parents[1] / "golden/0.1"
READERS: dict[str, Callable[[Any], Any]] = {
    "job": gnomon.Job.read,
    "dictionary": gnomon.DictionaryRecord.read,
    "activation_store": gnomon.ActivationStoreRecord.read,
    "harvest_spec": HarvestSpec.read,
    "train_spec": TrainSpec.read,
    "harvest_result": gnomon.HarvestResult.read,
    "train_result": gnomon.TrainResult.read,
    "evaluate_result": gnomon.EvaluateResult.read,
}


def golden(name: str) -> Any:
    """A document as release 0.1 wrote it."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


FREE = {"times_s", "tokens_per_s", "fvu_by_hook", "result"}
"""Objects whose names are free."""


def grown(data: Any) -> Any:
    """The document with one more field in every object of a fixed form, however deep it lies."""
    if isinstance(data, dict):
        fields = {name: value if name in FREE else grown(value) for name, value in data.items()}
        return {**fields, "of_the_next_release": {"x": [1]}}
    return [grown(item) for item in data] if isinstance(data, list) else data


@pytest.mark.parametrize("name", READERS)
def test_documents_of_the_first_release_are_read_whole(name: str) -> None:
    data = golden(name)
    document = READERS[name](data)
    assert not list(unread_fields(data, document.model_dump(mode="json")))


@pytest.mark.parametrize("name", ["job", "harvest_spec", "train_spec"])
def test_one_more_field_anywhere_changes_nothing_of_what_is_read(name: str) -> None:
    data = golden(name)
    document = READERS[name](grown(data))
    assert document == READERS[name](data)
    assert "of_the_next_release" in set(unread_fields(grown(data), document.model_dump(mode="json")))


def test_events_of_the_first_release_are_read_as_their_kinds() -> None:
    for data in golden("events"):
        told = Event.read(data).told
        assert type(told) is EVENTS[data["kind"]]
        assert Event.read(grown(data)).told == told
    assert {data["kind"] for data in golden("events")} == set(EVENTS)


def test_manifests_are_read_by_the_next_release_and_of_it() -> None:
    manifest, commit = golden("manifest"), golden("segment_commit")
    for read, data in ((parse_manifest, manifest), (parse_commit, commit)):
        assert isinstance(read(json.dumps(data).encode(), "golden"), BaseModel)


def test_what_users_submit_stays_strict() -> None:
    with pytest.raises(ValidationError, match="of_the_next_release"):
        JobRequest.model_validate({"spec": grown(HARVEST)})


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "study", "spec": {"kind": "study", "question": "does it hold?"}},
        {"spec": {**HARVEST, "dtype": "float4"}},
        {"state": "paused"},
        {"result": {**HARVEST_RESULT, "of_the_next_release": 1}, "state": "succeeded"},
    ],
)
def test_jobs_of_the_next_release_are_listed_and_shown(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = job(**changes)
    script = Script(answer({"items": [known]}), answer(known), answer(known))
    monkeypatch.setattr(_command_parts, "Client", lambda _: client_of(script))
    for line in ("jobs", f"job {JOB_ID}", f"job {JOB_ID} --json"):
        assert cli.run(line.split()) == 0
    shown = capsys.readouterr().out
    assert shown.count(JOB_ID) == 3
    assert str(changes.get("state") or changes["spec"]["kind"]) in shown


def test_a_spec_that_cannot_be_read_is_kept_as_it_is() -> None:
    spec = {"kind": "study", "question": "does it hold?"}
    found = Job.read(job(kind="study", spec=spec))
    assert isinstance(found.spec, UnknownSpec)
    assert found.model_dump(mode="json")["spec"] == spec


def test_events_of_the_next_release_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = [event(1, "moved", to="another cluster"), event(2, "progress", phase="merge", parts=3)]
    script = Script(answer({"items": story}))
    monkeypatch.setattr(_command_parts, "Client", lambda _: client_of(script))
    assert cli.run(["logs", JOB_ID, "--all"]) == 0
    shown = capsys.readouterr().out
    assert "to=another cluster" in shown and "parts=3" in shown
    assert [type(Event.read(each).told) for each in story] == [UnknownEvent, UnknownEvent]


def test_watching_goes_on_over_events_of_the_next_release(capsys: pytest.CaptureFixture[str]) -> None:
    running, done = job(state="running"), job(state="succeeded", result=HARVEST_RESULT)
    story = [event(1, "moved", to="x"), event(2, "state", **{"from": "running", "to": "succeeded", "why": "done"})]
    client = client_of(Script(answer(running), answer(running), sse(*story), answer(done)))
    assert client.job(JOB_ID).wait(progress=True).n_rows == HARVEST_RESULT["n_rows"]  # type: ignore[union-attr]


def test_what_an_event_tells_is_never_lost() -> None:
    data = {"phase": 3}
    assert read_event("phase", data) == UnknownEvent(fields=deepcopy(data))
