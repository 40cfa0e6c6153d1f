"""A model of one job: what users, dispatchers and stale dispatchers do to it, in any order."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import func, select

from gnomon.errors import Conflict, LeaseLost
from gnomon.resources import TERMINAL_STATES
from gnomon.specs.request import JobChange
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import LEGAL_TRANSITIONS, jobs
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.jobs.held import Lease
from gnomon_service.jobs.steering import Steering
from gnomon_workers.runtime.protocol import ClusterSnapshot, NodeSnapshot
from tests.chaos.history import check
from tests.chaos.reading import HELD, OF_HOLDERS, Sent, read_history
from tests.support.schemas import emptied_postgresql, empty_sqlite
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench

MAX_ATTEMPTS = 3
BY = "ann"
KEY = "once"
CLUSTER: Final = ClusterSnapshot(nodes=(NodeSnapshot(id="n", name="node", n_cpus=2, n_gpus=0),))
WRITES: Final = ("renew", "mark_running", "place", "record", "keep", "succeed", "fail", "cancelled", "lose", "put_back")
OWNERS: Final = st.sampled_from("ab")
IS_LOST: Final = st.sampled_from([False, False, False, True])
"""Whether the answer is."""
VERBS: Final = (
    *("claim", "write", "write", "write", "write", "write_late", "write_late"),
    *("release", "adopt", "leave", "submit_again", "cancel", "resume", "pause"),
    *("change", "hold", "run_again", "run_again", "run_again", "run_again"),
)
"""What happens next; what brings a job on comes more often."""
REPEATABLE: Final = WRITES[:5]
"""Those that may come again, as their answer was lost, and then change nothing."""


class JobHistory(RuleBasedStateMachine):
    """Users, dispatchers and stale dispatchers act on one job in any order, and answers are lost on the way."""

    reached: ClassVar[Counter[str]] = Counter()
    """How often anything happened, in all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.database = self.open_database()
        self.bench = Bench(self.database)
        self.steering = Steering(self.database)

    def open_database(self) -> Database:
        """An empty database."""
        self.folder = tempfile.TemporaryDirectory()
        return Database(empty_sqlite(Path(self.folder.name)))

    def close_database(self) -> None:
        """Leave nothing of it."""
        self.database.close()
        self.folder.cleanup()

    @initialize()
    def submit(self) -> None:
        Observations(self.database).note(CLUSTER)
        self.job_id = self.send()
        self.state, self.attempt, self.holder = "queued", 0, ""
        self.cancel_requested = self.is_unreleased = self.is_held = False
        self.is_paused = self.is_leaving = False
        self.n_losses = 0
        self.leases: list[Lease] = []

    def send(self) -> str:
        """Send the one request, perhaps not for the first time."""
        return self.bench.submit(key=KEY, max_attempts=MAX_ATTEMPTS).id

    def teardown(self) -> None:
        self.reached.update(f"{before} -> {to}" for before, to in pairwise(self.bench.states(self.job_id)))
        self.reached.update([f"attempt {attempt}" for attempt in range(1, self.attempt + 1)])
        check(read_history(self.database, Sent(keys=frozenset({KEY}), answers=((KEY, self.job_id),))))
        self.close_database()

    @property
    def is_ready(self) -> bool:
        return self.state == "queued" and not (self.is_unreleased or self.is_paused or self.is_held)

    @rule(data=st.data(), verb=st.sampled_from(VERBS))
    def do(self, data: st.DataObject, verb: str) -> None:
        """Rules of their own would be left out by most examples: Hypothesis enables some of them at a time."""
        getattr(self, verb)(data)
        self.reached.update([verb])

    # ------------------------------------------------------------------------------------------ dispatchers

    def claim(self, data: st.DataObject) -> None:
        """Whose answer was lost asks again, and finds the job taken: by itself."""
        owner, is_answer_lost = data.draw(OWNERS), data.draw(IS_LOST)
        held = self.bench.claim_next(owner)
        assert (held is not None) == self.is_ready
        if held is not None:
            self.state, self.attempt, self.holder = "scheduled", self.attempt + 1, owner
            if is_answer_lost:
                assert self.bench.claim_next(owner) is None
            else:
                self.leases.append(held.lease)

    def run_again(self, data: st.DataObject) -> None:
        """What single steps come to too rarely: the next attempt, whatever kept the job from it."""
        if self.is_held:
            self.hold(data)
        if self.state != "succeeded":
            self.resume(data)
        self.release(data)
        self.claim(data)
        if self.leases and not self.is_stale(self.leases[-1]):
            self.try_to_write(self.leases[-1], "mark_running", False)

    def adopt(self, data: st.DataObject) -> None:
        """A dispatcher that does not hold what it claimed (the answer was lost) adopts it like any other's."""
        owner, is_held = data.draw(OWNERS), data.draw(st.booleans())
        if self.state in HELD:
            self.bench.let_lease_pass(self.job_id)
        held = self.bench.leases.adopt(owner, [self.job_id] if is_held else [])
        expected = self.state in HELD and not (is_held and self.holder == owner)
        assert bool(held) == expected
        if held:
            self.holder = owner
            self.leases.append(held[0].lease)

    def write(self, data: st.DataObject) -> None:
        """By whoever was given a lease last."""
        if self.leases:
            self.try_to_write(self.leases[-1], data.draw(st.sampled_from(WRITES)), data.draw(IS_LOST))

    def write_late(self, data: st.DataObject) -> None:
        """By one who slept, perhaps while another attempt or owner holds the job."""
        if stale := list(filter(self.is_stale, self.leases)):
            self.reached.update(["stale write"] if self.state in HELD else [])
            self.try_to_write(data.draw(st.sampled_from(stale)), data.draw(st.sampled_from(WRITES)), False)

    def is_stale(self, lease: Lease) -> bool:
        """Whether a lease is not the one that holds the job."""
        return self.state not in HELD or (lease.attempt, lease.owner) != (self.attempt, self.holder)

    def try_to_write(self, lease: Lease, write: str, is_answer_lost: bool) -> None:
        """Write under a lease, perhaps twice."""
        is_current = not self.is_stale(lease)
        legal = is_current and not (write == "succeed" and self.state == "scheduled")
        n_told = len(self.bench.events(self.job_id)) + 1  # a number that no report had before
        try:
            self._write(lease, write, n_told)
        except LeaseLost:
            assert not legal
        else:
            assert legal
            self._expect(write)
            if is_answer_lost:
                self._write_again(lease, write, n_told)

    def release(self, data: st.DataObject) -> None:
        self.bench.release()
        self.is_unreleased = False

    def leave(self, data: st.DataObject) -> None:
        """The scheduler clears the job's node."""
        self.steering.drain_node("n", by=BY)
        Scheduler(self.database).turn(CLUSTER)
        self.steering.drain_node("n", by=None)
        self.is_leaving |= self.state in HELD

    # ------------------------------------------------------------------------------------------ users

    def submit_again(self, data: st.DataObject) -> None:
        assert self.send() == self.job_id
        with self.database.read() as connection:
            assert connection.execute(select(func.count()).select_from(jobs)).scalar_one() == 1

    def cancel(self, data: st.DataObject) -> None:
        self.bench.queue.cancel(PROJECT, self.job_id)
        if self.state == "queued":
            self.state = "cancelled"
        elif self.state in HELD:
            self.cancel_requested = True

    def resume(self, data: st.DataObject) -> None:
        try:
            self.bench.queue.resume(PROJECT, self.job_id)
        except Conflict:
            assert self.state == "succeeded"
            return
        assert self.state != "succeeded"
        self.is_paused = False
        if self.state in ("failed", "cancelled"):
            self.state, self.n_losses, self.cancel_requested = "queued", 0, False

    def pause(self, data: st.DataObject) -> None:
        try:
            self.steering.pause(PROJECT, self.job_id, by=BY)
        except Conflict:
            assert self.state in TERMINAL_STATES
            return
        assert self.state not in TERMINAL_STATES
        self.is_leaving |= self.state in HELD and not self.is_paused
        self.is_paused = True

    def change(self, data: st.DataObject) -> None:
        priority, job_class = data.draw(st.integers(-3, 3)), data.draw(st.sampled_from(["urgent", "normal"]))
        try:
            change = JobChange.model_validate({"priority": priority, "job_class": job_class})
            changed = self.steering.change(PROJECT, self.job_id, change)
        except Conflict:
            assert self.state in TERMINAL_STATES
        else:
            assert (changed.priority, changed.job_class) == (priority, job_class)
            assert self.state not in TERMINAL_STATES

    def hold(self, data: st.DataObject) -> None:
        self.is_held = not self.is_held
        self.steering.hold(PROJECT, by=BY if self.is_held else None)

    # ------------------------------------------------------------------------------------------ what must hold

    @invariant()
    def the_database_agrees(self) -> None:
        job = self.bench.job(self.job_id)
        assert (job.state, job.attempt, job.cancel_requested, job.n_losses) == (
            self.state,
            self.attempt,
            self.cancel_requested,
            self.n_losses,
        )
        events = self.bench.events(self.job_id)
        states = [event.data["to"] for event in events if event.kind == "state"]
        assert states[-1] == self.state
        assert set(pairwise(states)) <= set(LEGAL_TRANSITIONS)
        assert [event.id for event in events] == list(range(1, len(events) + 1))
        expected = {"succeeded": "sealed", "failed": "failed", "cancelled": "failed"}
        assert self.bench.store_row().state == expected.get(self.state, "harvesting")

    @invariant()
    def only_who_holds_the_job_has_places(self) -> None:
        with self.database.read() as connection:
            row = connection.execute(select(jobs)).mappings().one()
        assert (row["paused_by"] is not None, row["leave_why"] is not None) == (self.is_paused, self.is_leaving)
        if self.state in HELD:
            assert (row["lease_owner"], row["places"] is not None) == (self.holder, True)
        else:
            assert [name for name in OF_HOLDERS if row[name] is not None] == []

    def _write(self, lease: Lease, write: str, n_told: int) -> None:
        leases = self.bench.leases
        match write:
            case "succeed":
                leases.succeed(lease, STORE_RESULT)
            case "fail":
                leases.fail(lease, code="x", message="y")
            case "lose" | "put_back":
                getattr(leases, write)(lease, "y")
            case "place":
                leases.place(lease, ["n", "n"])
            case "record":
                leases.record(lease, [(1, "log", {})])
            case "keep":
                leases.record(lease, [(n_told, "checkpoint", {"step": 1, "n_bytes": 1, "copy_s": 0, "duration_s": 0})])
            case _:
                getattr(leases, write)(lease)

    def _write_again(self, lease: Lease, write: str, n_told: int) -> None:
        before = self.bench.events(self.job_id)
        try:
            self._write(lease, write, n_told)
        except LeaseLost:
            assert write not in REPEATABLE
        else:
            assert write in REPEATABLE
        assert self.bench.events(self.job_id) == before

    def _expect(self, write: str) -> None:
        ends = {"succeed": "succeeded", "fail": "failed", "cancelled": "cancelled", "mark_running": "running"}
        if write in ("lose", "put_back") and self.cancel_requested:
            self.state = "cancelled"
        elif write == "put_back":
            self.state = "queued"
        elif write == "lose":
            is_last = self.n_losses + 1 >= MAX_ATTEMPTS
            self.state = "failed" if is_last else "queued"
            self.n_losses += not is_last
        elif write == "keep":
            self.n_losses = 0
        else:
            self.state = ends.get(write, self.state)
        if self.state not in HELD:
            self.is_unreleased, self.is_leaving = True, False


class JobHistoryOnPostgreSQL(JobHistory):
    """The same on the other database: one for all examples, emptied before each."""

    def open_database(self) -> Database:
        return emptied_postgresql()

    def close_database(self) -> None:
        """It stays for the next example."""
