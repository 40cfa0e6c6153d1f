"""Dispatchers and collectors that are killed at any moment: what is referred to stays, and nothing else is left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select

from gnomon.errors import Conflict
from gnomon_service.db.tables import activation_stores, dictionaries
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.dispatch.garbage import DAY_S, Rules
from gnomon_service.jobs.deletions import begin_dictionary_deletion, begin_store_deletion
from gnomon_storage.location import Location
from tests.chaos.conftest import migrate
from tests.chaos.counts import count, tell
from tests.chaos.scene import N_BETWEEN_DRAINS, Scene, counts_of, scene_of
from tests.support.chaos_children import pause_at_random
from tests.support.databases import DIALECTS, fresh_database
from tests.support.service_jobs import PROJECT
from tests.support.waiting import wait_until
from tests.support.working_cluster import Habits
from tests.support.writing_cluster import WritingCluster

KEPT_S = 0.5
RULES = Rules(resumable_days=KEPT_S / DAY_S, settled_s=0.0)


@pytest.fixture(params=DIALECTS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """One whose cluster writes to a store."""
    with fresh_database(request.param, tmp_path) as url:
        migrate(url)
        with scene_of(url, tmp_path, cluster=WritingCluster(Habits(p_lost=0.2, p_failed=0.2), tmp_path)) as made:
            yield made


def test_after_kills_everything_that_is_referred_to_is_there_and_nothing_else(scene: Scene) -> None:
    wanted, n_cut_off, n_deleted = count(5, 40, 200), 0, 0
    for n_kills in range(1, wanted + 1):
        submit_some(scene)
        dispatcher, collector = scene.new_dispatcher(), scene.new_collector(KEPT_S)
        while not scene.n_held():
            submit_some(scene)
            time.sleep(0.02)
        n_deleted += delete_something(scene)
        pause_at_random(1.0)
        dispatcher.kill()
        collector.kill()
        n_cut_off += n_in_the_middle(scene)
        if n_kills % N_BETWEEN_DRAINS == 0:
            scene.drain()
            assert missing(scene) == []
    history = scene.drain()
    assert missing(scene) == []
    collector_of_all = Collector(scene.bench.database, scene.bench.projects, RULES)
    wait_until(lambda: collector_of_all.collect() == [] and not orphans(scene), lambda: orphans(scene)[:9], every_s=0.2)
    tell(
        kills=2 * wanted,
        deletions_begun_by_users=n_deleted,
        cut_off=n_cut_off,
        objects_saved=cluster_of(scene).n_saved,
        orphans=len(orphans(scene)),
        live_objects_removed=len(missing(scene)),
        **counts_of(scene, history),
    )
    assert missing(scene) == []
    assert n_deleted > 0


def submit_some(scene: Scene) -> None:
    """Send requests, of which one may come to a store that is being deleted, and is then refused."""
    for _ in range(4):
        with suppress(Conflict):
            scene.submit(1)


def delete_something(scene: Scene) -> int:
    """As a user does, to a store and a dictionary; returns to how many."""
    n_deleted = 0
    with scene.bench.database.read() as connection:
        sealed = select(activation_stores.c.id).where(activation_stores.c.state == "sealed")
        stores = connection.execute(sealed).scalars().all()
        kept = select(dictionaries.c.id).where(dictionaries.c.state == "published")
        published = connection.execute(kept).scalars().all()
    for store in random.sample(stores, min(1, len(stores))):
        with suppress(Conflict), scene.bench.database.write() as connection:
            n_deleted += begin_store_deletion(connection, PROJECT, store, why="by ann")
    for dictionary in random.sample(published, min(1, len(published))):
        with scene.bench.database.write() as connection:
            begin_dictionary_deletion(connection, PROJECT, dictionary, why="by ann", grace_s=0.0)
        n_deleted += 1
    return n_deleted


def n_in_the_middle(scene: Scene) -> int:
    """Deletions that have begun, and have not ended."""
    with scene.bench.database.read() as connection:
        begun = select(activation_stores.c.id).where(activation_stores.c.state == "deleting")
        return len(connection.execute(begun).scalars().all())


def missing(scene: Scene) -> list[str]:
    """What the database refers to, and is not there."""
    return [place.url for place in referred_to(scene) if not place.exists()]


def orphans(scene: Scene) -> list[str]:
    """Files that nothing in the database refers to."""
    folders = [place.url.rpartition("/")[0] + "/" for place in referred_to(scene)]
    root = cluster_of(scene).layout.root
    files = [f"{root.url}/{name}" for name in root.walk()]
    spare = [file for file in files if "/part-00099." in file]  # no manifest of a sealed store names these
    return [file for file in files if not file.startswith(tuple(folders))] + spare


def referred_to(scene: Scene) -> list[Location]:
    """The last document of each thing that is kept."""
    layout = cluster_of(scene).layout
    with scene.bench.database.read() as connection:
        sealed = select(activation_stores.c.id).where(activation_stores.c.state == "sealed")
        stores = [layout.store(each).child("manifest.json") for each in connection.execute(sealed).scalars()]
        kept = select(dictionaries.c.location).where(dictionaries.c.state == "published")
        published = [Location.open(each).child("gnomon.json") for each in connection.execute(kept).scalars()]
    return stores + published


def cluster_of(scene: Scene) -> WritingCluster:
    assert isinstance(scene.cluster, WritingCluster)
    return scene.cluster
