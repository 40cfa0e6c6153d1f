"""Triton kernels against dense arithmetic; compiled on a GPU, elsewhere in Triton's interpreter.

Run by test_triton.py. By hand: TRITON_INTERPRET=1 pytest tests/support/triton_cases.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.testing import assert_close

from gnomon.specs import Alignment, TopK
from gnomon_workers.kernels.triton_kernels import TritonKernels
from gnomon_workers.kernels.triton_probe import triton_available
from gnomon_workers.kernels.triton_select import select_topk
from gnomon_workers.kernels.triton_update import AdamRows, AdamStep, AlignedGradients
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.arrays import offsets_of
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.sparse import Picks, sort_by_feature
from tests.support.steps import data, plan_of, step_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALIGNMENTS = get_args(Alignment)
DTYPES = [torch.float32, torch.bfloat16]
KERNELS = TritonKernels()
# Triton 3.9 says once that a default will change
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the values, or of their typical size where they cancel."""
    assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


# ------------------------------------------------------------------------------------------------ top-k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_features", "k"), [(512, 3), (1024, 8), (640, 5), (100, 3)])
def test_selection_from_memory_equals_a_stable_sort(dtype: torch.dtype, n_features: int, k: int) -> None:
    """Rows of many ties, of ties that overflow the lists, of fewer than k positive entries, and of none."""
    values = draw(9, n_features).to(dtype)
    values[2] = 0.5
    values[3] = (values[3] * 4).round() / 4
    values[4, 2:] = -1
    values[5] = -2
    values[6, 7] = torch.inf
    found = select_topk(values, k)
    indices = values.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, indices, True) & (values > 0)
    tokens, features = kept.nonzero(as_tuple=True)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.features, features)
    assert torch.equal(found.values, values[kept].float())


def test_selection_from_memory_picks_what_is_no_number() -> None:
    values = draw(4, 512)
    values[1, 300] = torch.nan
    found = select_topk(values, 3)
    assert found.values.view(4, 3)[1].isnan().any()
    assert not found.values.view(4, 3)[[0, 2, 3]].isnan().any()


# ---------------------------------------------------------------------------------------------- sparse products


def ragged_picks(n_tokens: int, n_features: int, seed: int = 0) -> Picks:
    """Rows of 0 to 9 picks, among them empty ones at both ends, and one of all features."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 10, (n_tokens,), generator=generator)
    counts[0] = counts[-1] = 0
    counts[n_tokens // 2] = n_features
    rows = [torch.randperm(n_features, generator=generator)[: int(n)].sort().values for n in counts]
    features = torch.cat(rows).to(DEVICE)
    return Picks(features=features, values=draw(len(features), seed=3), offsets=offsets_of(counts.to(DEVICE)))


def dense(picks: Picks, weights: Tensor, n_features: int) -> Tensor:
    """The weights as a float64 (tokens, n_features) matrix."""
    out = torch.zeros(picks.n_tokens, n_features, dtype=torch.float64, device=DEVICE)
    return out.index_put_((picks.token_indices(), picks.features), weights.double())


@pytest.mark.parametrize("d_in", [1, 37, 1100])
def test_sparse_products_equal_dense_ones(d_in: int) -> None:
    picks, W_dec, residual = ragged_picks(12, 40), draw(40, d_in, seed=4), draw(12, d_in, seed=5)
    acts = dense(picks, picks.values, 40)
    close(KERNELS.decode(picks, W_dec), acts @ W_dec.double())
    gradients = KERNELS.activation_gradients(picks, residual, W_dec)
    products = residual.double() @ W_dec.double().t()
    close(gradients, products[picks.token_indices(), picks.features])


def test_products_without_picks() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    picks = Picks(features=none, values=draw(0), offsets=none.new_zeros(4))
    assert not KERNELS.decode(picks, draw(5, 8)).any()
    assert KERNELS.decode(picks, draw(5, 8)).shape == (3, 8)
    assert KERNELS.activation_gradients(picks, draw(3, 8), draw(5, 8)).shape == (0,)


# ------------------------------------------------------------------------------------------- gradients and update


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of norm 1."""
    return torch.nn.functional.normalize(rows)


