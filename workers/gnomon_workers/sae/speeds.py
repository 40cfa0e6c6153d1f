"""How long a training step takes: what it computes, reads and sends, over the speeds of a device. Imports no torch.

The speeds are those of docs/performance.md: a number made of them alone is right within a factor of two or three on
other machines. Whoever has measured runs at hand corrects it by what those took (gnomon_service.planning.rates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gnomon.specs import Gated, Matryoshka, chooses_k
from gnomon_workers.sae.shape import Device, Shape, aux_of, n_residual_rows, resolve_k_aux


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a rank of one kind of device does in a second."""

    float32_flops: float
    """Of dense products."""
    bfloat16_flops: float
    scan_bytes: float
    """Pre-activations that features are chosen from."""
    gather_bytes: float
    """Rows that are gathered or summed for picks."""
    update_bytes: float
    """Weights, moments and gradients that are read and written in an update."""
    sent_bytes: float
    """Handed to collectives."""
    call_s: float
    """A collective beside its bytes."""
    step_s: float
    """A step beside all of these."""


SPEEDS: Final[dict[Device, Speeds]] = {
    "cpu": Speeds(
        float32_flops=9.1e10,
        bfloat16_flops=1.63e11,
        scan_bytes=1.9e9,
        gather_bytes=4.1e9,
        update_bytes=7.3e9,
        sent_bytes=2.5e8,
        call_s=1e-3,
        step_s=5e-4,
    ),
    "gpu": Speeds(
        float32_flops=5e13,
        bfloat16_flops=8e14,
        scan_bytes=1e12,
        gather_bytes=1.7e12,
        update_bytes=2.7e12,
        sent_bytes=1e11,
        call_s=5e-5,
        step_s=1.7e-3,
    ),
}
"""One core of a Zen 4 with AVX512-BF16, whose ranks speak through its own memory, and one NVIDIA H100 on NVLink."""
N_DENSE_PRODUCTS: Final = 5
"""Of the encoder's size, in a step through matrices; "gated" makes N_GATED_PRODUCTS."""
N_GATED_PRODUCTS: Final = 7
MOVED_BYTES: Final = 24
"""Of a weight in an update: weight and two moments read and written; its gradient stays in the cache."""


def step_seconds(shape: Shape, device: Device) -> float:
    """Seconds of one step of one dictionary on every rank of its mesh, with the speeds of the documented machines."""
    speeds = SPEEDS[device]
    work = _product_seconds(shape, speeds)
    n_moved = shape.n_own * shape.feature_width
    return work + n_moved * MOVED_BYTES / speeds.update_bytes + _sending_seconds(shape, speeds) + speeds.step_s


def _product_seconds(shape: Shape, speeds: Speeds) -> float:
    """Products, selection and what is done for picks."""
    rounds = shape.may_round
    flops = 2.0 * shape.n_tokens * shape.d_in * shape.n_local
    n_pre_bytes = shape.n_tokens * shape.n_local * (2 if rounds else 4)
    if not chooses_k(shape.spec.activation):
        # nobody knows when few enough features will be active: the time of the steps through matrices is the longer one
        n_products = N_GATED_PRODUCTS if isinstance(shape.spec.activation, Gated) else N_DENSE_PRODUCTS
        rest_flops = speeds.bfloat16_flops if shape.is_large else speeds.float32_flops
        rest = flops * (n_products - 1) / rest_flops
        return flops / speeds.float32_flops + rest + (n_products - 2) * n_pre_bytes / speeds.scan_bytes
    encode = flops / (speeds.bfloat16_flops if rounds else speeds.float32_flops)
    n_scans = 1 + 2 * (aux_of(shape.spec.activation) is not None)
    return encode + n_scans * n_pre_bytes / speeds.scan_bytes + _pick_bytes(shape) / speeds.gather_bytes


def _pick_bytes(shape: Shape) -> float:
    """Bytes of rows that picks gather: decoded for this replica's tokens, summed for those that gradients are of."""
    activation = shape.spec.activation
    aux = aux_of(activation)
    k_aux = resolve_k_aux(aux, d_in=shape.d_in, d_sae=shape.d_sae) if aux is not None else 0
    n_local_picks = (shape.n_picks + k_aux) * shape.n_tokens / shape.mesh.features
    n_summed = n_local_picks * (shape.mesh.dp if shape.exchanges_batch else 1)
    n_groups = len(activation.group_fractions) if isinstance(activation, Matryoshka) else 1
    groups = 3 * (n_groups - 1) * shape.n_tokens * shape.d_out * 4
    return 4 * (1.5 * shape.d_out * n_local_picks + 1.5 * (shape.d_in + shape.d_out) / 2 * n_summed) + groups


def _sending_seconds(shape: Shape, speeds: Speeds) -> float:
    n_bytes, n_calls = sent_bytes(shape), 0
    n_calls += 6 if shape.mesh.features > 1 else 0
    n_calls += 6 if shape.mesh.dp > 1 else 0
    return n_bytes / speeds.sent_bytes + n_calls * speeds.call_s


def sent_bytes(shape: Shape) -> float:
    """What a rank hands to collectives in a step, as docs/performance.md lists it, in bytes."""
    mesh, n_rows = shape.mesh, n_residual_rows(shape.spec.activation)
    total = 0.0
    if mesh.features > 1:
        candidates = shape.n_picks if chooses_k(shape.spec.activation) else 0
        total += 4 * shape.n_tokens * (candidates + shape.d_out * n_rows) + 4 * shape.d_in
    if mesh.dp > 1:
        picks = 16 * shape.n_picks * shape.n_tokens / mesh.features
        batch = 4 * shape.n_tokens * (shape.d_in + shape.d_out * n_rows) + picks
        dense = 4 * shape.n_local * (shape.feature_width + 2)
        total += batch if shape.exchanges_batch and chooses_k(shape.spec.activation) else dense
        total += 4 * shape.n_local * shape.feature_width if shape.spec.shard_optimizer else 0
    return total
