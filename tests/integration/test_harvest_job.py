"""A harvest on a real Ray: glassllm's activations against its own NumPy forward, resume, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnomon.errors import GnomonError, InvalidRequest
from gnomon.specs import HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit
from gnomon_workers.harvest import job
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.harvest.job import run_harvest
from gnomon_workers.harvest.packing import SegmentPlan
from gnomon_workers.harvest.text import check_text
from gnomon_workers.harvest.worker import HarvestTask, HarvestWorker
from gnomon_workers.models import catalog
from gnomon_workers.runtime import gang as gangs
from gnomon_workers.runtime.answers import answers, value_of
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.runtime.reporting import Cancelled, Left, Reporter, WorkerLost
from tests.support.models import EOS_ID, PAD_ID, glassllm_ids, glassllm_residuals, make_glassllm, write_corpus
from tests.support.own_processes import own_pids
from tests.support.rays import local_ray
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and a corpus."""
    root = tmp_path_factory.mktemp("inputs")
    make_glassllm(root / "glassllm")
    write_corpus(root / "alice.jsonl", n_documents=600)
    return root


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of two cores."""
    with local_ray(n_cpus=2):
        yield


def make_spec(inputs: Path, **changes: Any) -> HarvestSpec:
    """A harvest of two layers of glassllm in float32."""
    fields = {
        "model": {"source": str(inputs / "glassllm"), "dtype": "float32"},
        "text": [{"url": str(inputs / "alice.jsonl")}],
        "hooks": ["model.layers.2", "model.layers.0"],
        "context_length": 32, "token_budget": 6_000, "segment_tokens": 1024, "dtype": "float32",
        "held_out_every": 4, "batch_contexts": 5,
    }  # fmt: skip
    return HarvestSpec.model_validate({**fields, **changes})


def assign(inputs: Path, root: Path, spec: HarvestSpec, *, attempt: int = 1) -> Assignment:
    """The assignment that the service would make."""
    roots = (str(inputs),)
    model = catalog.describe_model(spec.model, roots)
    return Assignment(
        job_id="job_x",
        attempt=attempt,
        project="p",
        kind="harvest",
        spec=spec.model_dump(mode="json"),
        storage_root=root.as_uri(),
        input_roots=roots,
        store_id=store_id(spec, model.fingerprint(), check_text(spec.text, roots)),
    )


def open_store(assignment: Assignment) -> ActivationStore:
    """The store of an assignment."""
    return ActivationStore.open(Location.open(assignment.storage_root).child("activations", assignment.store_id))


@pytest.fixture(scope="module")
def harvested(inputs: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A finished harvest: assignment, result, reporter."""
    assignment = assign(inputs, tmp_path_factory.mktemp("store"), make_spec(inputs))
    reporter = Reporter()
    return assignment, run_harvest(assignment, reporter), reporter


def test_activations_equal_an_independent_forward_pass(harvested: tuple[Any, ...]) -> None:
    store = open_store(harvested[0])
    n_compared = 0
    for segment in store.manifest.segments:
        contexts = store.contexts(segment)
        context_ids, positions = store.column(segment, "context_ids"), store.column(segment, "positions")
        rows = {hook: store.read_rows(hook, segment, 0, segment.n_rows) for hook in store.manifest.hooks}
        for number in range(0, len(contexts), 7):
            reference = glassllm_residuals(contexts[number].tolist())
            mine = context_ids == number
            for hook, layer in (("model.layers.0", 0), ("model.layers.2", 2)):
                np.testing.assert_allclose(rows[hook][mine], reference[layer][positions[mine]], atol=3e-5)
            n_compared += int(mine.sum())
    assert n_compared > 500


def test_contexts_are_the_packed_text(harvested: tuple[Any, ...], inputs: Path) -> None:
    store = open_store(harvested[0])
    lines = (inputs / "alice.jsonl").read_text().splitlines()
    text = [token for line in lines for token in [*glassllm_ids(json.loads(line)["text"]), EOS_ID]]
    parts = {split: np.concatenate([store.contexts(s) for s in store.manifest.split(split)]) for split in
             ("segments", "held_out")}  # fmt: skip
    n_contexts = len(parts["segments"]) + len(parts["held_out"])
    assert n_contexts == min(6_000, len(text)) // 32
    expected = np.array(text[: n_contexts * 32]).reshape(-1, 32)
    is_held_out = np.arange(n_contexts) % 4 == 1
    np.testing.assert_array_equal(parts["held_out"], expected[is_held_out])
    np.testing.assert_array_equal(parts["segments"], expected[~is_held_out])


