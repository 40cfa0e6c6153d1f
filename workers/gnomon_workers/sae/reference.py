"""The dense, readable implementation with autograd: the oracle that every fast path is tested against.

It materialises every activation, keeps encoder and decoder as the free parameters (v, D) of the
reparameterisation, and lets autograd find the gradient. Slow, and meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.specs import Activation, Alignment, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceGradients:
    """Loss of a batch and its gradients, in the gauge |D| = 1, <v, d> = 1."""

    loss: Tensor
    aux_loss: Tensor
    acts: Tensor
    """(batch, d_sae)"""
    W_enc_rows: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor


def dense_acts(pre: Tensor, activation: Activation) -> Tensor:
    """Activations (batch, d_sae) of pre-activations: the largest, ties to the lowest index, then ReLU."""
    flat = pre if isinstance(activation, TopK) else pre.reshape(1, -1)
    k = activation.k if isinstance(activation, TopK) else activation.k * len(pre)
    kept = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True)
    return (flat * mask).relu().reshape(pre.shape)


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


def reference_gradients(
    x: Tensor,
    params: dict[str, Tensor],
    *,
    activation: Activation,
    alignment: Alignment,
    is_dead: Tensor | None = None,
    k_aux: int = 0,
) -> ReferenceGradients:
    """Loss and gradients for inputs x (batch, d_in); params holds W_enc_rows, W_dec, b_enc and b_dec.

    With is_dead (d_sae,) and an activation with `aux`, the auxiliary loss is part of the gradient.
    """
    leaf = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    w, d = aligned_encoder(leaf["W_enc_rows"], leaf["W_dec"], alignment)
    pre = (x - leaf["b_dec"]) @ w.t() + leaf["b_enc"]
    acts = dense_acts(pre, activation)
    error = acts @ d + leaf["b_dec"] - x
    loss = error.square().sum(1).mean()
    aux_loss = torch.zeros_like(loss)
    if activation.aux is not None and is_dead is not None and bool(is_dead.any()):
        aux_loss = activation.aux.coefficient * _auxiliary(pre, -error.detach(), d, is_dead, k_aux)
    torch.autograd.backward(loss + aux_loss)
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in leaf.items()}
    return ReferenceGradients(loss=loss.detach(), aux_loss=aux_loss.detach(), acts=acts.detach(), **grads)


def _auxiliary(pre: Tensor, target: Tensor, d: Tensor, is_dead: Tensor, k_aux: int) -> Tensor:
    """|e - e_hat|^2 / |e - mean e|^2 with e_hat from the k_aux largest dead pre-activations, without b_dec."""
    masked = pre.masked_fill(~is_dead, -torch.inf)
    kept = masked.sort(dim=1, descending=True, stable=True).indices[:, :k_aux]
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, kept, True) & is_dead
    e_hat = torch.where(mask, pre, 0.0) @ d
    return (target - e_hat).square().sum() / (target - target.mean(0)).square().sum()
