"""What the dispatcher and the workers say to each other; imports neither Ray nor torch.

The dispatcher hands an `Assignment` to a cluster and then polls it for `Report`s until there is an `Outcome`.
Workers never reach the database: everything they know travels in reports, and every path they write contains
the attempt, so a stale attempt can harm nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
"""Digits of ids: Crockford's base 32 without i, l, o and u, which are read as other digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One attempt at one job, with everything a worker needs to do it."""

    job_id: str
    attempt: int
    project: str
    kind: Literal["harvest", "train", "evaluate"]
    spec: Mapping[str, Any]
    """The job's spec as JSON; sources are resolved (revisions pinned)."""
    storage_root: str
    """fsspec URL under which this project's bytes live."""
    input_roots: tuple[str, ...]
    """Roots that text and local models may be read from."""
    store_id: str
    """The activation store that is harvested, trained on, or evaluated against."""
    dictionary_id: str | None = None
    """The dictionary that a train job publishes (the first, where it has variants), or an evaluate job measures."""
    places: tuple[str, ...] = ()
    """The node of each device that the attempt is given, by Ray's id; one member of its gangs goes to each."""
    mesh: tuple[int, int] | None = None
    """(dp, features) of a training, where that was chosen before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Something a worker saw; seq grows by one within an attempt, from 1."""

    seq: int
    kind: str
    """Kind of the event that it becomes."""
    data: Mapping[str, Any]
    """What the event tells, as JSON; see gnomon.events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    status: Literal["succeeded", "failed", "lost", "cancelled", "left"]
    """"failed" is final (the job's own fault); "lost" is an infrastructure loss, and the job runs again; "left" is an
    attempt that was asked to: it has saved what it had."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """A HarvestResult, TrainResult or EvaluateResult as JSON, and beside it what the job made: of a harvest `record`,
    the fields of the ActivationStore; of a training `records`, those of each Dictionary, in the order of variants."""
    code: str = ""
    message: str = ""


def dictionary_ids(first: str, n: int) -> tuple[str, ...]:
    """Ids of the n dictionaries of a job: the one that it was given, and others that follow from it."""
    return (first, *(f"dict_{_digits(f'{first}/{index}')}" for index in range(1, n)))


def _digits(text: str) -> str:
    """26 characters that stand for a text."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=17).digest())
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """Reports after the given seq, oldest first, and the outcome once all reports are in."""

    reports: tuple[Report, ...]
    outcome: Outcome | None
    places: tuple[str, ...] | None = None
    """The node of each device that the attempt holds by now; None where it keeps those that it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSnapshot:
    """A machine of the cluster that lives."""

    id: str
    """Ray's."""
    name: str
    """For people: its host's name or address."""
    n_cpus: float
    n_gpus: float
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    """Of one of its GPUs; None where it has none, or that is not known."""


class Machine(Protocol):
    """What is known of the devices of a machine, by whomever."""

    @property
    def n_cpus(self) -> float: ...
    @property
    def n_gpus(self) -> float: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def gpu_memory_bytes(self) -> int | None: ...


def device_memory_bytes(machines: Iterable[Machine], *, uses_gpus: bool) -> float | None:
    """Memory of a GPU, or a core's share of its machine's, on the machine that has most of it; None: it is not known.

    That of a machine which is not known may be larger than all that are.
    """
    if uses_gpus:
        sizes = [machine.gpu_memory_bytes for machine in machines if machine.n_gpus > 0]
        return None if None in sizes else max(filter(None, sizes), default=None)
    return max(
        (machine.memory_bytes / machine.n_cpus for machine in machines if machine.memory_bytes and machine.n_cpus),
        default=None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    """The cluster's machines, whoever uses them now."""

    nodes: tuple[NodeSnapshot, ...]

    @property
    def n_cpus(self) -> float:
        """Cores of all machines."""
        return sum(node.n_cpus for node in self.nodes)

    @property
    def n_gpus(self) -> float:
        """GPUs of all machines."""
        return sum(node.n_gpus for node in self.nodes)

    @property
    def n_nodes(self) -> int:
        """Machines."""
        return len(self.nodes)


class ClusterUnreachable(Exception):
    """The cluster does not answer: nothing is known of the gangs on it. Doubt never fails a job."""


class AttemptDied(Exception):
    """An attempt was there and is gone, for a reason that is known."""


class Cluster(Protocol):
    """Where attempts run. Every method raises ClusterUnreachable where the cluster does not answer."""

    def start(self, assignment: Assignment) -> None:
        """Begin an attempt; returns once its supervisor is placed. Starting the same attempt twice is harmless.

        Raises AttemptDied where it ended at once.
        """

    def poll(self, job_id: str, attempt: int, after: int) -> Poll | None:
        """Reports with seq > after; None if the cluster knows no such attempt (never begun, or lost).

        Raises AttemptDied where it is seen to be lost.
        """

    def cancel(self, job_id: str, attempt: int) -> None:
        """Ask an attempt to stop; it ends with outcome "cancelled"."""

    def leave(self, job_id: str, attempt: int) -> None:
        """Ask an attempt to save what it has and end; its outcome is then "left". Asking twice is harmless."""

    def resize(self, job_id: str, attempt: int, places: tuple[str, ...]) -> None:
        """Ask an elastic attempt to hold these devices, as soon as it can; others are as they are."""

    def kill(self, job_id: str, attempt: int) -> None:
        """End an attempt at once and free all it holds; harmless if it is gone."""

    def snapshot(self) -> ClusterSnapshot:
        """Cores, GPUs and nodes of the cluster, whoever uses them now."""
