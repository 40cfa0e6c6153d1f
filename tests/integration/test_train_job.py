"""Train jobs on a real Ray cluster: as the dispatcher runs them, with ranks killed and stopped under way."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gnomon.dictionary import load_folder
from gnomon_workers import cluster as clusters
from gnomon_workers.cluster import RayCluster
from gnomon_workers.protocol import Assignment, ClusterUnreachable, Outcome, Report
from tests.rays import NAMESPACE, local_ray
from tests.stores import make_store

STORE_ID = "act_" + "1" * 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with local_ray(n_cpus=4):
        yield RayCluster.connected(namespace=NAMESPACE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    make_store(root, store_id=STORE_ID)
    return root


def assignment(root: Path, job_id: str, *, attempt: int = 1, **fields: Any) -> Assignment:
    """A train job of some seconds, on a 1 x 2 mesh."""
    spec = {
        "kind": "train",
        "activations": {"kind": "store", "id": STORE_ID},
        "d_sae": 64,
        "activation": {"kind": "batchtopk", "k": 4},
        "batch_size": 64,
        "token_budget": 64 * 400,
        "mesh": {"dp": 1, "features": 2},
        "optimizer": {"lr": 5e-3},
        "log_every": 1,
        "checkpoint_every": 50,
        "evaluation": None,
        **fields,
    }
    return Assignment(
        job_id=job_id,
        attempt=attempt,
        project="p",
        kind="train",
        spec=spec,
        storage_root=f"file://{root}",
        input_roots=(),
        store_id=STORE_ID,
        dictionary_id=f"dict_{job_id}",
    )


def follow(
    cluster: RayCluster, task: Assignment, on_report: Callable[[Report], None] = lambda _: None
) -> tuple[Outcome, list[Report]]:
    """Poll an attempt to its end, as the dispatcher does."""
    cluster.start(task)
    seen: list[Report] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        poll = cluster.poll(task.job_id, task.attempt, len(seen))
        assert poll is not None
        for report in poll.reports:
            on_report(report)
        seen.extend(poll.reports)
        if poll.outcome is not None:
            cluster.kill(task.job_id, task.attempt)
            return poll.outcome, seen
        time.sleep(0.05)
    raise AssertionError(f"no outcome; last report {seen[-1:]}")


def losses(reports: list[Report]) -> dict[int, float]:
    """Loss by step."""
    return {r.data["step"]: r.data["loss"] for r in reports if r.kind == "metrics"}


def rank_pids() -> list[int]:
    """Processes of training ranks."""
    return pids_of("TrainRank")


def pids_of(actor: str) -> list[int]:
    """Processes of an actor class, of this Ray alone."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ray::{actor}" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def uninterrupted(cluster: RayCluster, root: Path) -> dict[int, float]:
    outcome, reports = follow(cluster, assignment(root, "job_whole"))
    assert outcome.status == "succeeded", outcome
    return losses(reports)


def test_a_job_publishes_a_dictionary_and_says_how_it_went(cluster: RayCluster, root: Path) -> None:
    outcome, reports = follow(cluster, assignment(root, "job_one"))
    assert outcome.status == "succeeded", outcome
    record = outcome.result["record"]
    dictionary = load_folder(Path(record["location"].removeprefix("file://")))
    assert dictionary.W_enc.shape == (16, 64)
    assert record["metrics"]["alignment"]["max_deviation"] <= 1e-5
    assert [r.seq for r in reports] == list(range(1, len(reports) + 1))
    phases = [r.data["phase"] for r in reports if r.kind == "phase"]
    assert phases == ["train", "export"]
    checkpoints = [r.data for r in reports if r.kind == "checkpoint"]
    assert [c["step"] for c in checkpoints] == list(range(50, 401, 50))
    assert all(c["max_alignment_deviation"] <= 1e-5 for c in checkpoints)
    progress = [r.data for r in reports if r.kind == "progress" and r.data["phase"] == "train"]
    assert progress[-1]["done"] == progress[-1]["total"] == 64 * 400


def test_a_published_job_is_not_trained_again(cluster: RayCluster, root: Path) -> None:
    outcome, reports = follow(cluster, assignment(root, "job_one", attempt=2))
    assert outcome.status == "succeeded" and not losses(reports)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL])
def test_a_killed_rank_loses_the_attempt_and_the_next_resumes_exactly(
    cluster: RayCluster, root: Path, uninterrupted: dict[int, float], signal_number: int
) -> None:
    killed: list[int] = []

    def kill_at_step_120(report: Report) -> None:
        if report.kind == "metrics" and report.data["step"] >= 120 and not killed:
            killed.extend(rank_pids()[-1:])
            os.kill(killed[0], signal_number)

    outcome, reports = follow(cluster, assignment(root, "job_killed"), kill_at_step_120)
    assert killed and outcome.status == "lost", outcome
    before = losses(reports)
    assert max(before) < 400
    outcome, reports = follow(cluster, assignment(root, "job_killed", attempt=2))
    assert outcome.status == "succeeded", outcome
    after = losses(reports)
    assert min(after) > 100
    assert {**before, **after} == uninterrupted


def test_a_killed_supervisor_takes_its_ranks_with_it(cluster: RayCluster, root: Path) -> None:
    task = assignment(root, "job_orphans", token_budget=64 * 100_000)
    cluster.start(task)
    deadline = time.monotonic() + 60
    while len(rank_pids()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.kill(task.job_id, task.attempt)
    while rank_pids():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cluster.poll(task.job_id, task.attempt, 0) is None


def test_a_stopped_supervisor_is_given_up_in_the_end(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "ANSWER_S", 0.5)
    monkeypatch.setattr(clusters, "SILENT_S", 2.0)
    task = assignment(root, "job_silent", token_budget=64 * 100_000)
    cluster.start(task)
    os.kill(pids_of("Supervisor")[-1], signal.SIGSTOP)
    deadline = time.monotonic() + 60
    doubts = 0
    while True:
        assert time.monotonic() < deadline
        try:
            if cluster.poll(task.job_id, task.attempt, 0) is None:
                break
        except ClusterUnreachable:
            doubts += 1
    assert doubts >= 2
    while pids_of("Supervisor"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_cancelled_job_stops(cluster: RayCluster, root: Path) -> None:
    task = assignment(root, "job_cancelled", token_budget=64 * 100_000)

    def cancel_soon(report: Report) -> None:
        if report.kind == "metrics" and report.data["step"] == 20:
            cluster.cancel(task.job_id, task.attempt)

    outcome, _ = follow(cluster, task, cancel_soon)
    assert outcome.status == "cancelled"
    assert not rank_pids()


def test_an_error_of_the_job_is_final_and_says_what_to_do(cluster: RayCluster, root: Path) -> None:
    task = assignment(root, "job_nan", optimizer={"lr": 1.0, "clip_norm": None}, normalize="none", alignment="scale")
    outcome, _ = follow(cluster, task)
    assert outcome.status == "failed", outcome
    assert outcome.code in ("alignment_pole", "non_finite")
    assert "lower" in outcome.message.lower()


def test_an_unknown_attempt_is_unknown(cluster: RayCluster) -> None:
    assert cluster.poll("job_never", 1, 0) is None
    cluster.cancel("job_never", 1)
    cluster.kill("job_never", 1)


def test_the_snapshot_is_the_clusters(cluster: RayCluster) -> None:
    snapshot = cluster.snapshot()
    assert (snapshot.n_cpus, snapshot.n_gpus, snapshot.n_nodes) == (4, 0, 1)
