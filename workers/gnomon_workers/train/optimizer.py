"""Fused Adam over the parameters of one shard, with its state in plain tensors so that a checkpoint is the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from gnomon.specs import Adam
from gnomon_workers.sae.parameters import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamState:
    """Moments, gradients and the number of steps, by the names of Parameters.tensors()."""

    config: Adam
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    """Dense buffers, re-used at every step."""
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    steps: dict[str, Tensor]
    """One float32 scalar for each parameter, as the fused kernel wants it."""

    @classmethod
    def create(cls, config: Adam, parameters: Parameters) -> AdamState:
        """State of an optimizer that has made no step."""
        params = parameters.tensors()
        return cls(
            config=config,
            params=params,
            grads={name: torch.zeros_like(p) for name, p in params.items()},
            first={name: torch.zeros_like(p) for name, p in params.items()},
            second={name: torch.zeros_like(p) for name, p in params.items()},
            steps={name: torch.zeros((), device=p.device) for name, p in params.items()},
        )

    def step(self, lr: float, clip_scale: Tensor) -> None:
        """One step down the gradients, multiplied by clip_scale (a scalar) first."""
        names = list(self.params)
        adam(
            [self.params[n] for n in names],
            [self.grads[n] for n in names],
            [self.first[n] for n in names],
            [self.second[n] for n in names],
            [],
            [self.steps[n] for n in names],
            fused=True,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=lr,
            weight_decay=0.0,
            eps=self.config.eps,
            maximize=False,
            # the kernel divides by grad_scale
            grad_scale=clip_scale.reciprocal().float(),
        )


def learning_rate(step: int, *, peak: float, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Rate of step `step` (from 0): linear warm-up, constant, linear decay over the last share of the run."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    n_decay = decay_fraction * n_steps
    decay = min(1.0, (n_steps - step) / n_decay) if n_decay > 0 else 1.0
    return peak * warm * decay
