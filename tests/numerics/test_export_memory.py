"""A dictionary is exported and looked at some features at a time: the result is the same, and little is held."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gnomon.dictionary import load_folder
from gnomon.errors import CorruptArtifact
from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, TopK
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint, Shard
from gnomon_workers.dictionaries import weights
from gnomon_workers.dictionaries.weights import WEIGHTS
from gnomon_workers.evaluate import dictionaries
from gnomon_workers.evaluate.dictionaries import alignment_of, alignment_of_files, read_config
from gnomon_workers.evaluate.metrics import alignment_metrics
from tests.support.dictionary_folders import make_config, make_folder
from tests.support.exported import exported, trained_folder, transcoder_folder
from tests.support.steps import plan_of

MB = 1 << 20
KINDS: list[Activation] = [TopK(k=5), BatchTopK(k=5), JumpReLU(), Gated()]


@pytest.mark.parametrize("is_transcoder", [False, True])
@pytest.mark.parametrize("activation", KINDS, ids=lambda activation: str(activation.kind))
def test_features_written_a_few_at_a_time_are_those_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: Activation, is_transcoder: bool
) -> None:
    make = transcoder_folder if is_transcoder else trained_folder
    whole = load_folder(make(tmp_path / "whole", activation)).state_dict()
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 200)  # of some features, and the last block is shorter
    for name, tensor in load_folder(make(tmp_path / "parts", activation)).state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "standard", "gated"])
def test_alignment_of_files_is_that_of_the_loaded_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = make_folder(tmp_path / "dictionary", kind)
    dictionary = load_folder(folder)
    wanted = alignment_metrics(dictionary.magnitude_encoder(), dictionary.W_dec)
    monkeypatch.setattr(dictionaries, "BLOCK_ELEMENTS", 7 * dictionary.cfg.d_in)
    found = alignment_of(Location.open(str(folder)))
    assert found is not None
    assert found.histogram.edges == pytest.approx(wanted.histogram.edges)
    assert sum(found.histogram.counts) == sum(wanted.histogram.counts)
    numbers = [record.model_dump(exclude={"histogram"}) for record in (found, wanted)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)


def test_a_transcoder_has_no_alignment_and_a_damaged_file_none_that_is_told(tmp_path: Path) -> None:
    assert alignment_of_files(transcoder_folder(tmp_path / "transcoder", TopK(k=5))) is None
    folder = make_folder(tmp_path / "damaged", "topk")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4])
    with pytest.raises(CorruptArtifact):
        alignment_of_files(folder)


def test_a_config_is_read_without_the_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dictionary", "topk")
    (folder / WEIGHTS).unlink()
    assert read_config(Location.open(str(folder))).k == make_config("topk")["k"]


D_IN, D_SAE = 512, 1 << 16
"""128 MB for each of the two matrices."""


def _highest(call: Callable[[], object]) -> int:
    """Bytes that this process holds at most during a call, beyond those before; without files that it maps."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    before, highest, over = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.001):
            highest = max(highest, held())

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    over.set()
    thread.join()
    return highest - before


def _measure(folder: Path) -> tuple[int, int]:
    torch.set_num_threads(1)
    torch.ones(256, 256).double().norm()
    plan = plan_of(d_sae=D_SAE, d_in=D_IN, activation=TopK(k=5))
    shard = Shard(file="shard.safetensors", start=0, stop=D_SAE, n_bytes=0, digest="")
    checkpoint = Checkpoint(step=1, attempt=1, state={}, max_alignment_deviation=0.0, shards=(shard,))
    place = Location.open(str(folder))
    writing = _highest(lambda: exported(folder / "out", plan, checkpoint, place))
    looking = _highest(lambda: alignment_of_files(folder / "out"))
    return writing, looking


def test_neither_export_nor_alignment_holds_the_weights(tmp_path: Path) -> None:
    rows = torch.randn(D_SAE, D_IN)
    shard = {"W_enc_rows": rows, "W_dec": rows + 1, "b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_IN)}
    (tmp_path / "step-00000001.a0001").mkdir()
    save_file(
        {**shard, "n_tokens_since_fired": torch.zeros(D_SAE, dtype=torch.int64)},
        tmp_path / "step-00000001.a0001/shard.safetensors",
    )
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            writing, looking = pool.apply(_measure, (tmp_path,))
    finally:
        shutil.rmtree(tmp_path)  # pytest keeps such folders for a while
    assert writing < 100 * MB and looking < 100 * MB, (writing / MB, looking / MB)
