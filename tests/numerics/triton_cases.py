"""Triton kernels against dense arithmetic; compiled on a GPU, elsewhere in Triton's interpreter.

Run by test_triton.py. By hand: TRITON_INTERPRET=1 pytest tests/numerics/triton_cases.py
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
from gnomon_workers.kernels import triton_topk
from gnomon_workers.kernels.triton_encoder import GROUP, EncoderGemm
from gnomon_workers.kernels.triton_kernels import TritonKernels
from gnomon_workers.kernels.triton_probe import triton_available
from gnomon_workers.kernels.triton_topk import fused_topk, list_capacity, sample_size, topk_of_encoder
from gnomon_workers.kernels.triton_update import AdamStep, AlignedGradients, Rows
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.arrays import offsets_of
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.sparse import Picks, sort_by_feature
from tests.numerics.steps import data, plan_of, step_of

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


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition: a stable descending sort cut at k, by ascending index."""
    indices = values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return values.gather(1, indices), indices


def problem(n_tokens: int, k: int, dtype: torch.dtype) -> tuple[EncoderGemm, int]:
    """An encoder with ragged edges and twins among its features, and the smallest sample that holds k groups."""
    width = EncoderGemm.create(draw(1, 1), draw(1, 1), draw(1), dtype).tile.features
    n_features = 9 * width + 13
    w, b = draw(n_features, 24, seed=1), draw(n_features, seed=2)
    twins = torch.arange(0, n_features, 4, device=DEVICE)
    w[twins], b[twins] = w[twins % 64], b[twins % 64]
    return EncoderGemm.create(draw(n_tokens, 24), w, b, dtype), -(-k * GROUP // width) * width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "d_in", "n_features"), [(19, 37, 150), (16, 16, 64), (1, 3, 5)])
def test_pre_activations_equal_those_of_torch(dtype: torch.dtype, n_tokens: int, d_in: int, n_features: int) -> None:
    x, w, b = draw(n_tokens, d_in), draw(n_features, d_in, seed=1), draw(n_features, seed=2)
    expected = x.to(dtype).double() @ w.to(dtype).double().t() + b.double()
    close(EncoderGemm.create(x, w, b, dtype).write(n_features), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_fused_topk_equals_a_stable_sort_of_the_same_values(dtype: torch.dtype, k: int) -> None:
    gemm, n_sample = problem(19, k, dtype)
    found = fused_topk(gemm, k, n_sample, capacity=len(gemm.weights))
    values, features = stable_topk(gemm.write(len(gemm.weights)), k)
    assert k == 1 or (values.sort(dim=1).values.diff(dim=1) == 0).any(), "no ties: the case shows less than it should"
    assert torch.equal(found.features, features)
    assert torch.equal(found.values, values)
    assert found.n_written == 0


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_rows_whose_list_overflows_are_written_whole(slope: float) -> None:
    """Features that grow with their index make the bound of the first ones worthless."""
    gemm, n_sample = problem(19, 3, torch.float32)
    n_features = len(gemm.weights)
    gemm = replace(gemm, bias=gemm.bias + slope * torch.arange(n_features, device=DEVICE))
    found = fused_topk(gemm, 3, n_sample, capacity=5 * n_features // n_sample)
    assert found.n_written == 19 if slope else 0 < found.n_written < 19
    values, features = stable_topk(gemm.write(n_features), 3)
    assert torch.equal(found.features, features)
    assert torch.equal(found.values, values)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_values_that_are_no_numbers_are_picked_not_lost() -> None:
    gemm, n_sample = problem(5, 3, torch.float32)
    gemm.inputs[1] = torch.nan
    gemm.bias[n_sample + 2] = torch.nan
    found = fused_topk(gemm, 3, n_sample, capacity=len(gemm.weights))
    assert found.values[1].isnan().all()
    assert found.values.isnan().any(1).all()


@pytest.mark.parametrize("k", [1, 6, 500])
def test_topk_for_any_k(k: int) -> None:
    x, w, b = draw(7, 24), draw(300, 24, seed=1), draw(300, seed=2)
    values, features = KERNELS.topk(x, w, b, k)
    expected = stable_topk(torch.addmm(b, x, w.t()), k)
    assert torch.equal(features, expected[1])
    close(values, expected[0])


def test_many_tokens_are_selected_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm, _ = problem(19, 1, torch.float32)
    whole = topk_of_encoder(gemm, 1)
    monkeypatch.setattr(triton_topk, "MAX_WRITTEN", 5 * 512)
    assert all(torch.equal(part, all_) for part, all_ in zip(topk_of_encoder(gemm, 1), whole, strict=True))
    assert torch.equal(whole[1], stable_topk(gemm.write(len(gemm.weights)), 1)[1])


@pytest.mark.parametrize(("n_features", "k"), [(131_072, 64), (16_384, 32)])
def test_lists_hold_what_features_in_random_order_send_them(n_features: int, k: int) -> None:
    """At full size, with the bound and the lists as they would be on a GPU."""
    n_sample = sample_size(n_features, k, 256)
    pre_activations = draw(48, n_features)
    maxima = pre_activations[:, :n_sample].view(48, -1, GROUP).amax(2)
    lengths = (pre_activations >= maxima.topk(k).values.amin(1, keepdim=True)).sum(1)
    capacity = list_capacity(n_features, n_sample, k)
    assert int(lengths.max()) < 0.8 * capacity < 3 * int(lengths.max())
    assert capacity < n_features / 10


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
    segments = sort_by_feature(picks.features, picks.token_indices())
    rows = KERNELS.row_gradients(segments, picks.values, residual)
    close(rows, (acts.t() @ residual.double())[segments.touched])


def test_products_without_picks() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    picks = Picks(features=none, values=draw(0), offsets=none.new_zeros(4))
    assert not KERNELS.decode(picks, draw(5, 8)).any()
    assert KERNELS.decode(picks, draw(5, 8)).shape == (3, 8)
    assert KERNELS.activation_gradients(picks, draw(3, 8), draw(5, 8)).shape == (0,)
    segments = sort_by_feature(none, none)
    assert KERNELS.row_gradients(segments, draw(0), draw(3, 8)).shape == (0, 8)


# ------------------------------------------------------------------------------------------- gradients and update


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of norm 1."""
    return torch.nn.functional.normalize(rows)


def make_rows(n_features: int, width: int, seed: int) -> Rows:
    """A matrix in the middle of training."""
    weights = unit_rows(draw(n_features, width, seed=seed))
    return Rows(
        weights=weights,
        first=draw(n_features, width, seed=seed + 1) / 10,
        second=draw(n_features, width, seed=seed + 2).square(),
    )


def make_pair(rule: Alignment, n_features: int, d_in: int, d_out: int) -> tuple[Rows, Rows]:
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
    KERNELS.update(encoder, decoder, gradients, torch.ones((), device=DEVICE), STEP, "none")
    close(encoder.weights, expected)
    close(decoder.weights.norm(dim=1), torch.ones(30, device=DEVICE))


def updated(rows: Rows, gradients: Tensor, clip_scale: float) -> Tensor:
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
    scale = torch.tensor(clip_scale, dtype=torch.float64, device=DEVICE)
    smallest = KERNELS.update(encoder, decoder, gradients, scale, STEP, rule, copy)
    expected_smallest = RULES[rule].retract(expected[0][0], expected[-1][0])
    for rows, (weights, first, second) in zip([encoder, decoder], [expected[0], expected[-1]], strict=True):
        close(rows.weights, weights)
        close(rows.first, first)
        close(rows.second, second)
    # a GPU rounds to nearest, the interpreter towards zero
    assert_close(copy.float(), encoder.weights, rtol=2**-7, atol=0)
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
