"""Other trainers' own steps, as their training loops make them, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("WANDB_MODE", "disabled")
Step = Callable[[Tensor], Any]


def make_sparsify(config: Any) -> Step:
    """sparsify's SparseCoder with Adam, and what its Trainer does around a backward pass."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(config.seed)
    device = getattr(config, "device", "cpu")
    sizes = SparseCoderConfig(num_latents=config.n, k=config.k)
    sae = SparseCoder(config.d, sizes, device=device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=device != "cpu")
    n_since_fired = torch.zeros(config.n, dtype=torch.int64, device=device)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):  # as its trainer does on a GPU
            out = sae(x=x, y=x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        n_since_fired.add_(len(x))
        n_since_fired[out.latent_indices.flatten()] = 0

    return step


def make_saelens(config: Any) -> Step:
    """SAELens' TopK."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(config.seed)
    sizes = TopKTrainingSAEConfig(d_in=config.d, d_sae=config.n, k=config.k, dtype="float32", device="cpu")
    return _saelens_step(config, TopKTrainingSAE(sizes))


def make_saelens_batchtopk(config: Any) -> Step:
    """SAELens' BatchTopK."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(config.seed)
    sizes = BatchTopKTrainingSAEConfig(d_in=config.d, d_sae=config.n, k=config.k, dtype="float32", device="cpu")
    return _saelens_step(config, BatchTopKTrainingSAE(sizes))


def _saelens_step(config: Any, sae: Any) -> Step:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = SAETrainerConfig(
        total_training_samples=config.batch * 10_000,
        train_batch_size_samples=config.batch,
        lr=config.lr,
        lr_end=config.lr,
        device="cpu",
    )
    trainer = SAETrainer(settings, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


MAKERS: dict[str, Callable[[Any], Step]] = {
    "sparsify": make_sparsify,
    "saelens": make_saelens,
    "saelens-batchtopk": make_saelens_batchtopk,
}
