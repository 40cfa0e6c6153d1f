"""A queue that a service of the next release works on as well: its jobs are listed, shown and left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from gnomon.resources import Event, Job, Page
from gnomon.specs import HarvestSpec, UnknownSpec
from gnomon_service.db.tables import jobs
from gnomon_service.jobs.transitions import add_events
from tests.support.service_api import Service, running_service

NEWER: list[dict[str, Any]] = [{"kind": "study", "question": "does it hold?"}, {"kind": "harvest", "dtype": "float4"}]


def rewrite(service: Service, job: Job, **values: Any) -> None:
    """Change a job's row as a newer release would have written it."""
    with service.bench.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))


def shown(service: Service, job: Job) -> Job:
    """The job as REST shows it, which must be the same in the list."""
    one = service.client().get(f"/v1/jobs/{job.id}")
    page = service.client().get("/v1/jobs")
    assert (one.status_code, page.status_code) == (200, 200), page.text
    found = {each.id: each for each in Page[Job].read(page.content).items}
    assert found[job.id] == Job.read(one.content)
    return found[job.id]


def test_a_job_with_one_more_field_is_listed_shown_and_claimed(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        job = service.submit(service.harvest())
        stored = job.model_dump(mode="json")["spec"]
        rewrite(service, job, spec={**stored, "curriculum": 1, "model": {**stored["model"], "adapter": "x"}})
        found = shown(service, job)
        assert isinstance(found.spec, HarvestSpec) and found.spec == job.spec
        held = service.bench.claim_next("dispatcher")
        assert held is not None and held.lease.job_id == job.id
        assert held.spec["curriculum"] == 1, "the workers must see what they do not know, to say so"


@pytest.mark.parametrize("spec", NEWER)
def test_a_job_that_cannot_be_read_is_listed_and_shown_as_it_is(tmp_path: Path, spec: dict[str, Any]) -> None:
    with running_service(tmp_path) as service:
        job = service.submit(service.harvest())
        rewrite(service, job, spec=spec, kind=spec["kind"])
        found = shown(service, job)
        assert isinstance(found.spec, UnknownSpec) and found.spec.fields == spec and found.kind == spec["kind"]


def test_a_kind_that_only_the_next_release_knows_is_left_to_its_dispatcher(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        job = service.submit(service.harvest())
        rewrite(service, job, spec=NEWER[0], kind="study")
        assert service.bench.claim_next("dispatcher") is None
        assert shown(service, job).state == "queued"


def test_an_event_of_the_next_release_is_listed_as_it_is(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        job = service.submit(service.harvest())
        with service.bench.database.write() as connection:
            add_events(connection, jobs.c.id == job.id, [("moved", {"to": "another cluster"})])
        page = Page[Event].read(service.client().get(f"/v1/jobs/{job.id}/events").content)
        assert [(each.kind, each.data) for each in page.items][1:] == [("moved", {"to": "another cluster"})]
