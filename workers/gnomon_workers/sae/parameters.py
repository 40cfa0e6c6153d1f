"""The parameters of one shard of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gnomon_workers.sae.random import random_unit_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Features [start, start + n_local) of a dictionary, and the decoder bias, which every shard holds whole.

    The encoder is kept by rows, one contiguous row a feature, as the decoder is: alignment, gradients and Adam
    work on whole features. `W_enc` is the view of it in the field's orientation.
    """

    W_enc_rows: Tensor
    """(n_local, d_in); the same tensor as W_dec where encoder and decoder are tied."""
    W_dec: Tensor
    """(n_local, d_out), rows of norm 1; d_out is d_in but for transcoders."""
    b_enc: Tensor
    """(n_local,)"""
    b_dec: Tensor
    """(d_out,)"""
    start: int
    """Global index of the first feature of this shard."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """(n_local,) each, by name: what a variant trains besides, e.g. thresholds."""

    @property
    def W_enc(self) -> Tensor:
        """(d_in, n_local), a view."""
        return self.W_enc_rows.t()

    @property
    def n_local(self) -> int:
        """Features that this rank holds: d_sae over the number of shards."""
        return self.W_dec.shape[0]

    @property
    def is_tied(self) -> bool:
        """Whether encoder and decoder are one tensor."""
        return self.W_enc_rows.data_ptr() == self.W_dec.data_ptr()

    def tensors(self) -> dict[str, Tensor]:
        """The distinct trained tensors by name, in a fixed order."""
        named = {"W_enc_rows": self.W_enc_rows, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        named |= self.vectors
        if self.is_tied:
            del named["W_enc_rows"]
        return named


def make_parameters(
    *,
    seed: int,
    d_in: int,
    start: int,
    stop: int,
    b_dec: Tensor,
    tied: bool,
    vectors: Mapping[str, float] | None = None,
    is_transcoder: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Parameters:
    """Initialise features [start, stop): random unit decoder, encoder equal to it (score 1 for everyone), b_enc 0.

    No rank ever holds more than its own features. b_dec is (d_out,), from a first sample of the data; vectors gives
    the value that each starts from. The encoder of a transcoder reads another space, and is a draw of its own.
    """
    W_dec = random_unit_rows(seed, "init", start, stop, len(b_dec)).to(device=b_dec.device, dtype=dtype)
    if is_transcoder:
        W_enc_rows = random_unit_rows(seed, "init_encoder", start, stop, d_in).to(device=b_dec.device, dtype=dtype)
    else:
        W_enc_rows = W_dec if tied else W_dec.clone()
    return Parameters(
        W_enc_rows=W_enc_rows,
        W_dec=W_dec,
        b_enc=torch.zeros(stop - start, device=b_dec.device, dtype=dtype),
        b_dec=b_dec.to(dtype).clone(),
        start=start,
        vectors={
            name: torch.full((stop - start,), value, device=b_dec.device, dtype=dtype)
            for name, value in (vectors or {}).items()
        },
    )
