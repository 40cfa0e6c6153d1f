"""The dense, readable implementation with autograd: the oracle that every fast path is tested against.

It materialises every activation, keeps encoder and decoder as the free parameters (v, D) of the
reparameterisation, and lets autograd find the gradient. Slow, and meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnomon.specs import Activation, Alignment, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_workers.sae.variants.penalties import FLOOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What is computed, besides inputs and parameters."""

    activation: Activation
    alignment: Alignment
    coefficient: float = 0.0
    """lambda of the penalty at this step, with its warm-up."""
    p: float = 1.0
    """Exponent of the penalty ("p_anneal")."""
    is_dead: Tensor | None = None
    """(d_sae,) features that the auxiliary loss revives."""
    k_aux: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceGradients:
    """Losses of a batch and the gradients of the objective, in the gauge |D| = 1, <v, d> = 1."""

    loss: Tensor
    """Mean over tokens of |x - x_hat|^2."""
    objective: Tensor
    acts: Tensor
    """(batch, d_sae)"""
    grads: dict[str, Tensor]
    """By the names of the parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """A forward pass; all differentiable."""

    target: Tensor
    """(batch, d_out)"""
    projection: Tensor
    """(batch, d_sae), without bias"""
    pre: Tensor
    """(batch, d_sae)"""
    d: Tensor
    """(d_sae, d_out), unit rows"""
    leaf: dict[str, Tensor]

    def error(self, acts: Tensor, *, frozen: bool = False) -> Tensor:
        """x_hat - x, perhaps with a decoder that takes no gradient."""
        d, b_dec = self.d, self.leaf["b_dec"]
        return (acts @ d.detach() + b_dec.detach() if frozen else acts @ d + b_dec) - self.target


def reference_gradients(
    x: Tensor, params: dict[str, Tensor], reference: Reference, *, target: Tensor | None = None
) -> ReferenceGradients:
    """Losses and gradients for inputs x (batch, d_in); params holds W_enc_rows, W_dec, b_enc, b_dec and vectors.

    A transcoder reconstructs target (batch, d_out) and sees x without b_dec.
    """
    leaf = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    w, d = aligned_encoder(leaf["W_enc_rows"], leaf["W_dec"], reference.alignment)
    projection = (x - leaf["b_dec"] if target is None else x) @ w.t()
    forward = _Forward(
        target=x if target is None else target, projection=projection, pre=projection + leaf["b_enc"], d=d, leaf=leaf
    )
    acts, objective = _acts_and_objective(forward, reference)
    torch.autograd.backward(objective)
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in leaf.items()}
    return ReferenceGradients(
        loss=_mean_square(forward.error(acts)).detach(), objective=objective.detach(), acts=acts.detach(), grads=grads
    )


def aligned_encoder(v: Tensor, D: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Rows (w, d) of the plain dictionary that free rows (v, D) stand for."""
    d = D / D.norm(dim=1, keepdim=True)
    if alignment == "orth":
        return v + (1 - (v * d).sum(1, keepdim=True)) * d, d
    if alignment == "stopgrad":
        fixed = d.detach()
        return v + (1 - (v * fixed).sum(1, keepdim=True)) * fixed, d
    if alignment == "scale":
        return v / (v * d).sum(1, keepdim=True), d
    return (d if alignment == "tied" else v), d


