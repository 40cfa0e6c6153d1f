"""A rank of a training gang: an actor that joins the mesh, loads or makes its shard, and trains."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from gnomon.events import EventData
from gnomon_storage.activations import ActivationStore
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.runtime import failpoints
from gnomon_workers.runtime.answers import answers
from gnomon_workers.runtime.devices import own_device
from gnomon_workers.runtime.failpoints import Failpoint
from gnomon_workers.runtime.ports import free_port
from gnomon_workers.runtime.protocol import Report
from gnomon_workers.runtime.reporting import Reporter
from gnomon_workers.sae.init import initial_b_dec
from gnomon_workers.sae.memory import most_sample_rows
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.sae.plan import Normalisation, TrainPlan
from gnomon_workers.sae.variants import make_variant
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.profile import StepProfile
from gnomon_workers.train.run import Training, TrainRun
from gnomon_workers.train.sources import JointReader
from gnomon_workers.train.state import load_checkpoint
from gnomon_workers.train.step import TrainStep

COLLECTIVE_TIMEOUT_S: Final = 60.0
"""The default of 30 minutes would hide a stopped rank for as long."""
MEETING_TIMEOUT_S: Final = 300.0
"""Longest wait for the others to come: longer than the start of a process may take."""


class TrainRank:
    """One rank. `run` blocks until training is done; `beat` and `reports` are answered meanwhile."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._reporter = Reporter()
        self._progressed = time.monotonic()
        self._lock = threading.Lock()
        self._leave = threading.Event()
        failpoints.arm(rank)

    def address(self) -> str:
        """host:port that the gang can meet at, on this rank's machine."""
        import ray

        host = ray.util.get_node_ip_address()
        return f"{host}:{free_port(host)}"

    def beat(self) -> float:
        """Seconds since this rank last did something."""
        return time.monotonic() - self._progressed

    def reports(self, after: int) -> tuple[Report, ...]:
        """Reports of this rank with a number above `after`; the supervisor has the others, and they are forgotten."""
        self._reporter.acknowledge(after)
        return self._reporter.after(after)

    def leave(self) -> None:
        """Ask the gang, through its rank 0, to leave a checkpoint soon and stop."""
        self._leave.set()

    @answers
    def run(self, run: TrainRun, address: str) -> bool:
        """Train to the end, or until the gang is asked to leave; returns whether it has left before the end."""
        with self._lock:
            has_left = self._run(run, address)
            # after an error the group stays: without it the others would fail as well, and might be heard first
            if dist.is_initialized():
                dist.destroy_process_group()
            return has_left

    def _run(self, run: TrainRun, address: str) -> bool:
        failpoints.failpoint(Failpoint.RUN_START)
        plan = run.plan
        device = own_device()
        meeting = Meeting.at(address, rank=self._rank, n_ranks=plan.n_ranks)
        mesh = join_mesh(plan, meeting, device=device)
        store = ActivationStore.open(run.store)
        with JointReader(store, run.hook_names, seed=plan.data_seed, batch_size=plan.spec.batch_size) as reader:
            sample = reader.first_sample(n_first_samples(plan))
            steps = [self._make_step(training, mesh, sample, device) for training in run.trainings]
            first_step = run.trainings[0].first_step
            n_traced = (plan.spec.profile_steps or 0) if self._rank == 0 else 0
            has_left = train(
                run.trainings,
                steps,
                reader,
                attempt=run.assignment.attempt,
                observer=Observer(report=self._report, beat=self._beat),
                is_last=Departure(meeting, self._leave).is_last,
                trace=StepProfile(run.profile, n_traced, first_step=first_step, report=self._report),
            )
        failpoints.failpoint(Failpoint.RUN_END)
        return has_left

    def _make_step(
        self, training: Training, mesh: ProcessMesh, sample: np.ndarray[Any, np.dtype[Any]], device: torch.device
    ) -> TrainStep:
        """The step of a dictionary at its beginning, or as a checkpoint has it."""
        step = make_step(training.plan, mesh, sample, device)
        if training.resume is not None:
            load_checkpoint(training.checkpoints, training.resume, step)
        self._beat()
        return step

    def _report(self, told: EventData) -> None:
        if self._rank == 0:
            self._reporter.report(told)

    def _beat(self) -> None:
        self._progressed = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of a gang find each other."""

    rank: int
    n_ranks: int
    store: Store | None
    """None for a single rank."""

    @classmethod
    def at(cls, address: str, *, rank: int, n_ranks: int) -> Meeting:
        """Meet at host:port, where rank 0 listens on the interface of that host alone."""
        if n_ranks == 1:
            return cls(rank=rank, n_ranks=1, store=None)
        host, _, port = address.rpartition(":")
        if host.startswith("127."):
            # gloo would else look the host name up, and may find another interface
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # by itself the store would listen on all interfaces, and whoever reaches it may write there
        listener = socket.create_server((host, int(port))).detach() if rank == 0 else None
        store = TCPStore(
            host,
            int(port),
            n_ranks,
            rank == 0,
            timedelta(seconds=MEETING_TIMEOUT_S),
            wait_for_workers=False,
            master_listen_fd=listener,
        )
        return cls(rank=rank, n_ranks=n_ranks, store=store)


class Departure:
    """The step after which all ranks of a gang leave, once rank 0 was asked to.

    Rank 0 names a step that none of the others can have reached, and with a place before it where all of them look:
    the collectives of a step keep ranks within two steps of each other.
    """

    EVERY: Final = 8
    """The others look after so many steps: a question to another machine takes a part of a millisecond."""

    def __init__(self, meeting: Meeting, asked: threading.Event) -> None:
        self._meeting = meeting
        self._asked = asked
        self._last_step: int | None = None

    def is_last(self, n_made: int) -> bool:
        """Whether this is to be the last step, after which n_made were made; the same on every rank."""
        if self._last_step is None:
            self._last_step = self._look(n_made)
        return self._last_step is not None and n_made >= self._last_step

    def _look(self, n_made: int) -> int | None:
        store, is_asked = self._meeting.store, self._asked.is_set()
        if store is None:
            return n_made if is_asked else None
        if self._meeting.rank == 0:
            if not is_asked:
                return None
            last = (n_made // self.EVERY + 2) * self.EVERY
            store.set("leave", str(last))
            return last
        if n_made % self.EVERY or not store.check(["leave"]):
            return None
        return int(store.get("leave"))


def join_mesh(plan: TrainPlan, meeting: Meeting, *, device: torch.device) -> ProcessMesh:
    """Join the process group of a gang: gloo on CPU, NCCL on GPU; a single rank needs none."""
    if meeting.store is None:
        return ProcessMesh.single()
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=meeting.store,
        rank=meeting.rank,
        world_size=meeting.n_ranks,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return ProcessMesh.create(dp=plan.mesh.dp, features=plan.mesh.features, timeout_s=COLLECTIVE_TIMEOUT_S)


def n_first_samples(plan: TrainPlan) -> int:
    """Activations that b_dec is initialised from."""
    return most_sample_rows(sum(hook.width for hook in plan.hooks))


def make_step(
    plan: TrainPlan, mesh: ProcessMesh, sample: np.ndarray[Any, np.dtype[Any]], device: torch.device
) -> TrainStep:
    """A step at its beginning; sample is (n, d_in) raw activations, the same on every rank."""
    start, stop = mesh.feature_range(plan.d_sae)
    rows = torch.from_numpy(sample)
    targets = Normalisation.of(plan.hooks, rows)(rows)[:, -plan.d_out :]
    b_dec = initial_b_dec(targets, plan.spec.b_dec_init).to(device)
    parameters = make_parameters(
        seed=plan.spec.seed,
        d_in=plan.d_in,
        start=start,
        stop=stop,
        b_dec=b_dec,
        tied=plan.spec.alignment == "tied",
        vectors=make_variant(plan.spec.activation, plan.setting).initial_vectors(),
        is_transcoder=plan.target is not None,
    )
    return TrainStep(plan, parameters, mesh)
