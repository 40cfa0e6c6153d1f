"""A loaded dictionary computes what its definition says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gnomon
from gnomon.dictionary import jumprelu_acts, load_folder, topk_acts
from tests.support.dictionary_folders import D_IN, D_SAE, K, make_folder, make_tensors

ARCHITECTURES = ("topk", "jumprelu", "standard", "gated")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_decode_follow_the_definition(tmp_path: Path, architecture: str) -> None:
    weights = make_tensors(architecture)
    dictionary = load_folder(make_folder(tmp_path / "d", architecture))
    x = torch.randn(7, D_IN)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights.get("b_enc", 0)
    if architecture == "gated":
        kept = (pre + weights["b_gate"] > 0).float()
        pre = (x - weights["b_dec"]) @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"]
    elif architecture == "topk":
        kept = torch.zeros_like(pre).scatter(-1, pre.topk(K).indices, 1.0)
    else:
        kept = (pre > (weights["threshold"] if architecture == "jumprelu" else 0.0)).float()
    acts = torch.relu(pre) * kept
    torch.testing.assert_close(dictionary.encode(x), acts)
    torch.testing.assert_close(dictionary(x), acts @ weights["W_dec"] + weights["b_dec"])
    assert int((dictionary.encode(x) > 0).sum()) > 0


def test_input_is_not_centred_where_the_config_says_so(tmp_path: Path) -> None:
    dictionary = load_folder(make_folder(tmp_path / "d", "standard", apply_b_dec_to_input=False))
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(dictionary.encode(x), torch.relu(x @ dictionary.W_enc + dictionary.b_enc))


def test_topk_ties_go_to_the_lowest_index() -> None:
    pre = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -1.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[0.0, 3.0, 2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(topk_acts(pre, 3), expected, rtol=0, atol=0)


def test_topk_never_keeps_what_relu_would_zero() -> None:
    assert topk_acts(torch.tensor([[-1.0, -2.0, 0.5]]), 2).tolist() == [[0.0, 0.0, 0.5]]


def test_jumprelu_is_strict_at_the_threshold() -> None:
    acts = jumprelu_acts(torch.tensor([0.5, 0.6, -1.0]), torch.tensor([0.5, 0.5, -2.0]))
    torch.testing.assert_close(acts, torch.tensor([0.0, 0.6, 0.0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_stays_visible(tmp_path: Path, architecture: str) -> None:
    dictionary = load_folder(make_folder(tmp_path / "d", architecture))
    assert dictionary(torch.full((1, D_IN), torch.nan)).isnan().all()


def test_attributes_that_saebench_reads(tmp_path: Path) -> None:
    dictionary = load_folder(make_folder(tmp_path / "d", "topk"))
    assert dictionary.W_enc.shape == (D_IN, D_SAE)
    assert dictionary.W_dec.shape == (D_SAE, D_IN)
    assert dictionary.b_enc.shape == (D_SAE,)
    assert dictionary.b_dec.shape == (D_IN,)
    assert dictionary.dtype == torch.float32
    assert dictionary.device == torch.device("cpu")
    assert (dictionary.cfg.d_in, dictionary.cfg.d_sae) == (D_IN, D_SAE)
    assert (dictionary.cfg.hook_name, dictionary.cfg.hook_layer) == ("blocks.2.hook_resid_post", 2)
    assert dictionary.cfg.model_name == "tiny"
    assert dictionary.cfg.context_size == 128
    torch.testing.assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(D_SAE))
    torch.testing.assert_close(dictionary.alignment(), torch.ones(D_SAE))


def test_attributes_that_saebench_writes(tmp_path: Path) -> None:
    """Its standardisation sets names of its own on cfg, among them such as are read from the metadata here."""
    dictionary = load_folder(make_folder(tmp_path / "d", "topk"))
    noted = {"dtype": "bfloat16", "device": "cpu", "model_name": "pythia-70m", "hook_layer": 4, "hook_name": "x.4.y"}
    for name, value in noted.items():
        setattr(dictionary.cfg, name, value)
    assert {name: getattr(dictionary.cfg, name) for name in noted} == noted
    assert dictionary.cfg.d_sae == D_SAE
    assert not hasattr(dictionary.cfg, "prepend")
    assert not hasattr(load_folder(tmp_path / "d").cfg, "device"), "each has metadata of its own"


def test_dtype_is_changed_on_request_and_inputs_follow(tmp_path: Path) -> None:
    dictionary = gnomon.load(make_folder(tmp_path / "d", "jumprelu"), dtype=torch.bfloat16)
    assert dictionary.dtype == torch.bfloat16
    assert dictionary.threshold is not None
    assert dictionary.threshold.dtype == torch.bfloat16
    assert dictionary(torch.randn(2, 3, D_IN)).shape == (2, 3, D_IN)
    assert dictionary.float()(torch.randn(2, D_IN)).dtype == torch.float32


def test_gradients_reach_the_input_and_not_the_weights(tmp_path: Path) -> None:
    dictionary = load_folder(make_folder(tmp_path / "d", "topk"))
    x = torch.randn(4, D_IN, requires_grad=True)
    dictionary(x).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert all(not parameter.requires_grad for parameter in dictionary.parameters())
