"""Train jobs on a real Ray cluster: as the dispatcher runs them, with ranks killed and stopped under way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gnomon.dictionary import load_folder
from gnomon.errors import InvalidRequest, StoreUnavailable
from gnomon.resources import TrainResult
from gnomon.specs import Mesh
from gnomon_storage.location import Location
from gnomon_workers.attempts import cluster as clusters
from gnomon_workers.attempts.cluster import RayCluster
from gnomon_workers.checkpoints.format import FORMAT
from gnomon_workers.runtime import failpoints
from gnomon_workers.runtime import gang as gangs
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.protocol import Assignment, ClusterUnreachable, Outcome, Report, dictionary_ids
from gnomon_workers.runtime.reporting import Reporter, WorkerLost
from gnomon_workers.train import job as train_job
from gnomon_workers.train.job import train_gang
from gnomon_workers.train.rank import Meeting
from gnomon_workers.train.run import resolve
from tests.support.checkpoints import latest_whole
from tests.support.own_processes import own_pids
from tests.support.rays import NAMESPACE, local_ray
from tests.support.stores import make_store
from tests.support.train_processes import ProcessGang
from tests.support.waiting import wait_until

STORE_ID = "act_" + "1" * 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with local_ray(n_cpus=4):
        yield RayCluster(namespace=NAMESPACE)


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
    start(cluster, task)
    seen: list[Report] = []

    def outcome() -> Outcome | None:
        try:
            poll = cluster.poll(task.job_id, task.attempt, len(seen))
        except ClusterUnreachable:  # no answer in time, on a busy machine: the dispatcher asks again, too
            return None
        assert poll is not None
        for report in poll.reports:
            on_report(report)
        seen.extend(poll.reports)
        return poll.outcome

    ended = wait_until(outcome, lambda: f"an outcome after {seen[-1:]}")
    cluster.kill(task.job_id, task.attempt)
    return ended, seen


def start(cluster: RayCluster, task: Assignment) -> None:
    """Begin an attempt, as often as it takes: beginning it twice is harmless."""

    def begun() -> bool:
        with contextlib.suppress(ClusterUnreachable):
            cluster.start(task)
            return True
        return False

    wait_until(begun, "the supervisor's start")


def losses(reports: list[Report]) -> dict[int, float]:
    """Loss by step."""
    return {r.data["step"]: r.data["loss"] for r in reports if r.kind == "metrics"}


def rank_pids() -> list[int]:
    """Processes of training ranks."""
    return pids_of("TrainRank")


def pids_of(actor: str) -> list[int]:
    """Processes of an actor class, of this Ray alone."""
    return own_pids(f"ray::{actor}")


@pytest.fixture(scope="module")
def uninterrupted(cluster: RayCluster, root: Path) -> dict[int, float]:
    """Losses of the same ranks without Ray, and without anything happening to them."""
    attempt = ProcessGang(root, "whole", resolve(assignment(root, "job_whole")).plan).run()
    assert attempt.finished
    return attempt.losses


def test_a_job_publishes_a_dictionary_and_says_how_it_went(cluster: RayCluster, root: Path) -> None:
    outcome, reports = follow(cluster, assignment(root, "job_one"))
    assert outcome.status == "succeeded", outcome
    record = outcome.result["records"][0]
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


def test_variants_are_trained_at_once_and_published_each_by_itself(cluster: RayCluster, root: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"name": "k4"},
        {"name": "topk8", "activation": {"kind": "topk"}, "k": 8},
        {"name": "seed-7", "seed": 7, "alignment": "none", "lr": 1e-3},
    ]
    names = [variant["name"] for variant in variants]
    task = assignment(root, "job_many", variants=variants, token_budget=64 * 100)
    outcome, reports = follow(cluster, task)
    assert outcome.status == "succeeded", outcome

    result = TrainResult.read(outcome.result)
    ids = dictionary_ids("dict_job_many", 3)
    assert {name: made.dictionary_id for name, made in result.dictionaries.items()} == dict(
        zip(names, ids, strict=True)
    )
    assert result.dictionary_id == ids[0] and result.metrics == result.dictionaries["k4"].metrics
    records = outcome.result["records"]
    folders = [Path(record["location"].removeprefix("file://")) for record in records]
    assert [folder.parent.name for folder in folders] == list(ids)
    found = [load_folder(folder) for folder in folders]
    assert [dictionary.cfg.architecture for dictionary in found] == ["jumprelu", "topk", "jumprelu"]
    assert found[1].cfg.k == 8 and not found[0].W_dec.equal(found[2].W_dec)
    deviations = [record["metrics"]["alignment"]["max_deviation"] for record in records]
    assert max(deviations[:2]) <= 1e-5 < deviations[2]
    provenance = json.loads((folders[2] / "runner_cfg.json").read_bytes())
    assert (provenance["variant"], provenance["train"]["seed"], provenance["resolved"]["data_seed"]) == ("seed-7", 7, 0)
    _check_reports(reports, names)

    (folders[1] / "gnomon.json").unlink()  # as if the first attempt had been lost before it published this one
    outcome, reports = follow(cluster, replace(task, attempt=2))
    assert [record["location"][-1] for record in outcome.result["records"]] == ["1", "2", "1"]
    assert [(r.data["phase"], r.data.get("variant")) for r in reports if r.kind == "phase"] == [
        ("train", None),
        ("export", "topk8"),
    ]
    assert not losses(reports)


def test_a_dictionary_of_several_is_evaluated_like_any(cluster: RayCluster, root: Path) -> None:
    dictionary_id = dictionary_ids("dict_job_many", 3)[1]
    spec = {"kind": "evaluate", "dictionary": dictionary_id, "evaluation": {"ce": False, "n_tokens": 512}}
    task = replace(assignment(root, "job_measure"), kind="evaluate", spec=spec, dictionary_id=dictionary_id)
    outcome, _ = follow(cluster, task)
    assert outcome.status == "succeeded", outcome
    assert outcome.result["dictionary_id"] == dictionary_id and 0 < outcome.result["metrics"]["fvu"] < 1


def _check_reports(reports: list[Report], names: list[str]) -> None:
    """Metrics and checkpoints are each variant's, tokens are counted once."""
    steps = [(r.data["variant"], r.data["step"]) for r in reports if r.kind == "metrics"]
    assert steps == [(name, step) for step in range(1, 101) for name in names]
    saved = [(r.data["variant"], r.data["step"]) for r in reports if r.kind == "checkpoint"]
    assert sorted(saved) == sorted((name, step) for name in names for step in (50, 100))
    phases = [(r.data["phase"], r.data.get("variant")) for r in reports if r.kind == "phase"]
    assert phases == [("train", None), *(("export", name) for name in names)]
    done = [r.data["done"] for r in reports if r.kind == "progress" and r.data["phase"] == "train"]
    assert done == sorted(done) and done[-1] == 64 * 100


