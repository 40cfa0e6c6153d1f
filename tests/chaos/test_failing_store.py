"""An object store that fails some of its requests: jobs end by themselves, at their first attempt, to the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import pytest
from sqlalchemy import select

from gnomon.errors import StoreUnavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import activation_stores, dictionaries
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.dispatch.garbage import Rules
from gnomon_storage.location import Location
from tests.chaos.counts import count, tell
from tests.chaos.history import check
from tests.chaos.live import Live, Trained, live_service
from tests.chaos.reading import read_history
from tests.support.failing_store import FailingStore
from tests.support.seaweed import environment, new_place, s3_server
from tests.support.waiting import wait_until

SHARES: Final = (0.05, 0.1, 0.5)
N_STEPS, EVERY = 120, 20
N_LARGE: Final = 12 << 20
"""Bytes of an object that is put in parts."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingStore]:
    """An S3 server, and a way to it on which requests fail once they are told to."""
    with (
        s3_server(tmp_path_factory.mktemp("weed")) as variables,
        FailingStore(variables["AWS_ENDPOINT_URL"]) as between,
        environment(variables | {"AWS_ENDPOINT_URL": between.url}),
    ):
        yield between


@pytest.fixture(scope="module")
def live(store: FailingStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = new_place()
    Location.open(root).child("ready").write_bytes(b"")  # makes the bucket, as an operator would
    with live_service(tmp_path_factory.mktemp("home"), storage_root=root) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(live: Live) -> Trained:
    """A run of which no request failed."""
    return live.trained(live.finish(live.submit(n_steps=N_STEPS, every=EVERY)))


@pytest.mark.parametrize("share", (0.05, 0.1, 0.2))  # with half of all, one request in 500 fails nine times in a row
def test_what_is_asked_of_a_store_that_fails_requests_is_done_once(store: FailingStore, share: float) -> None:
    """A write of which the answer was lost is not taken for another writer's; nobody above has to ask again."""
    root, large = Location.open(new_place()), os.urandom(N_LARGE)
    n_rounds = count(10, 30, 300)
    with store.failing(share):
        for number in range(n_rounds):
            _use(root.child(str(number)))
        for _ in range(max(1, n_rounds // 10)):
            root.child("large").write_bytes(large)
            assert root.child("large").read_bytes() == large
        assert store.n_failed > 0
        tell(share=share, rounds=n_rounds, **store.counts())


@pytest.mark.parametrize("share", SHARES)
def test_jobs_outlast_a_store_that_fails_requests(
    store: FailingStore, live: Live, undisturbed: Trained, share: float
) -> None:
    """Harvest, training, checkpoints, evaluation, publication and what users delete and load, all through it."""
    for _ in range(count(1, 1, 10)):
        with store.failing(share):
            live.forget_harvest()
            job = live.finish(live.submit(n_steps=N_STEPS, every=EVERY))
            trained = live.trained(job)
            counts = store.counts()
        harvest = live.finish(job.depends_on[0])
        n_waits = live.n_waits(harvest.id, job.id)
        n_orphans = _collect(store, live, share)
        tell(share=share, **counts, jobs=2, attempts=harvest.attempt + job.attempt, waits=n_waits, orphans=n_orphans)
        assert [(each.attempt, each.n_losses) for each in (harvest, job)] == [(1, 0)] * 2
        assert trained == undisturbed
        assert sorted(trained.losses) == list(range(1, N_STEPS + 1))
        assert counts["failed"] > 0
        assert n_orphans == 0


def _use(folder: Location) -> None:
    """Each thing that is asked of a store, with what is to be seen of it."""
    made, written = folder.child("made"), folder.child("written")
    assert [made.create_bytes(b"1"), made.create_bytes(b"2")] == [True, False]
    written.write_bytes(b"12345678")
    assert (made.read_bytes(), written.read_range(2, 5)) == (b"1", b"345")
    assert (folder.list(), folder.walk()) == (["made", "written"], {"made": 1, "written": 8})
    made.delete()
    assert (made.exists(), written.exists()) == (False, True)
    folder.delete()
    assert folder.walk() == {}


def _collect(store: FailingStore, live: Live, share: float) -> int:
    """Let the collector work on that store; returns how many files are there to which nothing refers."""
    database = Database(live.settings.database_url)
    collector = Collector(database, live.settings.project_root, Rules(settled_s=0.0))

    def is_done() -> bool:
        with suppress(StoreUnavailable):  # the next turn finds the same
            return collector.collect() == []
        return False

    with store.failing(share):
        wait_until(is_done, "the end of collecting")
    check(read_history(database))
    kept = [f"{place}/" for place in _referred_to(database)]
    database.close()
    projects = live.settings.project_root
    files = [f"{projects}/{name}" for name in Location.open(projects).walk()]
    assert all(any(file.startswith(place) for file in files) for place in kept), "what is referred to has gone"
    return sum(not file.startswith(tuple(kept)) for file in files)


def _referred_to(database: Database) -> list[str]:
    """Where the stores and dictionaries lie that are kept."""
    with database.read() as connection:
        sealed = select(activation_stores.c.location).where(activation_stores.c.state == "sealed")
        kept = select(dictionaries.c.location).where(dictionaries.c.state == "published")
        return [*connection.execute(sealed).scalars(), *connection.execute(kept).scalars()]
