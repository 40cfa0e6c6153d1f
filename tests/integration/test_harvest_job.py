"""A harvest on a real Ray: glassllm's activations against its own NumPy forward, resume, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnomon.errors import GnomonError, InvalidRequest
from gnomon.specs import HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.harvest.job import run_harvest
from gnomon_workers.harvest.text import check_text
from gnomon_workers.models import catalog
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.runtime.reporting import Cancelled, Reporter, WorkerLost
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


def test_after_a_killed_worker_the_next_attempt_gives_the_same_store(
    inputs: Path, ray_cluster: None, tmp_path: Path
) -> None:
    spec = make_spec(inputs, token_budget=60_000)
    whole = assign(inputs, tmp_path / "whole", spec)
    run_harvest(whole, Reporter())
    assignment = assign(inputs, tmp_path / "killed", spec)
    segments = tmp_path / "killed" / "activations" / assignment.store_id / "segments"

    def kill_after_first_commit() -> None:
        wait_until(lambda: list(segments.glob("*.json")), "the first commit", every_s=0.002)
        os.kill(worker_pids()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_after_first_commit)
    killer.start()
    with pytest.raises(WorkerLost):
        run_harvest(assignment, Reporter())
    killer.join()
    reporter = Reporter()
    result = run_harvest(assign(inputs, tmp_path / "killed", spec, attempt=2), reporter)
    kept = [report.data["kept"] for report in reporter.after(0) if report.kind == "segment"]
    store, first = open_store(assignment), open_store(whole)
    assert any(kept) and not all(kept)
    assert 0 < result["n_tokens"] < store.manifest.n_tokens
    for mine, theirs in zip(store.manifest.segments, first.manifest.segments, strict=True):
        assert store.commit(mine).files == first.commit(theirs).files
    store.verify()
    names = {part.path for part in store.manifest.segments}
    on_disk = {f"{split}/{path.name}" for split in ("segments", "held_out")
               for path in (segments.parent / split).glob("*.zarr")}  # fmt: skip
    assert on_disk == names
    wait_until(lambda: not worker_pids(), "the end of all workers")


def test_cancelling_stops_the_workers(inputs: Path, ray_cluster: None, tmp_path: Path) -> None:
    reporter = Reporter()
    reporter.cancel()
    with pytest.raises(Cancelled):
        run_harvest(assign(inputs, tmp_path, make_spec(inputs)), reporter)
    wait_until(lambda: not worker_pids(), "the end of all workers")


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