def test_a_job_of_the_next_release_is_run_and_told_what_of_it_has_no_effect(cluster: RayCluster, root: Path) -> None:
    newer: dict[str, Any] = {
        "activation": {"kind": "batchtopk", "k": 4, "tilt": 1},
        "curriculum": {"x": 1},
        "token_budget": 64 * 20,
    }
    outcome, reports = follow(cluster, assignment(root, "job_newer", **newer))
    assert outcome.status == "succeeded", outcome
    said = [report.data["message"] for report in reports if report.kind == "log"]
    assert [text.split(" is a field", 1)[0] for text in said] == ["activation.tilt", "curriculum"]


def test_a_spec_that_the_workers_cannot_read_fails_its_job_at_once(cluster: RayCluster, root: Path) -> None:
    outcome, _ = follow(cluster, assignment(root, "job_unreadable", activation={"kind": "kan"}))
    assert (outcome.status, outcome.code) == ("failed", "unreadable_spec")
    assert "activation" in outcome.message


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
    # by its death, and not by the silence of the other rank, which is in a collective and would wait there for long
    assert "died" in outcome.message, outcome
    before = losses(reports)
    assert max(before) < 400
    outcome, reports = follow(cluster, assignment(root, "job_killed", attempt=2))
    assert outcome.status == "succeeded", outcome
    after = losses(reports)
    assert min(after) > 100
    assert {**before, **after} == uninterrupted


