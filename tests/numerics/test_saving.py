"""Saving while training goes on: files, receipts, and errors that surface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gnomon.errors import Conflict, CorruptArtifact, StoreUnavailable
from gnomon.specs import BatchTopK
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import committed_checkpoints
from gnomon_workers.checkpoints.tensor_file import PIECE_BYTES, TensorReader, write_tensors
from gnomon_workers.runtime import failpoints
from gnomon_workers.train import saving
from gnomon_workers.train.saving import CheckpointWriter, Saved, save_checkpoint
from gnomon_workers.train.state import load_checkpoint, state_tensors
from gnomon_workers.train.step import TrainStep
from tests.support.checkpoints import latest_whole
from tests.support.steps import data, plan_of, step_of


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.open(f"file://{tmp_path}").child("checkpoints")


@pytest.fixture
def step() -> TrainStep:
    """A step some batches old."""
    step = step_of(plan_of(activation=BatchTopK(k=4)))
    for t in range(3):
        step(t, data(32, seed=t))
    return step


def test_files_are_read_by_the_safetensors_library_and_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(PIECE_BYTES // 4 + 77, 3, generator=generator),
        "transposed": torch.randn(5, 7, generator=generator).t(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "counts": torch.arange(9),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        n_bytes = write_tensors(stream, tensors)
    assert path.stat().st_size == n_bytes
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    with path.open("rb") as stream:
        reader = TensorReader(stream)
        part = torch.zeros(PIECE_BYTES // 4 + 5, 3)
        reader.read_rows("large", 70, part)
        assert torch.equal(part, tensors["large"][70 : 70 + len(part)])
        turned = torch.zeros(5, 4).t()
        reader.read_rows("transposed", 2, turned)
        assert torch.equal(turned, tensors["transposed"][2:6])
        for name, start, target in (
            ("missing", 0, part),
            ("large", 100, part),
            ("counts", 0, torch.zeros(9)),
            ("half", 0, torch.zeros(3, 4, dtype=torch.bfloat16)),
        ):
            with pytest.raises(CorruptArtifact, match="another dictionary"):
                reader.read_rows(name, start, target)


def test_training_goes_on_while_a_checkpoint_is_uploaded(
    folder: Location, step: TrainStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    upload = Location.upload

    def slow(self: Location, local: Path) -> None:
        assert may_go_on.wait(60)
        upload(self, local)

    monkeypatch.setattr(Location, "upload", slow)
    committed: list[Saved] = []
    with CheckpointWriter(folder, step, attempt=1, on_commit=committed.append) as writer:
        before = {name: tensor.clone() for name, tensor in state_tensors(step).items()}
        numbers = dict(step.state)
        writer.begin(3)
        for t in range(3, 6):
            step(t, data(32, seed=t))
            writer.check()
        assert not committed and list(committed_checkpoints(folder)) == []
        may_go_on.set()
        writer.finish()
    assert [saved.checkpoint.step for saved in committed] == [3]
    assert 0 < committed[0].copy_s < committed[0].duration_s
    fresh = step_of(step.plan)
    load_checkpoint(folder, committed[0].checkpoint, fresh)
    assert fresh.state == numbers
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_tensors(fresh).items())


def test_a_new_checkpoint_waits_for_the_one_before(
    folder: Location, step: TrainStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SETTLE_S", 0.05)
    may_go_on = threading.Event()
    upload = Location.upload

    def slow(self: Location, local: Path) -> None:
        assert may_go_on.wait(60)
        upload(self, local)

    monkeypatch.setattr(Location, "upload", slow)
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 4:
            may_go_on.set()

    with CheckpointWriter(folder, step, attempt=1, beat=beat) as writer:
        writer.begin(3)
        writer.begin(4)
        assert len(beats) >= 4
        assert [checkpoint.step for checkpoint in committed_checkpoints(folder)] == [3]
        writer.finish()
    assert [checkpoint.step for checkpoint in committed_checkpoints(folder)] == [4, 3]


@pytest.fixture
def failing_upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.after_upload@hit=2:raise")
    failpoints.arm(0)
    yield
    monkeypatch.delenv(failpoints.VARIABLE)
    failpoints.arm(0)


@pytest.mark.usefixtures("failing_upload")
def test_an_error_of_the_store_surfaces_at_the_next_step_and_harms_nothing(folder: Location, step: TrainStep) -> None:
    with pytest.raises(StoreUnavailable, match="after_upload"), CheckpointWriter(folder, step, attempt=1) as writer:
        writer.begin(3)
        writer.begin(4)
        for t in range(4, 10_000):
            step(t, data(32, seed=t))
            writer.check()
    found, damaged = latest_whole(folder)
    assert found is not None and found.step == 3 and not damaged


@pytest.mark.usefixtures("failing_upload")
def test_an_error_of_the_last_checkpoint_is_waited_for(folder: Location, step: TrainStep) -> None:
    save_checkpoint(folder, step, number=3, attempt=1)
    with pytest.raises(StoreUnavailable, match="after_upload"):
        save_checkpoint(folder, step, number=4, attempt=1)


def test_two_gangs_at_one_attempt_do_not_mix(folder: Location, step: TrainStep) -> None:
    save_checkpoint(folder, step, number=3, attempt=1)
    with pytest.raises(Conflict, match="two gangs"):
        save_checkpoint(folder, step, number=3, attempt=1)


def test_a_receipt_that_never_comes_is_given_up(
    folder: Location, step: TrainStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RECEIPTS_S", 0.1)
    turns = iter(range(100))
    monkeypatch.setattr(saving, "_receipt_name", lambda *_: f"receipt-{next(turns)}.json")
    with pytest.raises(StoreUnavailable, match="after 0 s"):
        save_checkpoint(folder, step, number=3, attempt=1)
    assert list(committed_checkpoints(folder)) == []


def test_files_and_manifest_are_the_same_each_time(folder: Location, step: TrainStep) -> None:
    first = save_checkpoint(folder.child("a"), step, number=3, attempt=1)
    second = save_checkpoint(folder.child("b"), step, number=3, attempt=1)
    assert first == second
    place = folder.child("a", first.name)
    assert place.list() == [
        "manifest.json",
        "receipt-0000-of-0001.r0000.json",
        "shard-0000-of-0001.safetensors",
    ]
    receipt = json.loads(place.child("receipt-0000-of-0001.r0000.json").read_bytes())
    assert receipt["shard"]["digest"] == first.shards[0].digest
