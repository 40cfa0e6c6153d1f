"""A cluster whose attempts work by themselves; it outlives dispatchers, which reach it over a socket."""

from __future__ import annotations

import json
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from gnomon.specs import TrainSpec
from gnomon_workers.runtime.protocol import (
    Assignment,
    ClusterSnapshot,
    ClusterUnreachable,
    NodeSnapshot,
    Outcome,
    Poll,
    Report,
)
from tests.support.service_cluster import Attempt, Key, MemoryCluster
from tests.support.service_jobs import DICTIONARY_RECORD, STORE_RESULT

DIED = "the node died"
"""Why the cluster itself loses an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What attempts do, each as its job's id and its number have it."""

    n_reports_most: int = 5
    report_s: float = 0.04
    p_lost: float = 0.1
    p_failed: float = 0.05
    p_stubborn: float = 0.0
    """Of those that do not stop when they are asked to."""


class WorkingCluster(MemoryCluster):
    """Attempts that report, and end, as time goes by."""

    def __init__(self, habits: Habits) -> None:
        super().__init__()
        self.nodes = tuple(NodeSnapshot(id=name, name=name, n_cpus=4, n_gpus=0) for name in "ab")
        self.habits = habits
        self._began: dict[Key, float] = {}
        self._lock = threading.RLock()

    def call(self, name: str, *args: Any) -> Any:
        """Do what one of the protocol's methods does, one after the other."""
        with self._lock:
            return getattr(self, name)(*args)

    def start(self, assignment: Assignment) -> None:
        super().start(assignment)
        self._began.setdefault((assignment.job_id, assignment.attempt), time.monotonic())

    def poll(self, job_id: str, attempt: int, after: int) -> Poll | None:
        known = self.attempts.get((job_id, attempt))
        if known is not None and known.outcome is None:
            self._work(known, time.monotonic() - self._began[job_id, attempt])
        return super().poll(job_id, attempt, after)

    def _work(self, attempt: Attempt, worked_s: float) -> None:
        fate = random.Random(f"{attempt.assignment.job_id}/{attempt.assignment.attempt}")
        n_reports = fate.randint(0, self.habits.n_reports_most)
        while len(attempt.reports) < min(n_reports, int(worked_s / self.habits.report_s)):
            attempt.report("progress", phase="train", done=len(attempt.reports) + 1, total=n_reports, unit="tokens")
        if attempt.wanted is not None:
            attempt.places = attempt.wanted
        is_stubborn = fate.random() < self.habits.p_stubborn
        if (attempt.cancel_asked or attempt.leave_asked) and not is_stubborn:
            attempt.end("cancelled" if attempt.cancel_asked else "left")
        elif len(attempt.reports) >= n_reports and not is_stubborn:
            self._finish(attempt, fate.random())

    def _finish(self, attempt: Attempt, fate: float) -> None:
        habits = self.habits
        if fate < habits.p_lost:
            attempt.end("lost", message=DIED)
        elif fate < habits.p_lost + habits.p_failed:
            attempt.end("failed", code="empty_corpus", message="no text")
        elif attempt.assignment.kind == "harvest":
            attempt.end("succeeded", STORE_RESULT)
        else:
            n_variants = len(TrainSpec.read(attempt.assignment.spec).variant_names)
            attempt.end("succeeded", {"records": [DICTIONARY_RECORD] * n_variants})


class RemoteCluster:
    """The cluster as a dispatcher in another process reaches it: a line of JSON for each call and each answer."""

    def __init__(self, port: int) -> None:
        self._port = port

    def start(self, assignment: Assignment) -> None:
        self._call("start", asdict(assignment))

    def poll(self, job_id: str, attempt: int, after: int) -> Poll | None:
        told = self._call("poll", job_id, attempt, after)
        if told is None:
            return None
        return Poll(
            reports=tuple(Report(**report) for report in told["reports"]),
            outcome=None if told["outcome"] is None else Outcome(**told["outcome"]),
            places=None if told["places"] is None else tuple(told["places"]),
        )

    def cancel(self, job_id: str, attempt: int) -> None:
        self._call("cancel", job_id, attempt)

    def leave(self, job_id: str, attempt: int) -> None:
        self._call("leave", job_id, attempt)

    def resize(self, job_id: str, attempt: int, places: tuple[str, ...]) -> None:
        self._call("resize", job_id, attempt, places)

    def kill(self, job_id: str, attempt: int) -> None:
        self._call("kill", job_id, attempt)

    def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(nodes=tuple(NodeSnapshot(**node) for node in self._call("snapshot")["nodes"]))

    def _call(self, name: str, *args: Any) -> Any:
        try:
            with socket.create_connection(("127.0.0.1", self._port)) as connection, connection.makefile("rw") as lines:
                lines.write(json.dumps([name, *args]) + "\n")
                lines.flush()
                answer = lines.readline()
        except OSError as error:
            raise ClusterUnreachable(str(error)) from error
        if not answer:
            raise ClusterUnreachable("the connection ended")
        return json.loads(answer)


@contextmanager
def serving_cluster(cluster: WorkingCluster) -> Iterator[int]:
    """Serve a cluster from a thread; gives the port."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if not line.endswith(b"\n"):
                return  # whoever asked was killed in the middle
            name, *args = json.loads(line)
            answer = cluster.call(name, *map(_argument, args))
            try:
                self.wfile.write(json.dumps(None if answer is None else asdict(answer)).encode() + b"\n")
            except OSError:
                return  # or after it

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _argument(value: Any) -> Any:
    """What a line of JSON had as a list or a dict."""
    if isinstance(value, dict):
        lists = {name: _argument(value[name]) for name in ("input_roots", "places", "mesh")}
        return Assignment(**{**value, **lists})
    return tuple(value) if isinstance(value, list) else value