class Watching(Reporter):
    """Notes which ranks were seen stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped: set[int] = set()

    def check_cancelled(self) -> None:
        for pid in rank_pids():
            with contextlib.suppress(psutil.Error):
                if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    self.stopped.add(pid)


def test_a_stopped_rank_is_noticed_and_the_gang_rebuilt(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gangs, "STALL_S", 10.0)
    mesh = {"dp": 2, "features": 2}
    run = resolve(assignment(root, "job_stopped", mesh=mesh, token_budget=64 * 40, checkpoint_every=10))
    before, after = Watching(), Watching()
    monkeypatch.setenv(failpoints.VARIABLE, "step.before@rank=2,hit=25:stop")
    with pytest.raises(WorkerLost, match="worker 2 has not answered"):
        train_gang(run, before)
    monkeypatch.delenv(failpoints.VARIABLE)
    (final,), _ = train_gang(run, after)

    (pid,) = before.stopped
    assert not psutil.pid_exists(pid), "the stopped process stays behind"

    whole = ProcessGang(root, "job_stopped_whole", run.plan)
    wanted = whole.run().losses
    seen = [*losses(list(before.after(0))).items(), *losses(list(after.after(0))).items()]
    assert len(wanted) == 40 and set(seen) == set(wanted.items()) and len(seen) > 40
    assert (final.step, final.state) == (40, whole.final().state)
    assert [shard.digest for shard in final.shards] == [shard.digest for shard in whole.final().shards]


def test_a_gang_that_lives_and_gets_nowhere_is_given_up(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a read that never ends: the rank's process answers, its training does not go on, and no peer waits."""
    monkeypatch.setattr(train_job, "SILENT_S", 5.0)
    monkeypatch.setenv(failpoints.VARIABLE, "step.before@rank=0,hit=25:hang")
    mesh = {"dp": 1, "features": 1}
    run = resolve(assignment(root, "job_hangs", mesh=mesh, token_budget=64 * 40, checkpoint_every=10))
    with pytest.raises(WorkerLost, match="no rank has got on for"):
        train_gang(run, Reporter())
    wait_until(lambda: not rank_pids(), "the end of the rank that hangs")


def test_a_damaged_chunk_ends_a_training_before_a_step_uses_it(cluster: RayCluster, root: Path, tmp_path: Path) -> None:
    """By the job's own error, with the file's name: nobody tries again, and no peer waits."""
    shutil.copytree(root, tmp_path / "damaged")
    task = assignment(tmp_path / "damaged", "job_damaged")
    chunk = next(path for path in sorted((tmp_path / "damaged").rglob("acts/*/c/*/0")) if "/segments/" in str(path))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 16
    chunk.write_bytes(data)
    ended, told = follow(cluster, task)
    assert (ended.status, ended.code) == ("failed", "corrupt_artifact")
    assert str(chunk) in ended.message and "other bytes" in ended.message
    assert losses(told) == {}
    wait_until(lambda: not rank_pids(), "the end of both ranks")


