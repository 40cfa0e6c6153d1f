"""A training gang without Ray: the ranks of `TrainRank`, forked from a process that has imported everything already.

A gang of four starts in a second instead of ten, so that a test can kill it dozens of times.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from gnomon.events import EventData, event_json
from gnomon.specs import Activation, Adam, AuxK, BatchTopK, Mesh, StoredActivations, TrainSpec
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint, committed_checkpoints
from gnomon_workers.runtime import failpoints
from gnomon_workers.runtime.answers import Refused
from gnomon_workers.runtime.ports import free_port
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.sae.plan import TrainPlan, make_plan
from gnomon_workers.train.rank import TrainRank
from gnomon_workers.train.run import Training, TrainRun
from tests.support.checkpoints import latest_whole
from tests.support.stores import HOOK
from tests.support.waiting import LIMIT_S

STORE_ID = "act_" + "1" * 32
BATCH = 64


@dataclass(slots=True)
class Attempt:
    """What became of one attempt."""

    killed: list[int] = field(default_factory=list)
    """Ranks that ended by SIGKILL before the gang was ended."""
    refused: Refused | None = None
    """What a rank answered, if it was an error of the training's own."""
    finished: bool = False
    reports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return {data["step"]: data["loss"] for kind, data in self.reports if kind == "metrics"}


class PipedRank(TrainRank):
    """A rank whose reports outlive it."""

    def __init__(self, rank: int, pipe: Connection) -> None:
        super().__init__(rank)
        self._pipe = pipe

    def _report(self, told: EventData) -> None:
        if self._rank == 0:
            self._pipe.send((told.kind, event_json(told)))


def _serve(rank: int, run: TrainRun, address: str, points: str, log: Path, pipe: Connection) -> None:
    # what the survivors of a kill have to say is of interest only where a test fails
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ[failpoints.VARIABLE] = points
    os.environ["OMP_NUM_THREADS"] = "1"
    answer = PipedRank(rank, pipe).run(run, address)
    pipe.send(("end", {"refused": answer} if isinstance(answer, Refused) else {}))


def plan_for(
    n_steps: int,
    *,
    mesh: Mesh | None = None,
    checkpoint_every: int = 10,
    activation: Activation | None = None,
) -> TrainPlan:
    """A plan for the made-up store, whose rows have a mean square near 1 after scaling."""
    mesh = mesh or Mesh(dp=2, features=2)
    spec = TrainSpec(
        activations=StoredActivations(id=STORE_ID),
        d_sae=64,
        activation=activation or BatchTopK(k=4, aux=AuxK(k=4)),
        batch_size=BATCH,
        token_budget=BATCH * n_steps,
        mesh=mesh,
        optimizer=Adam(lr=5e-3),
        dead_after_tokens=200,
        log_every=1,
        checkpoint_every=checkpoint_every,
    )
    return make_plan(spec, d_in=16, mesh=mesh, mean_squared_norm=1.0)


def run_for(root: Path, folder: str, plan: TrainPlan, attempt: int) -> TrainRun:
    """What the ranks of one attempt are told, as the job's supervisor tells them."""
    base = Location.open(f"file://{root}")
    resume, damaged = latest_whole(base.child(folder))
    assert not damaged, damaged
    assignment = Assignment(
        job_id=folder, attempt=attempt, project="p", kind="train", spec={}, storage_root=base.url, input_roots=(),
        store_id=STORE_ID,
    )  # fmt: skip
    plan = replace(plan, inputs=tuple(replace(hook, name=HOOK) for hook in plan.inputs))
    checkpoints, dictionary = base.child(folder), base.child(f"{folder}-dictionary")
    return TrainRun(
        assignment=assignment,
        trainings=(Training(plan=plan, checkpoints=checkpoints, dictionary=dictionary, resume=resume),),
        store=base.child("activations", STORE_ID),
        profile=base.child(f"{folder}-profile.json.gz"),
    )


class ProcessGang:
    """Runs attempts of one training, and ends all of its ranks when one ends badly."""

    def __init__(self, root: Path, folder: str, plan: TrainPlan) -> None:
        self._root = root
        self._folder = folder
        self._plan = plan
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self.n_attempts = 0

    @property
    def checkpoints(self) -> Location:
        """Where the training saves itself."""
        return Location.open(f"file://{self._root}").child(self._folder)

    def final(self) -> Checkpoint:
        """The last committed checkpoint."""
        return next(committed_checkpoints(self.checkpoints))

    def run(self, points: str = "", on_step: Callable[[int, list[int]], None] = lambda _step, _pids: None) -> Attempt:
        """One attempt, from the last checkpoint; on_step(step, pids) is told of every step that rank 0 made."""
        self.n_attempts += 1
        run = run_for(self._root, self._folder, self._plan, self.n_attempts)
        address = f"127.0.0.1:{free_port()}"
        log = self._root / f"{self._folder}.log"
        pipes, processes = [], []
        for rank in range(self._plan.n_ranks):
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_serve, args=(rank, run, address, points, log, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        attempt = Attempt()
        try:
            self._follow(attempt, pipes, processes, on_step)
        finally:
            attempt.killed = [r for r, p in enumerate(processes) if p.exitcode == -signal.SIGKILL]
            for process in processes:
                process.kill()
                process.join()
            while _read(pipes[0], attempt):
                pass
            for pipe in pipes:
                pipe.close()
        return attempt

    def _follow(self, attempt: Attempt, pipes: list[Connection], processes: list[Any], on_step: Any) -> None:
        pids = [process.pid for process in processes]
        ended: set[int] = set()
        deadline = time.monotonic() + LIMIT_S
        while len(ended) < len(processes):
            assert time.monotonic() < deadline, f"nothing happens; last report {attempt.reports[-1:]}"
            ready = wait([*pipes, *(p.sentinel for p in processes)], timeout=1.0)
            for rank, pipe in enumerate(pipes):
                if pipe not in ready:
                    continue
                if said := _read(pipe, attempt):
                    deadline = time.monotonic() + LIMIT_S
                    kind, data = said
                    if kind == "end":
                        ended.add(rank)
                        attempt.refused = attempt.refused or data.get("refused")
                    elif kind == "metrics":
                        on_step(data["step"], pids)
                else:
                    code = processes[rank].exitcode
                    assert rank in ended or code in (None, -signal.SIGKILL), (
                        f"rank {rank} ended with {code}: see the log"
                    )
            if attempt.refused is not None:
                return
            dead = [r for r, p in enumerate(processes) if p.exitcode is not None and r not in ended]
            if any(processes[r].exitcode == -signal.SIGKILL for r in dead):
                return
        attempt.finished = True


def _read(pipe: Connection, attempt: Attempt) -> tuple[str, dict[str, Any]] | None:
    """The next thing that a rank said, or None where it can say no more."""
    try:
        if not pipe.poll():
            return None
        kind, data = pipe.recv()
    except (EOFError, OSError):  # killed, perhaps in the middle of a word
        return None
    if kind != "end":
        attempt.reports.append((kind, data))
    return kind, data
