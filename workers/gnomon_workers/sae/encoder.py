"""The encoder product, in float32 or, where the hardware is fast at it, in bfloat16 with float32 masters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gnomon_workers.parallel.clock import StepClock
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.shape import MIN_PRODUCTS


class Encoder:
    """Computes pre-activations into a buffer that is used again at every step.

    In bfloat16 the choice of features is that of the bfloat16 product, ties to the lowest index; what the chosen ones
    are worth is then computed in float32, so that neither the reconstruction nor a gradient is of lower precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._hidden_pre = torch.empty(0)
        self._copy = torch.empty(0)
        self._is_current = False

    def __call__(self, inputs: Tensor, parameters: Parameters) -> Tensor:
        """Pre-activations (tokens, n_local) of inputs (tokens, d_in), valid until the next call."""
        dtype = self.dtype if inputs.dtype == torch.float32 else inputs.dtype
        weights, shape = parameters.W_enc_rows, (len(inputs), parameters.n_local)
        if self._hidden_pre.shape != shape:
            self._hidden_pre = inputs.new_empty(shape, dtype=dtype)
        copy = self.copy_of(weights)
        if copy is not None:
            weights = copy if self._is_current else copy.copy_(weights)
        return torch.addmm(parameters.b_enc.to(dtype), inputs.to(dtype), weights.t(), out=self._hidden_pre)

    def copy_of(self, weights: Tensor) -> Tensor | None:
        """Where the encoder's own copy of float32 weights lies, (n_local, d_in); None where it multiplies them.

        An update that leaves the new weights there as well, while it has them at hand, saves the next product a pass
        over the masters; `keep` says so.
        """
        if weights.dtype == self.dtype or weights.dtype != torch.float32:
            return None
        if self._copy.shape != weights.shape:
            self._copy, self._is_current = torch.empty_like(weights, dtype=self.dtype), False
        return self._copy

    def keep(self, is_current: bool) -> None:
        """Say whether the copy holds the weights as they are: only an update that wrote both knows."""
        self._is_current = is_current


class PreActivations:
    """The pre-activations of a batch, computed when and if somebody needs them whole."""

    def __init__(self, encoder: Encoder, inputs: Tensor, parameters: Parameters, clock: StepClock) -> None:
        """inputs is (tokens, d_in)."""
        self.inputs = inputs
        self.parameters = parameters
        self._encoder = encoder
        self._clock = clock
        self._dense: Tensor | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether features are chosen by products of rounded factors, so that what they are worth must be computed."""
        return self._encoder.dtype == torch.bfloat16 and self.inputs.dtype == torch.float32

    def dense(self) -> Tensor:
        """(tokens, n_local), in the encoder's dtype."""
        if self._dense is None:
            with self._clock.section("gemm"):
                self._dense = self._encoder(self.inputs, self.parameters)
        return self._dense


def choose_encoder_dtype(
    wanted: Literal["auto", "float32", "bfloat16"], *, n_products: int, device: torch.device, mesh: ProcessMesh
) -> torch.dtype:
    """The dtype of the encoder product, the same on every rank; n_products = batch * d_in * d_sae.

    "auto" is bfloat16 where every rank's hardware is fast at it, and the product is large enough to be worth it: by
    the size of the whole, for a choice that depended on the shard would depend on the mesh.
    """
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if n_products < MIN_PRODUCTS:
        return torch.float32
    fast = mesh.all_gather(torch.tensor([is_fast_in_bfloat16(device)], device=device), "world")
    return torch.bfloat16 if bool(torch.cat(fast).all()) else torch.float32


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # an older torch, which cannot tell, gets the slower product of the two
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16"))
