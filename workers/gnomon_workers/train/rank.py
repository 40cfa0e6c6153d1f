"""A rank of a training gang: an actor that joins the mesh, loads or makes its shard, and trains."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from gnomon.errors import GnomonError
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.shuffle import BatchReader
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.protocol import Report
from gnomon_workers.reporting import Reporter
from gnomon_workers.sae.init import initial_b_dec
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.train.checkpoints import Checkpoint, load_checkpoint
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.plan import TrainPlan
from gnomon_workers.train.step import TrainStep

COLLECTIVE_TIMEOUT_S: Final = 60.0
"""The default of 30 minutes would hide a stopped rank for as long."""
FIRST_SAMPLE: Final = 65_536
"""Activations that b_dec is initialised from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """What every rank of a gang is told; the same for all."""

    plan: TrainPlan
    attempt: int
    hook_name: str
    store: str
    """URL of the activation store."""
    checkpoints: str
    """URL of the job's checkpoint folder."""
    resume: Checkpoint | None


class TrainRank:
    """One rank. `run` blocks until training is done; `beat` and `reports` are answered meanwhile."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._reporter = Reporter()
        self._progressed = time.monotonic()
        self._lock = threading.Lock()

    def address(self) -> str:
        """host:port that the gang can meet at, on this rank's machine."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def beat(self) -> float:
        """Seconds since this rank last did something."""
        return time.monotonic() - self._progressed

    def reports(self, after: int) -> tuple[Report, ...]:
        """Reports of this rank with a number above `after`."""
        return self._reporter.after(after)

    def run(self, task: RankTask, address: str) -> Mapping[str, str]:
        """Train to the end; returns {} or the code and message of an error that is the job's own."""
        with self._lock:
            try:
                self._run(task, address)
            except GnomonError as error:
                # returned rather than raised: the job's own error must not look like a lost worker
                return {"code": error.code, "message": error.message}
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            return {}

    def _run(self, task: RankTask, address: str) -> None:
        plan = task.plan
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        mesh = join_mesh(plan, rank=self._rank, address=address, device=device)
        store = ActivationStore.open(Location.open(task.store))
        store.verify(part=self._rank, n_parts=mesh.size("world"))
        mesh.barrier()  # nobody trains on a store of which another found a part damaged
        self._beat()
        with BatchReader(store, task.hook_name, seed=plan.seed, batch_size=plan.batch_size) as reader:
            checkpoints = Location.open(task.checkpoints)
            step = make_step(plan, mesh, reader.first_sample(FIRST_SAMPLE), device)
            if task.resume is not None:
                load_checkpoint(checkpoints, task.resume, step)
            self._beat()
            train(
                step,
                reader,
                first_step=task.resume.step if task.resume else 0,
                attempt=task.attempt,
                checkpoints=checkpoints,
                observer=Observer(report=self._report, beat=self._beat),
            )

    def _report(self, kind: Any, **data: Any) -> None:
        if self._rank == 0:
            self._reporter.report(kind, **data)

    def _beat(self) -> None:
        self._progressed = time.monotonic()


def join_mesh(plan: TrainPlan, *, rank: int, address: str, device: torch.device) -> ProcessMesh:
    """Join the process group of a gang: gloo on CPU, NCCL on GPU; a single rank needs none."""
    world = plan.dp * plan.features
    if world == 1:
        return ProcessMesh.single()
    if address.startswith("127."):
        # gloo would else look the host name up, and may find another interface
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return ProcessMesh.create(dp=plan.dp, features=plan.features, timeout_s=COLLECTIVE_TIMEOUT_S)


def make_step(
    plan: TrainPlan, mesh: ProcessMesh, sample: np.ndarray[Any, np.dtype[Any]], device: torch.device
) -> TrainStep:
    """A step at its beginning; sample is (n, d_in) raw activations, the same on every rank."""
    start, stop = mesh.feature_range(plan.d_sae)
    b_dec = initial_b_dec(torch.from_numpy(sample) * plan.scale, plan.b_dec_init).to(device)
    parameters = make_parameters(
        seed=plan.seed, d_in=plan.d_in, start=start, stop=stop, b_dec=b_dec, tied=plan.alignment == "tied"
    )
    return TrainStep(plan, parameters, mesh)
