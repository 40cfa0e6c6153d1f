"""The Ray cluster as the dispatcher sees it: start, poll, cancel and kill attempts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from gnomon_workers.attempts.gpu_memory import gpu_memory_bytes
from gnomon_workers.attempts.supervisor import Supervisor
from gnomon_workers.runtime.deaths import cause_of
from gnomon_workers.runtime.protocol import (
    Assignment,
    AttemptDied,
    ClusterSnapshot,
    ClusterUnreachable,
    NodeSnapshot,
    Poll,
)

ANSWER_S: Final = 15.0
"""Longest wait for a supervisor's answer before it counts as silent; it then holds up no other job any more."""
START_S: Final = 180.0
"""Longest wait for a new supervisor: a fresh worker process imports torch first, and a machine may be busy."""
SILENT_S: Final = 45.0
"""A supervisor that does not answer for this long, on a cluster that does, is stopped for good: it is killed."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Silent:
    """A supervisor that was asked and has not answered; it is not asked again, but looked whether it has."""

    asked: Any
    since: float


class _Away(ClusterUnreachable):
    """A supervisor cannot be reached, which may be there again in a moment: Ray will say if it is dead."""


class RayCluster:
    """Attempts on the Ray cluster that this process is connected to, each under the name of its supervisor."""

    def __init__(self, *, namespace: str) -> None:
        self._namespace = namespace
        self._silent: dict[str, _Silent] = {}

    @classmethod
    def connect(cls, *, address: str | None, namespace: str) -> Self:
        """Connect this process to a running cluster; without an address, to the one on this machine."""
        # Ray would otherwise run workers through `uv run` and report usage; both surprise an operator.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        cluster = cls(namespace=namespace)
        cluster._answering(lambda: ray.init(address=address or "auto", namespace=namespace, log_to_driver=False))
        return cluster

    def close(self) -> None:
        """Disconnect; attempts go on."""
        ray.shutdown()

    def start(self, assignment: Assignment) -> None:
        """Begin an attempt; returns once its supervisor is placed. Starting the same attempt twice is harmless.

        Raises AttemptDied where it ended at once.
        """

        def begin() -> None:
            supervisor: Any = (
                ray.remote(Supervisor)
                .options(
                    name=_name(assignment.job_id, assignment.attempt),
                    namespace=self._namespace,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=0,
                    max_concurrency=8,
                )
                .remote(assignment)
            )
            ray.get(supervisor.ready.remote(), timeout=START_S)

        self._answering(begin)

    def poll(self, job_id: str, attempt: int, after: int) -> Poll | None:
        """Reports with seq > after; None if the cluster knows no such attempt (never begun, or lost).

        Raises AttemptDied where it is seen to be lost.
        """
        supervisor = self._find(job_id, attempt)
        if supervisor is None:
            return None
        name = _name(job_id, attempt)
        silent = self._silent.get(name)
        asked = silent.asked if silent else supervisor.poll.remote(after)
        try:
            poll: Poll = self._answering(lambda: ray.get(asked, timeout=0.0 if silent else ANSWER_S))
        except (_Away, AttemptDied):
            self._silent.pop(name, None)
            raise
        except ClusterUnreachable:
            self.snapshot()  # the cluster answers, so it is this supervisor that does not
            silent = self._silent.setdefault(name, _Silent(asked=asked, since=time.monotonic()))
            if time.monotonic() - silent.since < SILENT_S:
                raise
            self._answering(lambda: ray.kill(supervisor))
            self._silent.pop(name, None)
            return None
        self._silent.pop(name, None)
        return poll

    def cancel(self, job_id: str, attempt: int) -> None:
        """Ask an attempt to stop; it ends with outcome "cancelled"."""
        supervisor = self._find(job_id, attempt)
        if supervisor is not None:
            supervisor.cancel.remote()

    def kill(self, job_id: str, attempt: int) -> None:
        """End an attempt at once and free all it holds; harmless if it is gone."""
        supervisor = self._find(job_id, attempt)
        if supervisor is not None:
            # its actors are owned by it, and end with it
            self._answering(lambda: ray.kill(supervisor))
        self._silent.pop(_name(job_id, attempt), None)

    def leave(self, job_id: str, attempt: int) -> None:
        """Ask an attempt to save what it has and end; its outcome is then "left". Asking twice is harmless."""
        supervisor = self._find(job_id, attempt)
        if supervisor is not None:
            supervisor.leave.remote()

    def resize(self, job_id: str, attempt: int, places: tuple[str, ...]) -> None:
        """Ask an elastic attempt to hold these devices, as soon as it can; others are as they are."""
        supervisor = self._find(job_id, attempt)
        if supervisor is not None:
            supervisor.resize.remote(places)

    def snapshot(self) -> ClusterSnapshot:
        """Machines of the cluster, whoever uses them now."""
        nodes = [node for node in self._answering(ray.nodes) if node["Alive"]]
        return ClusterSnapshot(nodes=tuple(map(_node, nodes)))

    def _find(self, job_id: str, attempt: int) -> Any:
        name = _name(job_id, attempt)
        try:
            return self._answering(lambda: ray.get_actor(name, namespace=self._namespace))
        except ValueError:  # no such actor, or a dead one
            return None

    def _answering(self, call: Callable[[], T]) -> T:
        """Run a call; whatever says that the cluster does not answer becomes ClusterUnreachable."""
        try:
            return call()
        except ActorUnavailableError as error:
            raise _Away(cause_of(error)) from error
        except RayActorError as error:
            raise AttemptDied(f"the attempt died: {cause_of(error)}") from error
        except (RayError, GetTimeoutError, ConnectionError, TimeoutError, RuntimeError) as error:
            raise ClusterUnreachable(str(error).strip().split("\n", 1)[0]) from error


def _name(job_id: str, attempt: int) -> str:
    return f"{job_id}.a{attempt:04d}"


def _node(node: Mapping[str, Any]) -> NodeSnapshot:
    resources = node["Resources"]
    memory = resources.get("memory")
    return NodeSnapshot(
        id=node["NodeID"],
        name=str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress") or node["NodeID"]),
        n_cpus=float(resources.get("CPU", 0)),
        n_gpus=float(resources.get("GPU", 0)),
        memory_bytes=None if memory is None else int(memory),
        gpu_memory_bytes=gpu_memory_bytes(node),
    )