def make_rows(n_features: int, width: int, seed: int) -> AdamRows:
    """A matrix in the middle of training."""
    weights = unit_rows(draw(n_features, width, seed=seed))
    return AdamRows(
        weights=weights,
        first=draw(n_features, width, seed=seed + 1) / 10,
        second=draw(n_features, width, seed=seed + 2).square(),
    )


def make_pair(rule: Alignment, n_features: int, d_in: int, d_out: int) -> tuple[AdamRows, AdamRows]:
    """Encoder and decoder; <w, d> is far from 0, as "scale" needs."""
    decoder = make_rows(n_features, d_out, 10)
    if rule == "tied":
        return decoder, decoder
    rows = make_rows(n_features, d_in, 20)
    return (rows if d_in != d_out else replace(rows, weights=rows.weights + decoder.weights)), decoder


def sparse_gradient(picks: Picks, d_in: int, d_out: int, n_rows: int) -> SparseGradient:
    """Gradients of a batch with n_rows rows of residual gradients a token, of which picks use any."""
    tokens = picks.token_indices()
    return SparseGradient(
        features=picks.features,
        tokens=tokens,
        rows=tokens if n_rows == 1 else tokens * n_rows + picks.features % n_rows,
        values=picks.values,
        gradients=draw(len(tokens), seed=6),
        vector_gradients={},
        encoder_inputs=draw(picks.n_tokens, d_in, seed=7),
        residual_gradients=draw(picks.n_tokens * n_rows, d_out, seed=8),
        n_rows=n_rows,
    )


def plain_gradient(sparse: SparseGradient, weights: Tensor, vectors: Tensor, where: Tensor, n_features: int) -> Tensor:
    """Sum over picks by a dense float64 scatter, (n_features, width)."""
    out = torch.zeros(n_features, vectors.shape[1], dtype=torch.float64, device=DEVICE)
    return out.index_add_(0, sparse.features, weights.double()[:, None] * vectors.double()[where])


