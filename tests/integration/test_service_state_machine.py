"""Random histories of one job against a model of the state machine; SQLite, where a step is cheap."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gnomon.errors import Conflict, LeaseLost
from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import LEGAL_TRANSITIONS
from gnomon_service.jobs.held import Lease
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench

MAX_ATTEMPTS = 3


class JobHistory(RuleBasedStateMachine):
    """Users, dispatchers and stale dispatchers act on one job in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(f"sqlite:///{Path(self.folder.name) / 'gnomon.db'}")
        self.database.migrate()
        self.bench = Bench(self.database)

    @initialize()
    def submit(self) -> None:
        self.job_id = self.bench.submit(max_attempts=MAX_ATTEMPTS).id
        self.state, self.attempt, self.holder = "queued", 0, ""
        self.cancel_requested = self.is_unreleased = False
        self.n_losses = 0
        self.leases: list[Lease] = []

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @rule(owner=st.sampled_from("ab"))
    def claim(self, owner: str) -> None:
        held = self.bench.claim_next(owner)
        assert (held is not None) == (self.state == "queued" and not self.is_unreleased)
        if held is not None:
            self.state, self.attempt, self.holder = "scheduled", self.attempt + 1, owner
            self.leases.append(held.lease)

    @rule(owner=st.sampled_from("ab"), is_held=st.booleans())
    def adopt(self, owner: str, is_held: bool) -> None:
        """A dispatcher that does not hold what it claimed (the answer was lost) adopts it like any other's."""
        self.bench.let_lease_pass(self.job_id)
        held = self.bench.leases.adopt(owner, [self.job_id] if is_held else [])
        expected = self.state in ("scheduled", "running") and not (is_held and self.holder == owner)
        assert bool(held) == expected
        if held:
            self.holder = owner
            self.leases.append(held[0].lease)

    @rule(
        data=st.data(),
        write=st.sampled_from(["renew", "mark_running", "succeed", "fail", "cancelled", "lose", "record", "keep"]),
    )
    def write(self, data: st.DataObject, write: str) -> None:
        if not self.leases:
            return
        lease = data.draw(st.sampled_from(self.leases))
        is_current = self.state in ("scheduled", "running") and (lease.attempt, lease.owner) == (
            self.attempt,
            self.holder,
        )
        legal = is_current and not (write == "succeed" and self.state == "scheduled")
        try:
            self._write(lease, write)
        except LeaseLost:
            assert not legal
        else:
            assert legal
            self._expect(write)

    @rule()
    def cancel(self) -> None:
        self.bench.queue.cancel(PROJECT, self.job_id)
        if self.state == "queued":
            self.state = "cancelled"
        elif self.state in ("scheduled", "running"):
            self.cancel_requested = True

    @rule()
    def resume(self) -> None:
        try:
            self.bench.queue.resume(PROJECT, self.job_id)
        except Conflict:
            assert self.state == "succeeded"
        if self.state in ("failed", "cancelled"):
            self.state, self.n_losses, self.cancel_requested = "queued", 0, False

    @rule()
    def release(self) -> None:
        self.bench.release()
        self.is_unreleased = False

    @invariant()
    def the_database_agrees(self) -> None:
        job = self.bench.job(self.job_id)
        assert (job.state, job.attempt, job.cancel_requested, job.n_losses) == (
            self.state,
            self.attempt,
            self.cancel_requested,
            self.n_losses,
        )
        states = self.bench.states(self.job_id)
        assert states[-1] == self.state
        assert set(pairwise(states)) <= set(LEGAL_TRANSITIONS)
        assert [event.id for event in self.bench.events(self.job_id)] == list(
            range(1, len(self.bench.events(self.job_id)) + 1)
        )
        expected = {"succeeded": "sealed", "failed": "failed", "cancelled": "failed"}
        assert self.bench.store_row().state == expected.get(self.state, "harvesting")

    def _write(self, lease: Lease, write: str) -> None:
        leases = self.bench.leases
        match write:
            case "succeed":
                leases.succeed(lease, STORE_RESULT)
            case "fail":
                leases.fail(lease, code="x", message="y")
            case "lose":
                leases.lose(lease, "y")
            case "record":
                leases.record(lease, [(1, "log", {})])
            case "keep":
                # a number that no report had before
                n_told = len(self.bench.events(self.job_id)) + 1
                leases.record(lease, [(n_told, "checkpoint", {"step": 1, "n_bytes": 1, "copy_s": 0, "duration_s": 0})])
            case _:
                getattr(leases, write)(lease)

    def _expect(self, write: str) -> None:
        ends = {"succeed": "succeeded", "fail": "failed", "cancelled": "cancelled"}
        if write == "mark_running":
            self.state = "running"
        elif write == "lose" and self.cancel_requested:
            self.state = "cancelled"
        elif write == "lose":
            is_last = self.n_losses + 1 >= MAX_ATTEMPTS
            self.state = "failed" if is_last else "queued"
            self.n_losses += not is_last
        elif write == "keep":
            self.n_losses = 0
        else:
            self.state = ends.get(write, self.state)
        if self.state in TERMINAL_STATES or self.state == "queued":
            self.is_unreleased = True


JobHistory.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestJobHistory = JobHistory.TestCase