def test_first_positions_and_special_tokens_are_not_stored(harvested: tuple[Any, ...]) -> None:
    store = open_store(harvested[0])
    for segment in store.manifest.segments:
        contexts = store.contexts(segment)
        assert (store.column(segment, "positions") >= 1).all()
        assert not np.isin(store.column(segment, "tokens"), [EOS_ID, PAD_ID]).any()
        assert segment.n_rows == (~np.isin(contexts[:, 1:], [0, 1, 2, 3])).sum()


def test_result_and_reports(harvested: tuple[Any, ...]) -> None:
    assignment, result, reporter = harvested
    manifest = open_store(assignment).manifest
    record = result["record"]
    assert record["hooks"] == {"model.layers.2": 128, "model.layers.0": 128}
    assert (record["n_rows"], record["n_held_out_rows"]) == (manifest.n_rows, manifest.n_held_out_rows)
    assert result["n_tokens"] == manifest.n_tokens
    reports = reporter.after(0)
    assert reports[0].kind == "phase" and reports[0].data["total"] == manifest.n_tokens
    progress = [report.data["done"] for report in reports if report.kind == "progress"]
    assert progress == sorted(progress) and progress[-1] == manifest.n_tokens
    segments = [report.data for report in reports if report.kind == "segment"]
    assert len(segments) == len(manifest.segments) and not any(data["kept"] for data in segments)
    assert manifest.model["kind_of_model"] == "causal"
    assert manifest.tokenizer["special_token_ids"] == [0, 1, 2, 3]


def test_a_sealed_store_is_not_harvested_again(harvested: tuple[Any, ...]) -> None:
    assignment, first, _ = harvested
    reporter = Reporter()
    again = run_harvest(assignment, reporter)
    assert again["record"] == first["record"]
    assert again["n_tokens"] == 0
    assert reporter.after(0) == ()


def worker_pids() -> list[int]:
    """Processes of this test's harvest workers, which Ray names after their actor class."""
    return own_pids("HarvestWorker")


