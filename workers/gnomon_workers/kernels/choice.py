"""Which kernels a rank computes with."""

from __future__ import annotations

from typing import Literal

import torch

from gnomon.errors import InvalidRequest
from gnomon_workers.kernels.reference import ReferenceKernels
from gnomon_workers.kernels.sparse import SparseKernels
from gnomon_workers.kernels.triton_probe import triton_available
from gnomon_workers.sae.products import Kernels


def choose_kernels(wanted: Literal["auto", "reference", "sparse", "triton"], device: torch.device) -> Kernels:
    """The kernels asked for; "auto" is Triton's on CUDA and the sparse ones elsewhere.

    Raises InvalidRequest ("kernels_unavailable") where Triton's are asked for and cannot run.
    """
    if wanted == "reference":
        return ReferenceKernels()
    has_triton = triton_available(device)
    if wanted == "triton" and not has_triton:
        raise InvalidRequest(
            f"kernels='triton' needs a CUDA device and the triton package; this rank computes on {device}; "
            "use kernels='auto'",
            code="kernels_unavailable",
        )
    if wanted == "triton" or (wanted == "auto" and device.type == "cuda" and has_triton):
        from gnomon_workers.kernels.triton_kernels import TritonKernels

        return TritonKernels()
    return SparseKernels()