def test_ranks_meet_on_their_own_interface_alone() -> None:
    """Whoever reaches the store of a meeting may write there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = Meeting.at(f"127.0.0.1:{port}", rank=0, n_ranks=2)
    ears = {each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.laddr.port == port}
    assert ears == {"127.0.0.1"}
    assert meeting.store is not None
    assert Meeting.at(f"127.0.0.1:{port}", rank=1, n_ranks=2).store is not None


def test_an_error_of_one_rank_ends_the_gang_at_once(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.after_upload@rank=1,hit=2:raise")
    run = resolve(assignment(root, "job_store", token_budget=64 * 100_000, checkpoint_every=20))
    # of this kind, because it says that the job may be run again
    with pytest.raises(StoreUnavailable, match="after_upload"):
        train_gang(run, Reporter())
    found, damaged = latest_whole(run.trainings[0].checkpoints)
    assert found is not None and found.step == 20 and not damaged


def test_a_killed_supervisor_takes_its_ranks_with_it(cluster: RayCluster, root: Path) -> None:
    task = assignment(root, "job_orphans", token_budget=64 * 100_000)
    start(cluster, task)
    wait_until(lambda: len(rank_pids()) == 2, "both ranks")
    cluster.kill(task.job_id, task.attempt)
    wait_until(lambda: not rank_pids(), "the end of both ranks")
    assert cluster.poll(task.job_id, task.attempt, 0) is None


def test_a_stopped_supervisor_is_given_up_in_the_end(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = assignment(root, "job_silent", token_budget=64 * 100_000)
    start(cluster, task)
    monkeypatch.setattr(clusters, "ANSWER_S", 0.5)
    monkeypatch.setattr(clusters, "SILENT_S", 2.0)
    os.kill(pids_of("Supervisor")[-1], signal.SIGSTOP)
    doubts: list[str] = []

    def is_given_up() -> bool:
        try:
            return cluster.poll(task.job_id, task.attempt, 0) is None
        except ClusterUnreachable as error:
            doubts.append(str(error))
            return False

    with pytest.raises(ClusterUnreachable):
        cluster.poll(task.job_id, task.attempt, 0)
    # who was silent once is not waited for again: all other jobs would wait with it
    monkeypatch.setattr(clusters, "ANSWER_S", 3600.0)
    wait_until(is_given_up, "the end of doubt")
    assert len(doubts) >= 2
    wait_until(lambda: not pids_of("Supervisor"), "the end of the stopped supervisor")


def test_a_cancelled_job_stops(cluster: RayCluster, root: Path) -> None:
    task = assignment(root, "job_cancelled", token_budget=64 * 100_000)

    def cancel_soon(report: Report) -> None:
        if report.kind == "metrics" and report.data["step"] == 20:
            cluster.cancel(task.job_id, task.attempt)

    outcome, _ = follow(cluster, task, cancel_soon)
    assert outcome.status == "cancelled"
    wait_until(lambda: not rank_pids(), "the end of both ranks")


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


@pytest.fixture(scope="module")
def two_hooks(root: Path) -> str:
    """A store of two hooks of different widths."""
    store_id = "act_" + "2" * 32
    make_store(root, store_id=store_id, hooks={"model.layers.0": 16, "model.layers.1": 12})
    return store_id


def joint(root: Path, store_id: str, job_id: str, **fields: Any) -> Assignment:
    """A short job on a store of two hooks, evaluated without a model."""
    fields |= {"token_budget": 64 * 100, "evaluation": {"ce": False, "n_tokens": 1024}}
    task = assignment(root, job_id, activations={"kind": "store", "id": store_id}, **fields)
    return replace(task, store_id=store_id)


def test_a_store_of_less_than_a_batch_is_refused(cluster: RayCluster, root: Path) -> None:
    with pytest.raises(InvalidRequest, match="2048 rows to train on, less than one batch of 4096") as caught:
        resolve(assignment(root, "job_few", batch_size=4096, token_budget=4096 * 10))
    assert caught.value.code == "store_too_small"


def test_a_mesh_of_auto_is_kept_by_later_attempts(
    cluster: RayCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster has grown meanwhile: another mesh would go on, and not on the same bits."""
    # of a smaller one no second rank would pay
    large: dict[str, Any] = {"mesh": "auto", "d_sae": 2**16, "batch_size": 1024, "token_budget": 1024 * 60}
    task = assignment(root, "job_auto", **large)
    monkeypatch.setattr(Devices, "of_cluster", classmethod(lambda _: Devices(n_cpus=2, n_gpus=0)))
    assert resolve(task).plan.mesh == Mesh(dp=1, features=2)
    checkpoint = {"format": FORMAT, "step": 50, "attempt": 1, "state": {}, "max_alignment_deviation": 0.0, "dp": 1}
    shard = {"file": "x", "start": 0, "stop": 32, "n_bytes": 1, "digest": ""}
    place = Location.open(f"file://{root}").child("checkpoints", "job_auto", "step-00000050.a0001")
    place.child("manifest.json").write_json(checkpoint | {"shards": [shard, shard | {"start": 32, "stop": 64}]})
    monkeypatch.setattr(Devices, "of_cluster", classmethod(lambda _: Devices(n_cpus=4, n_gpus=0)))
    assert resolve(task).plan.mesh == Mesh(dp=1, features=2)
    assert resolve(assignment(root, "job_other", **large)).plan.mesh == Mesh(dp=1, features=4)
    monkeypatch.setattr(Devices, "of_cluster", classmethod(lambda _: Devices(n_cpus=1, n_gpus=0)))
    assert resolve(task).plan.mesh == Mesh(dp=1, features=1), "what the cluster cannot hold is not waited for"


def test_what_was_trained_is_published_where_it_cannot_be_evaluated(cluster: RayCluster, root: Path) -> None:
    """The store's model is gone: nothing can be predicted, and every attempt would find that out anew."""
    task = assignment(root, "job_no_model", token_budget=64 * 60, evaluation={"n_tokens": 512, "n_ce_tokens": 256})
    ended, seen = follow(cluster, task)
    assert ended.status == "succeeded", ended
    metrics = ended.result["metrics"]
    assert metrics["skipped"].startswith("the evaluation failed (") and "fvu" not in metrics
    assert metrics["alignment"]["p50"] == pytest.approx(1, abs=1e-5)
    errors = [report.data["message"] for report in seen if report.kind == "log" and report.data["level"] == "error"]
    assert any(message.startswith("not evaluated (") for message in errors)
    folder = Location.open(ended.result["records"][0]["location"])
    assert {"gnomon.json", "cfg.json", "sae_weights.safetensors", "runner_cfg.json"} <= set(folder.list())