@pytest.mark.parametrize(
    ("rule", "d_in", "n_rows"),
    [("none", 37, 1), ("orth", 37, 2), ("scale", 37, 1), ("stopgrad", 37, 1), ("tied", 16, 2)],
)
def test_aligned_gradients_equal_dense_sums_projected(rule: Alignment, d_in: int, n_rows: int) -> None:
    picks = ragged_picks(9, 30)
    picks = replace(picks, features=picks.features // 2 * 2)  # repeated in a row; half of the features untouched
    sparse = sparse_gradient(picks, d_in, d_in, n_rows)
    encoder, decoder = make_pair(rule, 30, d_in, d_in)
    segments = sort_by_feature(sparse.features, sparse.tokens)
    found = KERNELS.aligned_gradients(sparse, segments, encoder.weights, decoder.weights, rule)
    g = plain_gradient(sparse, sparse.gradients, sparse.encoder_inputs, sparse.tokens, 30)
    h = plain_gradient(sparse, sparse.values, sparse.residual_gradients, sparse.rows, 30)
    RULES[rule].project(g, h, encoder.weights.double(), decoder.weights.double())
    g, h = g[segments.touched], h[segments.touched]
    assert len(found.touched) == 15
    close(found.decoder, h)
    close(found.encoder, h if rule == "tied" else g)
    close(found.squares, h.square().sum(1) + (g.square().sum(1) if rule != "tied" else 0))


STEP = AdamStep(number=3, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8)


def test_step_of_a_transcoder() -> None:
    sparse = sparse_gradient(ragged_picks(9, 30), 12, 20, 1)
    encoder, decoder = make_pair("none", 30, 12, 20)
    segments = sort_by_feature(sparse.features, sparse.tokens)
    gradients = KERNELS.aligned_gradients(sparse, segments, encoder.weights, decoder.weights, "none")
    close(gradients.encoder, plain_gradient(sparse, sparse.gradients, sparse.encoder_inputs, sparse.tokens, 30))
    expected, _, _ = updated(encoder, gradients.encoder.double(), 1.0)
    KERNELS.update(encoder, decoder, gradients, 1.0, STEP, "none")
    close(encoder.weights, expected)
    close(decoder.weights.norm(dim=1), torch.ones(30, device=DEVICE))


def updated(rows: AdamRows, gradients: Tensor, clip_scale: float) -> Tensor:
    """PyTorch's Adam in float64; returns the weights, and leaves the moments in the returned copies of rows."""
    first, second, weights = rows.first.double(), rows.second.double(), rows.weights.double()
    torch_adam(
        [weights], [gradients * clip_scale], [first], [second], [], [torch.tensor(float(STEP.number - 1))],
        foreach=False, amsgrad=False, beta1=STEP.beta1, beta2=STEP.beta2, lr=STEP.lr, weight_decay=0.0, eps=STEP.eps,
        maximize=False,
    )  # fmt: skip
    return torch.stack([weights, first, second])


@pytest.mark.parametrize("rule", ALIGNMENTS)
@pytest.mark.parametrize("clip_scale", [0.037])
def test_update_equals_clip_adam_and_retraction(rule: Alignment, clip_scale: float) -> None:
    encoder, decoder = make_pair(rule, 11, 37, 37)
    touched = torch.tensor([0, 3, 4, 10], device=DEVICE)
    g, h = draw(4, 37, seed=30), draw(4, 37, seed=31)
    gradients = AlignedGradients(touched=touched, encoder=h if rule == "tied" else g, decoder=h, squares=draw(4))
    dense_gradients = torch.zeros(2, 11, 37, dtype=torch.float64, device=DEVICE)
    dense_gradients[:, touched] = torch.stack([gradients.encoder, h]).double()
    expected = [updated(rows, dense_gradients[i], clip_scale) for i, rows in enumerate([encoder, decoder])]
    if rule == "tied":
        expected[0] = expected[1]
    copy = torch.empty(11, 37, dtype=torch.bfloat16, device=DEVICE)
    smallest = KERNELS.update(encoder, decoder, gradients, clip_scale, STEP, rule, copy)
    expected_smallest = RULES[rule].retract(expected[0][0], expected[-1][0])
    for rows, (weights, first, second) in zip([encoder, decoder], [expected[0], expected[-1]], strict=True):
        close(rows.weights, weights)
        close(rows.first, first)
        close(rows.second, second)
    assert torch.equal(copy, encoder.weights.bfloat16())
    assert (smallest is None) == (expected_smallest is None)
    if smallest is not None and expected_smallest is not None:
        close(smallest, expected_smallest)
    if rule in ("orth", "stopgrad", "scale", "tied"):
        close((encoder.weights * decoder.weights).sum(1), torch.ones(11, device=DEVICE))


def test_availability() -> None:
    assert triton_available(DEVICE)
    assert not triton_available(torch.device("meta"))


# ------------------------------------------------------------------------------------------------ whole steps


@pytest.mark.parametrize(
    ("alignment", "encoder_dtype"), [("orth", "float32"), ("tied", "float32"), ("orth", "bfloat16")]
)
def test_a_run_is_that_of_the_sparse_kernels(alignment: Alignment, encoder_dtype: str) -> None:
    losses, weights = {}, {}
    for kernels in ("sparse", "triton"):
        plan = plan_of(
            d_sae=64, activation=TopK(k=5), alignment=alignment, encoder_dtype=encoder_dtype, kernels=kernels,
            optimizer={"lr": 1e-2}, batch_size=16, token_budget=1600,
        )  # fmt: skip
        step = step_of(plan, device=DEVICE)
        losses[kernels] = [step(t, data(16, seed=t).to(DEVICE)).loss for t in range(2)]
        weights[kernels] = step.parameters.W_enc_rows
    # the sparse kernels round bfloat16 products once more, to store them, which moves picks
    tolerance = 1e-5 if encoder_dtype == "float32" else 5e-2
    assert losses["triton"] == pytest.approx(losses["sparse"], rel=tolerance)
    assert (weights["triton"] - weights["sparse"]).norm() <= 10 * tolerance * weights["sparse"].norm()