def _acts_and_objective(forward: _Forward, reference: Reference) -> tuple[Tensor, Tensor]:
    activation, pre, leaf = reference.activation, forward.pre, forward.leaf
    match activation:
        case TopK() | BatchTopK():
            acts = largest(pre, activation.k, over_batch=isinstance(activation, BatchTopK))
            return acts, _with_auxiliary(_mean_square(forward.error(acts)), acts, forward, reference)
        case Matryoshka():
            acts = largest(pre, activation.k, over_batch=True)
            ends = activation.group_bounds(pre.shape[1])
            prefixes = [torch.arange(pre.shape[1]) < end for end in ends]
            losses = [_mean_square(forward.error(acts * prefix)) for prefix in prefixes]
            return acts, _with_auxiliary(torch.stack(losses).mean(), acts, forward, reference)
        case JumpReLU():
            theta = leaf["log_threshold"].exp()
            acts = _JumpReLU.apply(pre, theta, activation.bandwidth)  # type: ignore[no-untyped-call]
            l0 = _Step.apply(pre, theta, activation.bandwidth).sum(1).mean()  # type: ignore[no-untyped-call]
            target = activation.target_l0
            penalty = l0 if target is None else (l0 / target - 1).square()
            return acts, _mean_square(forward.error(acts)) + reference.coefficient * penalty
        case Gated():
            gates = torch.exp(-leaf["r_mag"]) * forward.projection + leaf["b_gate"]
            acts = (gates > 0) * pre.relu()
            penalty = gates.relu().sum(1).mean()
            auxiliary = _mean_square(forward.error(gates.relu(), frozen=True))
            return acts, _mean_square(forward.error(acts)) + reference.coefficient * penalty + auxiliary
        case ReLU():
            acts = pre.relu()
            weights = forward.d.norm(dim=1) if activation.penalty == "decoder_norm_l1" else 1.0
            penalty = (acts * weights).sum(1).mean()
            return acts, _mean_square(forward.error(acts)) + reference.coefficient * penalty
        case PAnneal():
            acts = pre.relu()
            # the unbounded slope at 0 would make NaN of 0 * inf
            powers = torch.where(acts > FLOOR, acts.clamp_min(FLOOR) ** reference.p, acts * FLOOR ** (reference.p - 1))
            return acts, _mean_square(forward.error(acts)) + reference.coefficient * powers.sum(1).mean()


def largest(pre: Tensor, k: int, *, over_batch: bool) -> Tensor:
    """The k largest of every row, or k * batch of all, ties to the lowest index, then ReLU; (batch, d_sae)."""
    flat = pre.reshape(1, -1) if over_batch else pre
    kept = flat.sort(dim=1, descending=True, stable=True).indices[:, : k * len(pre) if over_batch else k]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True)
    return (flat * mask).relu().reshape(pre.shape)


def _with_auxiliary(loss: Tensor, acts: Tensor, forward: _Forward, reference: Reference) -> Tensor:
    """Plus |e - e_hat|^2 / |e - mean e|^2 with e_hat from the largest dead pre-activations, without b_dec."""
    aux, is_dead = getattr(reference.activation, "aux", None), reference.is_dead
    if aux is None or is_dead is None or not bool(is_dead.any()):
        return loss
    masked = forward.pre.masked_fill(~is_dead, -torch.inf)
    kept = masked.sort(dim=1, descending=True, stable=True).indices[:, : reference.k_aux]
    mask = torch.zeros_like(masked, dtype=torch.bool).scatter_(1, kept, True) & is_dead
    e_hat = torch.where(mask, forward.pre, 0.0) @ forward.d
    e = -forward.error(acts).detach()
    spread = (e - e.mean(0)).square().sum()
    return loss + float(aux.coefficient) * (e - e_hat).square().sum() / spread


def _mean_square(error: Tensor) -> Tensor:
    return error.square().sum(1).mean()


def _in_window(pre: Tensor, theta: Tensor, width: float) -> Tensor:
    """The rectangle kernel of the straight-through estimator."""
    return ((pre - theta).abs() < width / 2).to(pre.dtype)


class _JumpReLU(torch.autograd.Function):
    """pre * H(pre - theta), with a straight-through gradient for theta (arXiv:2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (pre, theta), (grad,) = ctx.saved_tensors, grads
        through = -(theta / ctx.width) * _in_window(pre, theta, ctx.width) * grad
        return grad * (pre > theta), through.sum(0), None


class _Step(torch.autograd.Function):
    """H(pre - theta), with a straight-through gradient for theta and none for pre (arXiv:2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (pre, theta), (grad,) = ctx.saved_tensors, grads
        return None, (-(1 / ctx.width) * _in_window(pre, theta, ctx.width) * grad).sum(0), None
