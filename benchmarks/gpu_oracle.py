"""Is what runs on the device right? Kernels against dense float64 arithmetic, steps against autograd in float64."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_sizes import Check, Sizes, made_up_activations, make_step
from torch import Tensor

from gnomon.specs import Activation, AuxK, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_workers.checkpoints.tensor_file import TensorReader, write_tensors
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.plan import Normalisation
from gnomon_workers.sae.products import RowGradients, WeightUpdate
from gnomon_workers.sae.reference import Reference, reference_gradients
from gnomon_workers.sae.sparse import Picks
from gnomon_workers.train.step import TrainStep

LATE = 80
"""A step at which penalties are warm and p has reached its last value."""
VARIANTS: dict[str, tuple[Activation, float]] = {
    "topk": (TopK(k=5), 0.0),
    "topk+aux": (TopK(k=5, aux=AuxK(k=8)), 0.0),
    "batchtopk": (BatchTopK(k=5), 0.0),
    "batchtopk+aux": (BatchTopK(k=5, aux=AuxK(k=8, coefficient=2.0)), 0.0),
    "matryoshka": (Matryoshka(k=5), 0.0),
    "jumprelu": (JumpReLU(l0_coefficient=0.02, bandwidth=0.05, initial_threshold=0.1, warmup_steps=0), 0.02),
    "gated": (Gated(l1_coefficient=0.1, warmup_steps=0), 0.1),
    "relu": (ReLU(l1_coefficient=0.1, warmup_steps=0), 0.1),
    "p_anneal": (PAnneal(l1_coefficient=0.1, start_step=10, n_updates=2, final_p=0.3, warmup_steps=0), 0.1),
}
SMALL = Sizes(d=40, n=512, k=5, batch=32)
TOY_SMALL = Sizes(d=16, n=160, k=2, batch=8)
TOY_VARIANTS = ("topk", "batchtopk", "matryoshka", "relu")
"""What is tried where every kernel takes a second."""
TOLERANCE = 2e-5


def checks(device: torch.device, *, is_toy: bool) -> Iterator[Check]:
    """All comparisons, one after the other; one that raises does not keep the others from being made."""
    for name, make in _cases(device, is_toy):
        try:
            yield make()
        except Exception:  # a kernel that does not compile, or an illegal access, is a finding like any other
            yield Check(name=name, status="failed", note=traceback.format_exc(limit=-3))


def _cases(device: torch.device, is_toy: bool) -> Iterator[tuple[str, Callable[[], Check]]]:
    full = Sizes(d=16, n=192, k=3, batch=8) if is_toy else Sizes(d=4096, n=131_072, k=64, batch=1024)
    for dtype in (torch.float32, torch.bfloat16):
        yield "selection", lambda dtype=dtype: selection(full, device, dtype)
    yield "sparse products", lambda: sparse_products(full, device)
    alignments = ("scale", "tied") if is_toy else ("none", "scale", "stopgrad", "tied")
    for alignment in ("orth", *alignments):
        yield f"rows {alignment}", lambda alignment=alignment: row_update(full, device, alignment)
    small = TOY_SMALL if is_toy else SMALL
    kernels = ("triton",) if is_toy else ("triton", "sparse")
    for kind in kernels:
        for name in TOY_VARIANTS if is_toy else VARIANTS:
            yield f"step {name} {kind}", lambda name=name, kind=kind: whole_step(small, name, "orth", kind, device)
        yield f"ties {kind}", lambda kind=kind: whole_step(small, "topk", "none", kind, device, ties=True)
        yield f"ties {kind}", lambda kind=kind: whole_step(small, "batchtopk", "none", kind, device, ties=True)
    for alignment in alignments:
        yield (
            f"step topk {alignment}",
            lambda alignment=alignment: whole_step(small, "topk", alignment, "triton", device),
        )
    for name in ("topk",) if is_toy else ("topk", "batchtopk", "matryoshka"):
        yield f"bfloat16 {name}", lambda name=name: bfloat16_step(small, name, device)


def _check(name: str, pairs: dict[str, tuple[Tensor, Tensor]], limit: float = TOLERANCE) -> Check:
    """Compare tensors by the norm of their difference, relative to the wanted one's."""
    errors = {}
    for what, (found, wanted) in pairs.items():
        found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
        scale = float(wanted.norm()) or 1.0
        errors[what] = float((found - wanted).norm()) / scale if found.shape == wanted.shape else float("inf")
    worst = max(errors, key=lambda what: errors[what] if errors[what] == errors[what] else float("inf"))
    is_equal = all(error <= limit for error in errors.values())
    note = "" if is_equal else f"in {worst}"
    return Check(name=name, status="equal" if is_equal else "unequal", error=errors[worst], limit=limit, note=note)


