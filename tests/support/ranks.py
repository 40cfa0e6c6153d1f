"""Real ranks for the numerics tests: processes that join a gloo mesh, run a function and return its value."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.runtime.ports import free_port
from tests.support.waiting import LIMIT_S

T = TypeVar("T")


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, dp, features, port, args, options = pipe.recv()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://127.0.0.1:{port}",
                rank=rank,
                world_size=dp * features,
                timeout=timedelta(seconds=LIMIT_S),
            )
            mesh = ProcessMesh.create(dp=dp, features=features, timeout_s=LIMIT_S)
            pipe.send((True, function(mesh, *args, **options)))
        except Exception as error:
            pipe.send((False, f"rank {rank}: {type(error).__name__}: {error}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class RankPool:
    """Processes that are started once, as many as the largest mesh so far needs, and form one mesh after another."""

    def __init__(self) -> None:
        self._workers: list[tuple[SpawnProcess, Connection]] = []

    def run(self, function: Callable[..., T], dp: int, features: int, *args: Any, **options: Any) -> list[T]:
        """function(mesh, *args, **options) on every rank of a mesh; values in rank order."""
        context = multiprocessing.get_context("spawn")
        for rank in range(len(self._workers), dp * features):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))
        port = free_port()
        pipes = [pipe for _, pipe in self._workers[: dp * features]]
        for pipe in pipes:
            pipe.send((function, dp, features, port, args, options))
        answers = [pipe.recv() for pipe in pipes]
        failures = [value for ok, value in answers if not ok]
        assert not failures, failures
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes: between two meshes they hold nothing that a farewell would save."""
        for process, _ in self._workers:
            process.kill()
        for process, pipe in self._workers:
            process.join(10)
            pipe.close()
