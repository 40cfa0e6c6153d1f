"""One step of Adam for several tensors at once, by PyTorch's own kernel.

The only place that calls a function which PyTorch keeps to itself: torch.optim's way to the same kernel costs more than
the work of a block of rows. tests/numerics/test_fused_adam.py holds that it is there and equals torch.optim.Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fused_adam(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    gradients: Sequence[Tensor],
    n_steps: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Move (parameter, first moment, second moment) triples down their gradients; n_steps counts this step too."""
    params, first, second = (list(column) for column in zip(*rows, strict=True))
    torch._fused_adam_(
        params,
        list(gradients),
        first,
        second,
        [],
        [n_steps.to(params[0].device, non_blocking=True)] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
