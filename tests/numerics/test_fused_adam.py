"""PyTorch's fused kernel of Adam, which it keeps to itself: there, and equal to torch.optim.Adam."""

from __future__ import annotations

import torch

from gnomon_workers.sae.fused_adam import fused_adam


def test_the_fused_kernel_makes_the_steps_of_torch_optim_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator)]
    leaves = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.Adam(leaves, lr=1e-2, betas=(0.8, 0.99), eps=1e-7, fused=True)
    rows = [(tensor.clone(), torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in start]
    n_steps = torch.zeros(())
    for _ in range(4):
        gradients = [torch.randn(tensor.shape, generator=generator) for tensor in start]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.clone()
        optimizer.step()
        n_steps.add_(1)
        fused_adam(rows, gradients, n_steps, lr=1e-2, beta1=0.8, beta2=0.99, eps=1e-7)
    for leaf, (parameter, first, second) in zip(leaves, rows, strict=True):
        assert torch.equal(leaf, parameter)
        assert torch.equal(optimizer.state[leaf]["exp_avg"], first)
        assert torch.equal(optimizer.state[leaf]["exp_avg_sq"], second)
