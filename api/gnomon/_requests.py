"""Every call of the REST API as a value: what to send and how to read the answer; no I/O."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from gnomon.errors import InvalidRequest
from gnomon.plans import JobPlan
from gnomon.resources import (
    ActivationStoreRecord,
    ApiKey,
    ClusterState,
    Collection,
    DictionaryRecord,
    Event,
    Job,
    JobKind,
    JobState,
    NewApiKey,
    Page,
    ProjectState,
)
from gnomon.specs import EvaluateSpec, HarvestSpec, JobRequest, TrainSpec
from gnomon.specs.problems import explain
from gnomon.specs.request import JobChange, JobClass

T = TypeVar("T")
PAGE_SIZE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Generic[T]):
    """One HTTP request and the reader of its answer."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    parse: Callable[[bytes], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Any = None
    """JSON-serialisable body, None for none."""
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = True
    """Sending it twice does what sending it once does, so it may be repeated when the answer is lost."""


Flow = Generator[Request[Any], Any, T]
"""Several requests in a row: yields each one, is sent its answer, returns the result."""


class SubmitOptions(TypedDict, total=False):
    """What may be said about a job beside its spec; see JobRequest."""

    name: str | None
    priority: int | None
    job_class: JobClass | None
    max_attempts: int | None
    deadline_s: int | None
    idempotency_key: str | None


_KEY = re.compile(r"[\x21-\x7e]{1,255}")
Submittable = HarvestSpec | TrainSpec | EvaluateSpec | JobRequest | Mapping[str, Any]
"""A spec, a whole request, or either as a mapping."""


def submit(spec: Submittable, options: SubmitOptions) -> Request[Job]:
    """POST /v1/jobs; always with an Idempotency-Key, so that a lost answer can be asked for again."""
    fields = {name: value for name, value in options.items() if value is not None}
    key = _checked_key(str(fields.pop("idempotency_key", uuid.uuid4().hex)))
    body = job_request(spec, fields).model_dump(mode="json")
    headers = {"Idempotency-Key": key}
    return Request(method="POST", path="/v1/jobs", parse=Job.read, body=body, headers=headers)


def _checked_key(key: str) -> str:
    """A text that a header can carry; raises InvalidRequest."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"idempotency_key={key[:80]!r}, wanted 1 to 255 visible ASCII characters without spaces; send another, for "
            "instance a hash of it",
            code="invalid_idempotency_key",
        )
    return key


def plan(spec: Submittable) -> Request[JobPlan]:
    """POST /v1/plans; changes nothing, so it may be repeated."""
    body = job_request(spec, {}).model_dump(mode="json")
    return Request(method="POST", path="/v1/plans", parse=JobPlan.read, body=body)


def job_request(spec: Submittable, options: Mapping[str, Any]) -> JobRequest:
    """Body of POST /v1/jobs; options replace what a whole request says. Raises InvalidRequest."""
    if isinstance(spec, JobRequest):
        fields: dict[str, Any] = spec.model_dump(exclude_unset=True) | {"spec": spec.spec}
    elif isinstance(spec, Mapping) and "spec" in spec:
        fields = dict(spec)
    else:
        fields = {"spec": spec}
    fields |= options
    try:
        return JobRequest.model_validate(fields)
    except ValidationError as error:
        # of a spec alone, paths are those in the spec
        below = "" if isinstance(spec, Mapping) and "spec" in spec else "spec"
        raise InvalidRequest(explain(error, fields, JobRequest, below=below)) from error


def job(job_id: str) -> Request[Job]:
    """GET /v1/jobs/{id}."""
    return Request(method="GET", path=_path("jobs", job_id), parse=Job.read)


def cancel(job_id: str) -> Request[Job]:
    """POST /v1/jobs/{id}/cancel; cancelling twice is harmless."""
    return Request(method="POST", path=_path("jobs", job_id, "cancel"), parse=Job.read)


def resume(job_id: str) -> Request[Job]:
    """POST /v1/jobs/{id}/resume; harmless while the job has not ended."""
    return Request(method="POST", path=_path("jobs", job_id, "resume"), parse=Job.read)


def pause(job_id: str) -> Request[Job]:
    """POST /v1/jobs/{id}/pause; pausing twice is harmless."""
    return Request(method="POST", path=_path("jobs", job_id, "pause"), parse=Job.read)


def change(job_id: str, job_class: JobClass | None, priority: int | None) -> Request[Job]:
    """PATCH /v1/jobs/{id}; raises InvalidRequest where the values can never be."""
    fields = {"job_class": job_class, "priority": priority}
    try:
        body = JobChange.model_validate(fields).model_dump(exclude_none=True)
    except ValidationError as error:
        raise InvalidRequest(explain(error, fields, JobChange)) from error
    return Request(method="PATCH", path=_path("jobs", job_id), parse=Job.read, body=body)


def changed(job: Job, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a job, with some fields changed."""
    return _merged(job.spec.model_dump(mode="json"), changes)


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(old)
    for name, value in changes.items():
        before = old.get(name)
        if (
            isinstance(value, Mapping)
            and isinstance(before, Mapping)
            and value.get("kind") in (None, before.get("kind"))
        ):
            new[name] = _merged(before, value)
        else:  # of another kind than before it has other fields
            new[name] = value
    return new


