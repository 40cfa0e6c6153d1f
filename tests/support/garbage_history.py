"""A model of what must not be deleted: jobs come and go, users delete, time passes, deletions are cut off."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import RowMapping, select, update

from gnomon.errors import Conflict, StoreUnavailable
from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import activation_stores, dictionaries, jobs
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.dispatch.garbage import DAY_S, Rules
from gnomon_service.jobs import deletions
from gnomon_service.jobs.held import HeldJob
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import publish
from tests.support.schemas import emptied_postgresql, empty_sqlite
from tests.support.service_jobs import DICTIONARY_RECORD, PROJECT, STORE_RESULT, Bench, store_id, stored, train_spec
from tests.support.writing_cluster import sealed_store

RULES: Final = Rules(resumable_days=30.0, store_days=60.0, settled_s=0.0)
STORES: Final = (1, 2)
VERBS: Final = (
    *("submit", "work", "work", "work", "work", "claim", "save", "succeed", "fail", "lose", "cancel", "resume"),
    *("release", "lose", "publish_and_die"),
    *("delete_store", "delete_dictionary", "restore_dictionary", "wait", "collect", "collect", "cut_off", "cut_off"),
)
DAYS: Final = st.sampled_from([1.0, 29.0, 31.0, 61.0])


class GarbageHistory(RuleBasedStateMachine):
    """After every step all that is referred to is there; at the end, with all of it given up, nothing is."""

    reached: ClassVar[Counter[str]] = Counter()
    """How often anything happened, in all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name)
        self.database = self.open_database()
        root = f"file://{self.home}/projects"
        self.layout = ProjectLayout.of(root, PROJECT)
        self.bench = Bench(self.database, projects=root)
        self.collector = Collector(self.database, root, RULES)

    def open_database(self) -> Database:
        """An empty database."""
        return Database(empty_sqlite(self.home))

    def close_database(self) -> None:
        """Leave nothing of it."""
        self.database.close()

    @initialize()
    def begin(self) -> None:
        self.held: dict[str, HeldJob] = {}
        self.saved: dict[str, Path] = {}
        """What each job saved last: it is there as long as the job goes on, or may be resumed."""

    @rule(data=st.data(), verb=st.sampled_from(VERBS))
    def do(self, data: st.DataObject, verb: str) -> None:
        """Rules of their own would be left out by most examples."""
        getattr(self, verb)(data)
        self.reached.update([verb])

    # ------------------------------------------------------------------------------------------ jobs

    def submit(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(STORES))
        is_there = self.store_state(number) == "sealed"
        try:
            self.bench.submit(train_spec(activations=stored(number)) if is_there else None, store=number)
        except Conflict as error:
            assert (error.code, self.store_state(number)) == ("store_deleting", "deleting")

    def claim(self, data: st.DataObject) -> None:
        self.bench.release()
        held = self.bench.claim_next()
        if held is not None:
            self.bench.leases.mark_running(held.lease)
            self.held[held.lease.job_id] = held

    def work(self, data: st.DataObject) -> None:
        """What single steps come to too rarely: something is begun, saved and ended."""
        if not self.held:
            self.submit(data)
            self.claim(data)
        self.save(data)
        getattr(self, data.draw(st.sampled_from(["succeed", "succeed", "succeed", "fail"])))(data)

    def save(self, data: st.DataObject) -> None:
        if held := self.draw_held(data):
            self.saved[held.lease.job_id] = self.write_something(held)

    def write_something(self, held: HeldJob) -> Path:
        attempt = f"a{held.lease.attempt:04d}"
        if held.kind == "train":
            place = self.layout.checkpoints(held.lease.job_id).child(f"step-00000001.{attempt}", "manifest.json")
        else:
            place = self.layout.store(held.store_id).child("segments", f"part-00099.{attempt}.zarr", "zarr.json")
        place.write_bytes(b"x" * 10)
        path = place.local_path()
        assert path is not None
        return path

    def succeed(self, data: st.DataObject) -> None:
        held = self.draw_held(data)
        if held is None:
            return
        if held.kind == "harvest":
            shutil.copytree(sealed_store(), self.path_of("activations", held.store_id), dirs_exist_ok=True)
            self.bench.leases.succeed(held.lease, STORE_RESULT)
        else:
            self.bench.leases.succeed(held.lease, {"records": [self.publish(held)]})
        self.saved.pop(held.lease.job_id, None)
        del self.held[held.lease.job_id]

    def publish(self, held: HeldJob) -> dict[str, object]:
        assert held.dictionary_id is not None
        dictionary = self.layout.dictionary(held.dictionary_id)
        dictionary.child("attempt-0000", "sae_weights.safetensors").write_bytes(b"x")  # of one that was lost
        local = self.home / "local"
        local.mkdir(exist_ok=True)
        (local / "cfg.json").write_text("{}")
        return publish(dictionary.child(f"attempt-{held.lease.attempt:04d}"), local, DICTIONARY_RECORD)

    def fail(self, data: st.DataObject) -> None:
        if held := self.draw_held(data):
            self.bench.leases.fail(held.lease, code="x", message="x")
            del self.held[held.lease.job_id]

    def publish_and_die(self, data: st.DataObject) -> None:
        """The dictionary is there, and nobody was told."""
        if (held := self.draw_held(data)) and held.kind == "train":
            self.publish(held)
            self.bench.leases.fail(held.lease, code="x", message="x")
            del self.held[held.lease.job_id]

    def release(self, data: st.DataObject) -> None:
        self.bench.release()

    def lose(self, data: st.DataObject) -> None:
        if held := self.draw_held(data):
            self.bench.leases.lose(held.lease, "x")
            del self.held[held.lease.job_id]

    def cancel(self, data: st.DataObject) -> None:
        for job_id in self.draw_job(data):
            self.bench.queue.cancel(PROJECT, job_id)
            if held := self.held.pop(job_id, None):
                self.bench.leases.cancelled(held.lease)

    def resume(self, data: st.DataObject) -> None:
        for job_id in self.draw_job(data):
            state, leftovers = self.row(job_id)["state"], self.row(job_id)["leftovers"]
            try:
                self.bench.queue.resume(PROJECT, job_id)
            except Conflict as error:
                codes = {"store_deleted", "store_deleting", "store_in_use"}
                codes |= {"job_succeeded"} if state == "succeeded" else set()
                codes |= {"leftovers_deleting"} if leftovers == "deleting" else set()
                assert error.code in codes
                assert error.code != "store_deleted" or self.may_lack_its_store(job_id)
                continue
            if leftovers == "deleted":
                self.saved.pop(job_id, None)
                self.reached.update(["begun anew"])

    # ------------------------------------------------------------------------------------------ users and time

    def delete_store(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(STORES))
        if self.store_state(number) is None:
            return
        try:
            with self.database.write() as connection:
                deletions.begin_store_deletion(connection, PROJECT, store_id(number), why="by ann")
            assert not self.users_of(store_id(number))
        except Conflict:
            assert self.users_of(store_id(number))

    def delete_dictionary(self, data: st.DataObject) -> None:
        for dictionary_id in self.draw_dictionary(data):
            grace_s = data.draw(st.sampled_from([0.0, 5 * DAY_S]))
            with self.database.write() as connection:
                deletions.begin_dictionary_deletion(connection, PROJECT, dictionary_id, why="by ann", grace_s=grace_s)

    def restore_dictionary(self, data: st.DataObject) -> None:
        for dictionary_id in self.draw_dictionary(data):
            try:
                with self.database.write() as connection:
                    deletions.restore_dictionary(connection, PROJECT, dictionary_id)
            except Conflict as error:
                assert error.code == "dictionary_deleted"

    def wait(self, data: st.DataObject) -> None:
        """Let days pass: for what ended, and what is to go."""
        self.let_pass(data.draw(DAYS))

    def let_pass(self, days: float) -> None:
        with self.database.write() as connection:
            for table, names in (
                (jobs, ("created_at", "finished_at")),
                (activation_stores, ("created_at",)),
                (dictionaries, ("purge_at",)),
            ):
                connection.execute(update(table).values({name: table.c[name] - days * DAY_S for name in names}))

    def collect(self, data: st.DataObject) -> None:
        removed = self.collector.collect()
        self.reached.update(f"{each.garbage.kind} deleted" for each in removed)
        self.forget_what_may_go()

    def cut_off(self, data: st.DataObject) -> None:
        """The store goes away after so many deletions, or before the first."""
        n_left = data.draw(st.integers(0, 2))
        self.wait(data)
        delete = Location.delete

        def fail_at_last(self: Location) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise StoreUnavailable("the store is away")
            delete(self)

        Location.delete = fail_at_last  # type: ignore[method-assign]
        try:
            self.collector.collect()
        except StoreUnavailable:
            self.reached.update(["was cut off"])
        finally:
            Location.delete = delete  # type: ignore[method-assign]
        self.forget_what_may_go()

    def forget_what_may_go(self) -> None:
        """What ended so long ago that it could go; whether it has gone, the end will show."""
        with self.database.read() as connection:
            now = connection.execute(select(database_now())).scalar_one()
        for job_id in list(self.saved):
            row = self.row(job_id)
            is_old = row["state"] in TERMINAL_STATES and row["finished_at"] < now - RULES.resumable_days * DAY_S
            if is_old or (row["kind"] == "harvest" and not self.is_resumable(row)):
                del self.saved[job_id]

    def is_resumable(self, row: RowMapping) -> bool:
        """Whether a harvest makes its store, or may go on with it."""
        return self.store_of(row) in ("harvesting", "failed") and self.maker_of(row) == row["id"]

    def may_lack_its_store(self, job_id: str) -> bool:
        """Whether a user deleted the store, or this job ended too long ago to be resumed."""
        row = self.row(job_id)
        with self.database.read() as connection:
            now = connection.execute(select(database_now())).scalar_one()
            why = select(activation_stores.c.deleted_why).where(activation_stores.c.id == row["store_id"])
            is_by_user = connection.execute(why).scalar() == "by ann"
        return is_by_user or row["finished_at"] < now - RULES.resumable_days * DAY_S

    # ------------------------------------------------------------------------------------------ what must hold

    @invariant()
    def all_that_is_referred_to_is_there(self) -> None:
        for job_id, path in self.saved.items():
            assert path.exists(), f"{path} of {dict(self.row(job_id))}"
        with self.database.read() as connection:
            stores = connection.execute(select(activation_stores)).mappings().all()
            kept = connection.execute(select(dictionaries)).mappings().all()
            now = connection.execute(select(database_now())).scalar_one()
        for store in stores:
            if store["state"] == "sealed":
                assert (self.path_of("activations", store["id"]) / "manifest.json").exists(), dict(store)
        for dictionary in kept:
            is_kept = dictionary["state"] == "deleting" and dictionary["purge_at"] > now
            if dictionary["state"] == "published" or is_kept:
                place = Location.open(dictionary["location"]).child("cfg.json")
                assert place.exists(), dict(dictionary)

    @invariant()
    def what_may_be_resumed_has_its_store_unless_a_user_took_it(self) -> None:
        stores = activation_stores
        statement = (
            select(stores.c.state, stores.c.deleted_why)
            .join(jobs, jobs.c.store_id == stores.c.id)
            .where(jobs.c.kind == "train", jobs.c.state.in_(("failed", "cancelled")), jobs.c.attempt > 0)
            .where(jobs.c.finished_at > database_now() - RULES.resumable_days * DAY_S)
        )
        with self.database.read() as connection:
            for state, why in connection.execute(statement):
                is_made_anew = state in ("harvesting", "failed")  # after a user deleted it
                assert state == "sealed" or is_made_anew or why == "by ann", (state, why)

    def teardown(self) -> None:
        """Give everything up, and collect: nothing is left, though deletions were cut off in every place."""
        with self.database.read() as connection:
            live = connection.execute(select(jobs.c.id).where(jobs.c.state.not_in(TERMINAL_STATES))).scalars().all()
        for job_id in live:
            self.bench.queue.cancel(PROJECT, job_id)
            if held := self.held.pop(job_id, None):
                self.bench.leases.cancelled(held.lease)
        self.bench.release()
        with self.database.read() as connection:
            made = connection.execute(select(dictionaries.c.id)).scalars().all()
        for dictionary_id in made:
            with self.database.write() as connection:
                deletions.begin_dictionary_deletion(connection, PROJECT, dictionary_id, why="end", grace_s=0.0)
        for _ in range(2):  # a store is kept as long as a job that needs it may be resumed
            self.let_pass(100.0)
            self.collector.collect()
        left = sorted(self.layout.root.walk()) if (self.home / "projects").exists() else []
        assert left == [], left
        self.close_database()
        self.folder.cleanup()

    # ------------------------------------------------------------------------------------------ looking

    def draw_held(self, data: st.DataObject) -> HeldJob | None:
        job_ids = sorted(self.held)
        return self.held[data.draw(st.sampled_from(job_ids))] if job_ids else None

    def draw_job(self, data: st.DataObject) -> list[str]:
        with self.database.read() as connection:
            found = connection.execute(select(jobs.c.id).order_by(jobs.c.created_at, jobs.c.id)).scalars().all()
        return [found[data.draw(st.integers(0, len(found) - 1))]] if found else []

    def draw_dictionary(self, data: st.DataObject) -> list[str]:
        with self.database.read() as connection:
            found = connection.execute(select(dictionaries.c.id).order_by(dictionaries.c.id)).scalars().all()
        return [found[data.draw(st.integers(0, len(found) - 1))]] if found else []

    def row(self, job_id: str) -> RowMapping:
        with self.database.read() as connection:
            return connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()

    def store_state(self, number: int) -> str | None:
        with self.database.read() as connection:
            state = select(activation_stores.c.state).where(activation_stores.c.id == store_id(number))
            return connection.execute(state).scalar()

    def store_of(self, row: RowMapping) -> str:
        with self.database.read() as connection:
            state = select(activation_stores.c.state).where(activation_stores.c.id == row["store_id"])
            return str(connection.execute(state).scalar_one())

    def maker_of(self, row: RowMapping) -> str:
        with self.database.read() as connection:
            maker = select(activation_stores.c.job_id).where(activation_stores.c.id == row["store_id"])
            return str(connection.execute(maker).scalar_one())

    def users_of(self, store: str) -> list[str]:
        with self.database.read() as connection:
            return list(connection.execute(select(jobs.c.id).where(deletions.uses_store(PROJECT, store))).scalars())

    def path_of(self, *names: str) -> Path:
        return self.home / "projects" / PROJECT / Path(*names)


class GarbageHistoryOnPostgreSQL(GarbageHistory):
    """The same on PostgreSQL."""

    def open_database(self) -> Database:
        return emptied_postgresql()

    def close_database(self) -> None:
        pass