class NotingHarvestWorker(HarvestWorker):
    """A harvest worker that leaves a note whenever it has loaded a model."""

    @answers
    def prepare(self, task: HarvestTask) -> dict[str, int]:
        done = value_of(super().prepare(task))
        with (Path(Location.open(task.store).path).parents[1] / "notes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return done


class DyingHarvestWorker(HarvestWorker):
    """A harvest worker that the system kills as soon as it works on the segment number 1."""

    def _harvest(self, plan: SegmentPlan) -> SegmentCommit:
        if (plan.split, plan.index) == ("segments", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._harvest(plan)


class SlowHarvestWorker(HarvestWorker):
    """A harvest worker that takes its time for every segment."""

    def _harvest(self, plan: SegmentPlan) -> SegmentCommit:
        time.sleep(0.7)
        return super()._harvest(plan)


class BrokenHarvestWorker(HarvestWorker):
    """A harvest worker that never gets its model, where it is worker number 0."""

    @answers
    def prepare(self, task: HarvestTask) -> dict[str, int]:
        if self._index == 0:
            raise MemoryError("the model does not fit")
        return value_of(super().prepare(task))


def told(reporter: Reporter, words: str) -> list[str]:
    """Warnings with these words."""
    logs = [report.data for report in reporter.after(0) if report.kind == "log" and report.data["level"] == "warning"]
    return [log["message"] for log in logs if words in log["message"]]


def assert_equal(ours: ActivationStore, theirs: ActivationStore) -> None:
    """Both hold the same files to the bit, and nothing else lies there."""
    assert list(ours.damages()) == []
    for mine, other in zip(ours.manifest.segments, theirs.manifest.segments, strict=True):
        assert ours.commit(mine).files == theirs.commit(other).files
    folder = Path(ours.location.path)
    on_disk = {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.zarr")}
    assert on_disk == {part.path for part in ours.manifest.segments}


@pytest.fixture(scope="module")
def whole(inputs: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The store of an undisturbed harvest of 60,000 tokens."""
    assignment = assign(inputs, tmp_path_factory.mktemp("whole"), make_spec(inputs, token_budget=60_000))
    run_harvest(assignment, Reporter())
    return open_store(assignment)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_worker_is_replaced_and_the_others_keep_their_model(
    inputs: Path, whole: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    monkeypatch.setattr(job, "HarvestWorker", NotingHarvestWorker)
    monkeypatch.setattr(gangs, "STALL_S", 5.0)
    assignment = assign(inputs, tmp_path, make_spec(inputs, token_budget=60_000))
    notes = tmp_path / "notes"
    victim: list[int] = []

    def loaded() -> list[int]:
        return [int(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def lose_one() -> None:
        wait_until(lambda: len(loaded()) == 2, "both workers' models", every_s=0.002)
        victim.append(loaded()[0])
        os.kill(victim[0], how)

    killer = threading.Thread(target=lose_one, daemon=True)
    killer.start()
    reporter = Reporter()
    result = run_harvest(assignment, reporter)
    killer.join()
    store = open_store(assignment)
    assert_equal(store, whole)
    assert result["n_tokens"] == store.manifest.n_tokens
    commits = [store.commit(segment) for segment in store.manifest.segments]
    assert {commit.attempt for commit in commits} == {1}
    (message,) = told(reporter, "is replaced")
    assert re.search(
        r"worker \d is replaced, and .* harvested again: (a worker died|worker \d has not answered)", message
    )
    # every process loaded its model once: the one that was lost, its replacement if it came to that, and the other
    assert len(loaded()) == len(set(loaded())) and len(loaded()) in (2, 3)
    progress = [report.data["done"] for report in reporter.after(0) if report.kind == "progress"]
    assert progress == sorted(progress)
    wait_until(lambda: not worker_pids(), "the end of all workers")


def test_a_segment_that_kills_its_workers_loses_the_attempt_and_keeps_the_others(
    inputs: Path, whole: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, reporter = make_spec(inputs, token_budget=60_000), Reporter()
    with monkeypatch.context() as patched:
        patched.setattr(job, "HarvestWorker", DyingHarvestWorker)
        with pytest.raises(
            WorkerLost, match="3 workers were lost while they harvested segments/part-00001: a worker d"
        ):
            run_harvest(assign(inputs, tmp_path, spec), reporter)
    assert len(told(reporter, "is replaced, and segments/part-00001")) == 2
    again, reporter = assign(inputs, tmp_path, spec, attempt=2), Reporter()
    result = run_harvest(again, reporter)
    kept = [report.data["kept"] for report in reporter.after(0) if report.kind == "segment"]
    assert any(kept) and not all(kept)
    assert 0 < result["n_tokens"] < whole.manifest.n_tokens
    assert_equal(open_store(again), whole)
    wait_until(lambda: not worker_pids(), "the end of all workers")


def test_a_place_in_which_no_worker_lives_is_given_up_and_the_others_go_on(
    inputs: Path, whole: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "HarvestWorker", BrokenHarvestWorker)
    spec, reporter = make_spec(inputs, token_budget=60_000), Reporter()
    assignment = assign(inputs, tmp_path, spec)
    run_harvest(assignment, reporter)
    assert_equal(open_store(assignment), whole)
    alone = assign(inputs, tmp_path / "alone", spec.model_copy(update={"n_workers": 1}))
    with pytest.raises(WorkerLost, match=r"worker 0 was lost 3 times and did nothing between: .*model does not fit"):
        run_harvest(alone, reporter := Reporter())
    assert len(told(reporter, "worker 0 is replaced, and no segment harvested again")) == 2


def test_cancelling_stops_the_workers(inputs: Path, ray_cluster: None, tmp_path: Path) -> None:
    reporter = Reporter()
    reporter.cancel()
    with pytest.raises(Cancelled):
        run_harvest(assign(inputs, tmp_path, make_spec(inputs)), reporter)
    wait_until(lambda: not worker_pids(), "the end of all workers")


def test_bad_documents_are_counted_alike_by_every_attempt(inputs: Path, ray_cluster: None, tmp_path: Path) -> None:
    lines = (inputs / "alice.jsonl").read_text().splitlines()
    with_bad = [*lines[:2], "{", *lines[2:300], '{"text": 5}', *lines[300:], "{}"]
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "bad.jsonl").write_text("\n".join(with_bad))
    source = {"url": str(tmp_path / "in" / "bad.jsonl"), "max_bad_documents": 3}
    spec = make_spec(tmp_path / "in", text=[source], token_budget=10**6, segment_tokens=4096)
    results, reporter = [], Reporter()
    for attempt in (1, 2):
        assignment = assign(tmp_path / "in", tmp_path, spec, attempt=attempt)
        results.append(run_harvest(assignment, reporter))
        manifest = open_store(assignment).manifest
        place = Path(open_store(assignment).location.path)
        (place / "manifest.json").unlink()
        (place / "segments" / "part-00000.json").unlink()
    wanted = (
        "'bad.jsonl' line 3 is not JSON",
        "'bad.jsonl' line 302 holds a number",
        "'bad.jsonl' line 603 has no field",
    )
    for result in results:
        assert result["n_bad_documents"] == 3
        assert all(map(str.startswith, result["bad_documents"], wanted))
    assert results[1]["n_tokens"] < results[0]["n_tokens"]
    assert manifest.text["n_bad_documents"] == 3
    assert len(told(reporter, "3 bad documents are passed over: 'bad.jsonl' line 3 is not JSON")) == 2
    n_rows, n_held_out = manifest.n_rows, manifest.n_held_out_rows
    says = f"tokens: the store has {n_rows} rows, and {n_held_out} held out"
    assert len(told(reporter, "of token_budget=1000000 " + says)) == 2
    few = make_spec(tmp_path / "in", text=[{**source, "max_bad_documents": 2}], token_budget=10**6)
    with pytest.raises(InvalidRequest, match=r"'bad.jsonl' line 603 .* bad document number 3") as caught:
        run_harvest(assign(tmp_path / "in", tmp_path, few), Reporter())
    assert caught.value.code == "too_many_bad_documents"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a hook that is no module": ({"hooks": ["model.layers.7"]}, "unknown_hook"),
    "too little text for a context": ({"text": [{"url": "short.txt"}]}, "empty_corpus"),
    "text that breaks off": ({"text": [{"url": "broken.jsonl"}]}, "bad_text"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_jobs_own_errors_are_final(inputs: Path, ray_cluster: None, tmp_path: Path, case: str) -> None:
    changes, code = BAD[case]
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "short.txt").write_text("Alice.")
    good = (inputs / "alice.jsonl").read_text()
    (tmp_path / "in" / "broken.jsonl").write_text(good + "{\n")
    if "text" in changes:
        changes = {"text": [{"url": str(tmp_path / "in" / source["url"])} for source in changes["text"]]}
    assignment = assign(tmp_path / "in", tmp_path / "store", make_spec(tmp_path / "in", **changes, token_budget=10**6))
    with pytest.raises(InvalidRequest) as caught:
        run_harvest(assignment, Reporter())
    assert caught.value.code == code


def test_sources_changed_after_submission_are_refused(inputs: Path, ray_cluster: None, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path / "in")
    assignment = assign(tmp_path / "in", tmp_path / "store", make_spec(tmp_path / "in"))
    with (tmp_path / "in" / "alice.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(GnomonError) as caught:
        run_harvest(assignment, Reporter())
    assert caught.value.code == "source_changed"


def node_id() -> str:
    """The node of this Ray."""
    import ray

    return str(ray.nodes()[0]["NodeID"])


class Harvesting(threading.Thread):
    """A harvest in a thread of its own, which ends with a result or an error."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(daemon=True)
        self.assignment, self.reporter = assignment, Reporter()
        self.error: BaseException | None = None
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = run_harvest(self.assignment, self.reporter)
        except (Left, GnomonError) as error:
            self.error = error

    def n_segments(self) -> int:
        """Segments committed by it."""
        return sum(report.kind == "segment" and not report.data["kept"] for report in self.reporter.after(0))

    def end(self) -> None:
        """Wait for its end."""
        wait_until(lambda: not self.is_alive(), "the end of the harvest")


@pytest.mark.long
def test_a_harvest_shrinks_and_grows_between_segments(
    inputs: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(inputs, token_budget=60_000)
    undisturbed = assign(inputs, tmp_path / "b", spec)
    run_harvest(undisturbed, Reporter())
    monkeypatch.setattr(job, "HarvestWorker", SlowHarvestWorker)
    node = node_id()
    harvesting = Harvesting(replace(assign(inputs, tmp_path / "a", spec), places=(node, node)))
    reporter = harvesting.reporter
    wait_until(lambda: reporter.places == (node, node), "two workers")
    reporter.places_wanted = (node,)
    wait_until(lambda: reporter.places == (node,), "one worker")
    n_before = harvesting.n_segments()
    reporter.places_wanted = (node, node)
    wait_until(lambda: reporter.places == (node, node), "two workers again")
    harvesting.end()
    assert harvesting.error is None
    assert n_before < harvesting.n_segments(), "it was still at work"
    assert rows_of(open_store(harvesting.assignment)) == rows_of(open_store(undisturbed))


def test_a_harvest_that_was_asked_to_leave_keeps_what_it_has(
    inputs: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "HarvestWorker", SlowHarvestWorker)
    spec = make_spec(inputs, token_budget=20_000)
    assignment = assign(inputs, tmp_path, spec)
    first = Harvesting(assignment)
    wait_until(lambda: first.n_segments() > 2, "some segments")
    first.reporter.leave()
    first.end()
    assert isinstance(first.error, Left)
    n_kept = first.n_segments()
    reporter = Reporter()
    run_harvest(replace(assignment, attempt=2), reporter)
    kept = [report.data["kept"] for report in reporter.after(0) if report.kind == "segment"]
    assert sum(kept) == n_kept
    assert not all(kept)


def rows_of(store: ActivationStore) -> dict[tuple[str, int, str], bytes]:
    """Every row of a store, by split, segment and hook."""
    return {
        (segment.split, segment.index, hook): store.read_rows(hook, segment, 0, segment.n_rows).tobytes()
        for segment in store.manifest.segments
        for hook in store.manifest.hooks
    }