def jobs(*, state: JobState | None, kind: JobKind | None, limit: int | None) -> Flow[list[Job]]:
    """GET /v1/jobs, newest first."""
    filters = {name: value for name, value in (("state", state), ("kind", kind)) if value is not None}
    return _collect(_path("jobs"), Page[Job], limit, filters)


def events(job_id: str, after: int) -> Flow[list[Event]]:
    """GET /v1/jobs/{id}/events: what has happened so far."""
    found: list[Event] = []
    while True:
        page: Page[Event] = yield Request(
            method="GET",
            path=_path("jobs", job_id, "events"),
            parse=Page[Event].read,
            params={"after": found[-1].id if found else after, "limit": PAGE_SIZE},
        )
        found += page.items
        if not page.items or (page.next_cursor is None and len(page.items) < PAGE_SIZE):
            return found


def event_stream(job_id: str, after: int) -> Request[None]:
    """GET /v1/jobs/{id}/events as a stream of server-sent events."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    return Request(method="GET", path=_path("jobs", job_id, "events"), parse=_nothing, headers=headers)


def activations(limit: int | None) -> Flow[list[ActivationStoreRecord]]:
    """GET /v1/activations, newest first."""
    return _collect(_path("activations"), Page[ActivationStoreRecord], limit)


def activation_store(store_id: str) -> Request[ActivationStoreRecord]:
    """GET /v1/activations/{id}."""
    path = _path("activations", store_id)
    return Request(method="GET", path=path, parse=ActivationStoreRecord.read)


def dictionaries(limit: int | None) -> Flow[list[DictionaryRecord]]:
    """GET /v1/dictionaries, newest first."""
    return _collect(_path("dictionaries"), Page[DictionaryRecord], limit)


def dictionary(dictionary_id: str) -> Request[DictionaryRecord]:
    """GET /v1/dictionaries/{id}."""
    path = _path("dictionaries", dictionary_id)
    return Request(method="GET", path=path, parse=DictionaryRecord.read)


def dictionary_file(dictionary_id: str, name: str, headers: Mapping[str, str]) -> Request[None]:
    """GET /v1/dictionaries/{id}/files/{name}; the body is the file, or the part that the headers ask for."""
    path = _path("dictionaries", dictionary_id, "files", name)
    return Request(method="GET", path=path, parse=_nothing, headers=headers)


def keys(limit: int | None) -> Flow[list[ApiKey]]:
    """GET /v1/keys."""
    return _collect(_path("keys"), Page[ApiKey], limit)


def create_key(name: str, scopes: tuple[str, ...], expires_in_s: int | None) -> Request[NewApiKey]:
    """POST /v1/keys; not repeated when the answer is lost, for that would leave a key nobody knows."""
    body = {"name": name, "scopes": list(scopes), "expires_in_s": expires_in_s}
    return Request(method="POST", path="/v1/keys", parse=NewApiKey.read, body=body, idempotent=False)


def revoke_key(key_id: str) -> Request[None]:
    """DELETE /v1/keys/{id}."""
    return Request(method="DELETE", path=_path("keys", key_id), parse=_nothing)


def delete_activations(store_id: str) -> Request[None]:
    """DELETE /v1/activations/{id}."""
    return Request(method="DELETE", path=_path("activations", store_id), parse=_nothing)


def delete_dictionary(dictionary_id: str) -> Request[DictionaryRecord]:
    """DELETE /v1/dictionaries/{id}."""
    return Request(method="DELETE", path=_path("dictionaries", dictionary_id), parse=DictionaryRecord.read)


def restore_dictionary(dictionary_id: str) -> Request[DictionaryRecord]:
    """POST /v1/dictionaries/{id}/restore."""
    return Request(method="POST", path=_path("dictionaries", dictionary_id, "restore"), parse=DictionaryRecord.read)


def collection() -> Request[Collection]:
    """GET /v1/collection."""
    return Request(method="GET", path=_path("collection"), parse=Collection.read)


def cluster() -> Request[ClusterState]:
    """GET /v1/cluster."""
    return Request(method="GET", path="/v1/cluster", parse=ClusterState.read)


def drain(node_id: str | None, *, is_drained: bool) -> Request[ClusterState]:
    """PATCH /v1/cluster, or that of one of its nodes."""
    path = _path("cluster") if node_id is None else _path("cluster", "nodes", node_id)
    return Request(method="PATCH", path=path, parse=ClusterState.read, body={"is_drained": is_drained})


def project() -> Request[ProjectState]:
    """GET /v1/project."""
    return Request(method="GET", path=_path("project"), parse=ProjectState.read)


def hold(*, is_held: bool) -> Request[ProjectState]:
    """PATCH /v1/project."""
    return Request(method="PATCH", path=_path("project"), parse=ProjectState.read, body={"is_held": is_held})


def _collect(
    path: str, page_type: type[Page[T]], limit: int | None, filters: Mapping[str, str] | None = None
) -> Flow[list[T]]:
    """All items of a list, page by page, up to a limit."""
    found: list[T] = []
    cursor: str | None = None
    while limit is None or len(found) < limit:
        size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
        params: dict[str, str | int] = {**(filters or {}), "limit": size}
        if cursor is not None:
            params["cursor"] = cursor
        page: Page[T] = yield Request(method="GET", path=path, parse=page_type.read, params=params)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _nothing(_: bytes) -> None:
    return None