def test_a_crosscoder_is_trained_evaluated_and_published(cluster: RayCluster, root: Path, two_hooks: str) -> None:
    outcome, _ = follow(cluster, joint(root, two_hooks, "job_cross", hook_names=["model.layers.1", "model.layers.0"]))
    assert outcome.status == "succeeded", outcome
    record = outcome.result["records"][0]
    assert (record["hook_name"], record["d_in"]) == ("model.layers.1 + model.layers.0", 28)
    dictionary = load_folder(Path(record["location"].removeprefix("file://")))
    assert dictionary.cfg.hooks == {"model.layers.1": 12, "model.layers.0": 16}
    metrics = record["metrics"]
    assert metrics["n_tokens"] == 1024 and 0 < metrics["fvu"] < 1
    assert min(metrics["fvu_by_hook"].values()) <= metrics["fvu"] <= max(metrics["fvu_by_hook"].values())
    assert metrics["alignment"]["max_deviation"] <= 1e-5


def test_a_transcoder_is_trained_evaluated_and_published(cluster: RayCluster, root: Path, two_hooks: str) -> None:
    hooks = {"hook_name": "model.layers.0", "target_hook_name": "model.layers.1"}
    activation = {"kind": "jumprelu", "target_l0": 6, "bandwidth": 0.05, "initial_threshold": 0.05}
    task = joint(root, two_hooks, "job_trans", alignment="none", activation=activation, **hooks)
    outcome, _ = follow(cluster, task)
    assert outcome.status == "succeeded", outcome
    record = outcome.result["records"][0]
    assert (record["hook_name"], record["d_in"]) == ("model.layers.0 -> model.layers.1", 16)
    dictionary = load_folder(Path(record["location"].removeprefix("file://")))
    assert (dictionary.cfg.architecture, dictionary.cfg.d_out) == ("jumprelu_transcoder", 12)
    assert 0 < record["metrics"]["fvu"] < 1.5 and "alignment" not in record["metrics"]


def node_ids() -> tuple[str, ...]:
    """Nodes of this Ray."""
    import ray

    return tuple(node["NodeID"] for node in ray.nodes() if node["Alive"])


@pytest.mark.parametrize(("dp", "features"), [(1, 1), (2, 2)])
def test_a_training_that_was_asked_to_leave_goes_on_to_the_same_bits(
    cluster: RayCluster, root: Path, dp: int, features: int
) -> None:
    (node,) = node_ids()
    places: dict[str, Any] = {"places": (node,) * (dp * features), "mesh": (dp, features)}
    job_id = f"job_left_{dp}{features}"
    whole, told = follow(cluster, replace(assignment(root, f"{job_id}_whole", mesh="auto"), **places))
    assert whole.status == "succeeded"
    task = replace(assignment(root, job_id, mesh="auto"), **places)

    def leave(report: Report) -> None:
        if report.kind == "metrics" and report.data["step"] == 30:
            cluster.leave(task.job_id, task.attempt)

    left, first = follow(cluster, task, leave)
    assert left.status == "left"
    saved = [report.data["step"] for report in first if report.kind == "checkpoint"]
    assert saved
    assert saved[-1] < 400, "it left before the end"
    assert max(losses(first)) == saved[-1], "no step was made after the checkpoint"
    ended, second = follow(cluster, replace(task, attempt=2))
    assert ended.status == "succeeded"
    assert min(losses(second)) == saved[-1] + 1, "no step was made twice"
    assert losses(first) | losses(second) == losses(told)
    assert rank_pids() == []


def test_a_gang_is_where_it_was_placed_and_a_node_that_has_gone_is_a_loss(cluster: RayCluster, root: Path) -> None:
    task = replace(assignment(root, "job_gone"), places=("f" * 56,) * 2, mesh=(1, 2))
    ended, _ = follow(cluster, task)
    assert ended.status == "lost"
    assert "has gone before the gang was there" in ended.message
