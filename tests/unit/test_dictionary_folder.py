"""A damaged or foreign folder is refused with a reason, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gnomon
from gnomon.dictionary import load_folder
from gnomon.dictionary_config import MAX_CONFIG_BYTES
from gnomon.errors import CorruptArtifact, InvalidRequest, NotFound
from gnomon.safetensors_header import MAX_HEADER_BYTES
from tests.support.dictionary_folders import D_IN, D_SAE, make_folder, make_tensors

WEIGHTS = "sae_weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good dictionary to be spoiled."""
    return make_folder(tmp_path / "d", "topk")


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Replace the header of the weights, keeping their bytes."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])


@pytest.mark.parametrize("name", ["cfg.json", WEIGHTS])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        load_folder(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        gnomon.load(tmp_path / "nowhere")


@pytest.mark.parametrize("architecture", ["temporal", "batchtopk", 7])
def test_unsupported_architecture_says_which_can_be_read(folder: Path, architecture: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": architecture}))
    with pytest.raises(InvalidRequest, match="topk, jumprelu, standard, gated") as caught:
        load_folder(folder)
    assert caught.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ({"d_in": -1}, "d_in"),
        ({"d_sae": "many"}, "d_sae"),
        ({"dtype": "float8"}, "dtype"),
        ({"k": None}, "k=None"),
        ({"k": D_SAE + 1}, "d_sae=48"),
    ],
)
def test_config_that_means_something_else_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(CorruptArtifact, match=word):
        load_folder(make_folder(tmp_path / "x", "topk", **change))


@pytest.mark.parametrize(
    ("architecture", "change", "word"),
    [
        ("standard", {"architecture": "crosscoder"}, "activation=None"),
        ("standard", {"activation": "standard"}, "a crosscoder names its activation"),
        ("standard", {"architecture": "crosscoder", "activation": "standard"}, "hooks=None do not make up d_in=16"),
        ("standard", {"architecture": "crosscoder", "activation": "standard", "hooks": {"a": 9, "b": 8}}, "d_in=16"),
        ("standard", {"hooks": {"a": 16}}, "a crosscoder, and no other"),
        ("standard", {"architecture": "transcoder", "d_out": 16}, "apply_b_dec_to_input"),
        ("gated", {"architecture": "standard"}, "b_enc"),
        ("standard", {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 9}, r"\(48, 9\)"),
    ],
)
def test_config_that_contradicts_itself_or_the_weights_is_refused(
    tmp_path: Path, architecture: str, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(CorruptArtifact, match=word):
        load_folder(make_folder(tmp_path / "x", architecture, **change))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"d_in": 1}'])
def test_config_that_is_no_config_is_refused(folder: Path, content: bytes) -> None:
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"cfg\.json"):
        load_folder(folder)


def test_config_of_megabytes_is_not_read(folder: Path) -> None:
    (folder / "cfg.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(CorruptArtifact, match="at most"):
        load_folder(folder)


def test_shape_that_differs_from_the_config_is_refused(folder: Path) -> None:
    tensors = make_tensors("topk") | {"W_enc": torch.zeros(D_SAE, D_IN)}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CorruptArtifact, match=r"W_enc has shape \(48, 16\), cfg.json says \(16, 48\)"):
        load_folder(folder)


@pytest.mark.parametrize(("extra", "missing"), [({"scale": torch.zeros(1)}, ()), ({}, ("b_enc",))])
def test_tensors_missing_or_in_excess_are_named(
    folder: Path, extra: dict[str, torch.Tensor], missing: tuple[str, ...]
) -> None:
    tensors = {name: tensor for name, tensor in make_tensors("topk").items() if name not in missing}
    save_file(tensors | extra, folder / WEIGHTS)
    with pytest.raises(CorruptArtifact, match=r"b_enc|scale"):
        load_folder(folder)


def test_scalar_threshold_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "j", "jumprelu")
    save_file(make_tensors("jumprelu") | {"threshold": torch.tensor(0.5)}, folder / WEIGHTS)
    with pytest.raises(CorruptArtifact, match="threshold"):
        load_folder(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    save_file(make_tensors("topk") | {"b_enc": torch.zeros(D_SAE, dtype=torch.int64)}, folder / WEIGHTS)
    with pytest.raises(CorruptArtifact, match="dtype I64"):
        load_folder(folder)


@pytest.mark.parametrize("n_bytes", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: Path, n_bytes: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:n_bytes])
    with pytest.raises(CorruptArtifact):
        load_folder(folder)


def test_header_larger_than_the_limit_is_not_read(folder: Path) -> None:
    size = MAX_HEADER_BYTES + 1
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + b" " * (size + 8))
    with pytest.raises(CorruptArtifact, match="header of"):
        load_folder(folder)


def _overlap(header: dict[str, Any]) -> None:
    header["b_dec"]["data_offsets"] = header["b_enc"]["data_offsets"]


def _beyond(header: dict[str, Any]) -> None:
    start, stop = header["W_enc"]["data_offsets"]
    header["W_enc"]["data_offsets"] = [start, stop + (1 << 40)]


def _negative(header: dict[str, Any]) -> None:
    header["W_enc"]["shape"] = [-D_IN, -D_SAE]


def _huge(header: dict[str, Any]) -> None:
    header["W_enc"]["shape"] = [2**62, 4]


def _crowded(header: dict[str, Any]) -> None:
    header |= {f"t{i}": header["b_dec"] for i in range(100)}


def _malformed(header: dict[str, Any]) -> None:
    header["W_enc"] = [1, 2]


@pytest.mark.parametrize("change", [_overlap, _beyond, _negative, _huge, _crowded, _malformed])
def test_header_that_lies_is_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite_header(folder, change)
    with pytest.raises(CorruptArtifact, match="safetensors"):
        load_folder(folder)


def test_name_given_twice_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    raw = data[8 : 8 + size].rstrip().replace(b'"b_enc"', b'"b_dec"')
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])
    with pytest.raises(CorruptArtifact, match="twice"):
        load_folder(folder)


def test_deep_nesting_in_the_header_is_refused(folder: Path) -> None:
    raw = b"[" * 100_000
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CorruptArtifact, match="not JSON"):
        load_folder(folder)
