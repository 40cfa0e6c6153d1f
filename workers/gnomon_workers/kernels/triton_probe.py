"""Whether Triton can be had, asked without importing it: most machines without a GPU have none."""

from __future__ import annotations

import importlib.util
import os

import torch


def triton_available(device: torch.device) -> bool:
    """Whether triton_kernels can be imported and runs on a device: CUDA, or the CPU under TRITON_INTERPRET=1.

    The interpreter is a thousand times slower than PyTorch and is there for tests: an automatic choice asks for CUDA
    besides.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
