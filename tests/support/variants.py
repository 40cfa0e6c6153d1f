"""One small setting of every variant, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

from gnomon.specs import Activation, AuxK, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK

N_STEPS = 50
VARIANTS: dict[str, Activation] = {
    "topk": TopK(k=5),
    "topk+aux": TopK(k=5, aux=AuxK(k=8)),
    "batchtopk": BatchTopK(k=5),
    "batchtopk+aux": BatchTopK(k=5, aux=AuxK(k=8)),
    "matryoshka": Matryoshka(k=5),
    "matryoshka+aux": Matryoshka(k=5, aux=AuxK(k=8)),
    "jumprelu": JumpReLU(l0_coefficient=0.005, bandwidth=0.05, initial_threshold=0.05, warmup_steps=5),
    "jumprelu-target": JumpReLU(l0_coefficient=0.1, target_l0=6, bandwidth=0.05, initial_threshold=0.05),
    "gated": Gated(l1_coefficient=0.06),
    "relu": ReLU(l1_coefficient=0.06),
    "relu-decoder-norm": ReLU(l1_coefficient=0.06, penalty="decoder_norm_l1"),
    "p_anneal": PAnneal(l1_coefficient=0.06, start_step=5, n_updates=3, final_p=0.3),
}
FIELDS: dict[str, Any] = {
    "batch_size": 64,
    "token_budget": 64 * N_STEPS,
    "dead_after_tokens": 128,
    "optimizer": {"lr": 3e-3},
}
"""Of the spec; two batches, so that the auxiliary loss has dead features to revive."""