def selection(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Check:
    """Top k of a whole matrix against a stable sort; ties within rows, overflows, and rows without enough."""
    from gnomon_workers.kernels.triton_select import select_topk

    values = torch.randn(min(sizes.batch, 256), sizes.n, device=device).to(dtype)
    values[2] = 0.5
    values[3] = (values[3] * 4).round() / 4
    values[4, sizes.k // 2 :] = -1
    values[5] = -2
    found = select_topk(values, sizes.k)
    order = values.float().sort(dim=1, descending=True, stable=True).indices[:, : sizes.k]
    kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True) & (values > 0)
    tokens, features = kept.nonzero(as_tuple=True)
    pairs = {"tokens": (found.tokens, tokens), "features": (found.features, features)}
    return _check(f"selection {dtype} n {sizes.n:,}", pairs | {"values": (found.values, values[kept])}, 0.0)


def some_picks(sizes: Sizes, n_tokens: int, device: torch.device) -> Picks:
    """k random features of every token, ascending."""
    features = torch.rand(n_tokens, sizes.n, device=device).topk(sizes.k, dim=1).indices.sort(dim=1).values
    offsets = torch.arange(n_tokens + 1, device=device) * sizes.k
    values = torch.rand(n_tokens * sizes.k, device=device) + 0.1
    return Picks(features=features.reshape(-1), values=values, offsets=offsets)


def sparse_products(sizes: Sizes, device: torch.device) -> Check:
    """Decoding and the products sampled at picks, against gathered rows in float64."""
    from gnomon_workers.kernels.triton_kernels import TritonKernels

    kernels, n_tokens = TritonKernels(), min(sizes.batch, 64)
    picks = some_picks(sizes, n_tokens, device)
    W_dec = torch.randn(sizes.n, sizes.d, device=device)
    residual = torch.randn(n_tokens, sizes.d, device=device)
    gathered = W_dec[picks.features].double().view(n_tokens, sizes.k, sizes.d)
    decoded = (gathered * picks.values.double().view(n_tokens, sizes.k, 1)).sum(1)
    sampled = (gathered * residual.double()[:, None]).sum(2).reshape(-1)
    pairs = {
        "decode": (kernels.decode(picks, W_dec), decoded),
        "activation_gradients": (kernels.activation_gradients(picks, residual, W_dec), sampled),
    }
    return _check(f"sparse products d {sizes.d:,} n {sizes.n:,}", pairs)


def row_update(sizes: Sizes, device: torch.device, alignment: Any) -> Check:
    """Gradients, clipping, Adam and retraction of all rows against the same in float64, a sample of rows compared."""
    step = make_step(sizes, device, alignment=alignment, activation=TopK(k=sizes.k), kernels="triton")
    x = made_up_activations(sizes, sizes.batch, device)
    before = {name: tensor.clone() for name, tensor in step.parameters.tensors().items()}
    watched = watch(step)
    result = step(LATE, x)
    gradients = watched.seen
    sample = gradients.touched[:: max(1, len(gradients.touched) // 64)]
    where = torch.isin(gradients.touched, sample)
    clip_norm = step.plan.spec.optimizer.clip_norm
    clip = min(1.0, clip_norm / result.grad_norm) if clip_norm is not None else 1.0
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    moved = {}
    for name, rows in {"W_dec": gradients.decoder, "W_enc_rows": gradients.encoder}.items():
        if name in before:
            moved[name] = adam_step(before[name][sample].double(), rows[where].double() * clip, result.lr)
    w, d = moved.get("W_enc_rows", moved["W_dec"]), moved["W_dec"]
    RULES[alignment].retract(w, d)
    for name, wanted in moved.items():
        moves = wanted - before[name][sample].double()
        pairs[f"move of {name}"] = (step.parameters.tensors()[name][sample].double() - before[name][sample], moves)
    norm = torch.stack(list(dense_square_sums(gradients).values())).sum().sqrt()
    pairs["gradient norm"] = (torch.tensor(result.grad_norm), norm)
    # rows move by the learning rate times something near 1, of which float32 weights keep five digits
    return _check(f"rows {alignment} d {sizes.d:,} n {sizes.n:,}", pairs, 1e-3)


def adam_step(parameter: Tensor, gradient: Tensor, lr: float, eps: float = 1e-8) -> Tensor:
    """A first step of Adam as its paper writes it: both moments, without their bias, are the gradient's own powers."""
    return parameter - lr * gradient / (gradient.abs() + eps)


def dense_square_sums(gradients: RowGradients) -> dict[str, Tensor]:
    """Sums of squares of every gradient in float64."""
    named = {"W_dec": gradients.decoder, **gradients.vectors}
    if gradients.encoder is not gradients.decoder:
        named["W_enc_rows"] = gradients.encoder
    return {name: tensor.double().square().sum() for name, tensor in named.items()}


@dataclass(slots=True)
class Watched:
    """A weight update that remembers the gradients it was given."""

    inner: WeightUpdate
    seen: Any = None

    def gradients(self, *arguments: Any) -> RowGradients:
        """As the update's own."""
        return self.inner.gradients(*arguments)

    def apply(self, gradients: RowGradients, **options: Any) -> Tensor | None:
        """The same, once the gradients are copied."""
        self.seen = RowGradients(
            touched=gradients.touched.clone(),
            encoder=gradients.decoder if gradients.encoder is gradients.decoder else gradients.encoder.clone(),
            decoder=gradients.decoder.clone(),
            vectors={name: vector.clone() for name, vector in gradients.vectors.items()},
            through_encoder=gradients.through_encoder.clone(),
        )
        if self.seen.encoder is gradients.decoder:
            self.seen = RowGradients(
                touched=self.seen.touched, encoder=self.seen.decoder, decoder=self.seen.decoder,
                vectors=self.seen.vectors, through_encoder=self.seen.through_encoder,
            )  # fmt: skip
        return self.inner.apply(gradients, **options)


def watch(step: TrainStep) -> Watched:
    """Remember the gradients of the step's next update."""
    step._weights = Watched(step._weights)
    return step._weights


def whole_step(
    sizes: Sizes, name: str, alignment: Any, kernels: str, device: torch.device, *, ties: bool = False
) -> Check:
    """Losses and gradients of a whole step against autograd in float64."""
    activation, coefficient = VARIANTS[name]
    step = make_step(
        sizes, device, activation=activation, alignment=alignment, kernels=kernels, encoder_dtype="float32",
        dead_after_tokens=1000, token_budget=sizes.batch * 100,
    )  # fmt: skip
    _unsettle(step)
    if ties:  # half of all features have one and the same pre-activation on every token, at and around the cut
        step.parameters.W_enc_rows[::2] = 0
        step.parameters.b_enc[::2] = 0.25
        step.replaced()
    is_dead = torch.arange(sizes.n) % 3 == 0
    step.n_tokens_since_fired[is_dead.to(device)] = 10_000
    x = made_up_activations(sizes, sizes.batch, device)
    params = {name: tensor.double().cpu() for name, tensor in step.parameters.tensors().items()}
    params.setdefault("W_enc_rows", params["W_dec"])
    reference = Reference(
        activation=activation, alignment=alignment, coefficient=coefficient,
        p=0.3 if name == "p_anneal" else 1.0, is_dead=is_dead, k_aux=step.plan.k_aux,
    )  # fmt: skip
    scaled = Normalisation.of(step.plan.hooks, x.double().cpu())(x.double().cpu())
    wanted = reference_gradients(scaled, params, reference)
    watched = watch(step)
    result = step(LATE, x)
    found = _dense_gradients(step, watched.seen)
    pairs = {what: (tensor, wanted.grads[what]) for what, tensor in found.items()}
    pairs["loss"] = (torch.tensor(result.loss), wanted.loss)
    pairs["objective"] = (torch.tensor(result.objective), wanted.objective)
    return _check(f"step {name} {alignment} {kernels}{' ties' if ties else ''}", pairs)


def bfloat16_step(sizes: Sizes, name: str, device: torch.device) -> Check:
    """A bfloat16 step with Triton's kernels against one with dense products, which choose by the same product."""
    found: dict[str, dict[str, Tensor]] = {}
    for kernels in ("reference", "triton"):
        step = make_step(sizes, device, activation=VARIANTS[name][0], kernels=kernels, encoder_dtype="bfloat16")
        _unsettle(step)
        watched = watch(step)
        losses = [step(t, made_up_activations(sizes, sizes.batch, device, seed=t)).loss for t in range(2)]
        gradients = _dense_gradients(step, watched.seen)
        found[kernels] = {**gradients, **step.parameters.tensors(), "losses": torch.tensor(losses)}
    pairs = {what: (tensor, found["reference"][what]) for what, tensor in found["triton"].items()}
    return _check(f"bfloat16 {name}", pairs, 1e-4)


def _dense_gradients(step: TrainStep, gradients: RowGradients) -> dict[str, Tensor]:
    rows = {"W_dec": gradients.decoder, "W_enc_rows": gradients.encoder}
    dense = {}
    for name, tensor in step.parameters.tensors().items():
        if name in rows:
            dense[name] = torch.zeros_like(tensor).index_copy_(0, gradients.touched, rows[name])
        else:
            dense[name] = gradients.vectors[name]
    return dense


def _unsettle(step: TrainStep) -> None:
    """Move the parameters off their special start (w = d, b_enc = 0) along the constraint."""
    generator = torch.Generator().manual_seed(1)
    for tensor in step.parameters.tensors().values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.device))
    RULES[step.plan.spec.alignment].retract(step.parameters.W_enc_rows, step.parameters.W_dec)
    step.replaced()


def training(device: torch.device, *, is_toy: bool) -> Iterator[Check]:
    """Train with a process group of one rank, save in the middle, resume: the loss falls, and the bits are equal."""
    sizes = Sizes(d=16, n=128, k=2, batch=16) if is_toy else Sizes(d=512, n=16_384, k=32, batch=2048)
    n_steps = 4 if is_toy else 300
    mesh = _process_group(device)
    for kind, activation in {"topk": TopK(k=sizes.k), "batchtopk": BatchTopK(k=sizes.k)}.items():
        fields: dict[str, Any] = {
            "activation": activation, "token_budget": sizes.batch * n_steps, "optimizer": {"lr": 3e-3},
            "encoder_dtype": "bfloat16", "kernels": "triton",
        }  # fmt: skip
        yield _resumed(kind, sizes, n_steps, device, mesh, fields)
    torch.distributed.destroy_process_group()


def _process_group(device: torch.device) -> ProcessMesh:
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    total = torch.ones(4, device=device)
    dist.all_reduce(total)
    dist.barrier()
    assert total.tolist() == [1.0] * 4
    return ProcessMesh.create(dp=1, features=1, timeout_s=60)


def _resumed(
    kind: str, sizes: Sizes, n_steps: int, device: torch.device, mesh: ProcessMesh, fields: dict[str, Any]
) -> Check:
    data = made_up_activations(sizes, 8 * sizes.batch, device).split(sizes.batch)
    whole = make_step(sizes, device, mesh, **fields)
    saved, losses, state = io.BytesIO(), [], {}
    for t in range(n_steps):
        if t == n_steps // 2:
            write_tensors(saved, state_of(whole))
            state = dict(whole.state)
        losses.append(whole(t, data[t % 8]).loss)
    resumed = make_step(sizes, device, mesh, **fields)
    saved.seek(0)
    reader = TensorReader(saved)
    for name, tensor in state_of(resumed).items():
        reader.read_rows(name, 0, tensor)
    resumed.optimizer.n_steps.fill_(n_steps // 2)
    resumed.state = state
    resumed.replaced()
    again = [resumed(t, data[t % 8]).loss for t in range(n_steps // 2, n_steps)]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    pairs = {name: (tensor, state_of(whole)[name]) for name, tensor in state_of(resumed).items()}
    pairs["losses"] = (torch.tensor(again), torch.tensor(losses[n_steps // 2 :]))
    note = f"loss {first:.4f} -> {last:.4f} in {n_steps} steps"
    found = _check(f"training {kind}, resumed: bits", pairs, 0.0)
    status = found.status if last < first or n_steps < 50 else "unequal"
    return Check(name=found.name, status=status, error=found.error, limit=0.0, note=f"{found.note} {note}".strip())


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """All that training continues from, but the running numbers and the step number."""
    optimizer = step.optimizer
    moments = {f"first.{name}": moment for name, moment in optimizer.first.items()}
    moments |= {f"second.{name}": moment for name, moment in optimizer.second.items()}
    return {**optimizer.params, **moments, "n_tokens_since_fired": step.n_tokens_since_fired}
