"""What the costs of a training follow from: its spec, its widths and its mesh. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from gnomon.specs import Activation, AuxK, BatchTopK, Gated, JumpReLU, Matryoshka, Mesh, TopK, TrainSpec, chooses_k

Device = Literal["cpu", "gpu"]
FLOAT_BYTES: Final = 4
MIN_PRODUCTS: Final = 1 << 30
"""Multiplications in an encoder product below which "auto" stays in float32: there is little to gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One dictionary on a mesh, as far as memory and time depend on it."""

    spec: TrainSpec
    """As if this dictionary were trained alone."""
    d_in: int
    d_out: int
    """Width of the reconstruction: d_in but for transcoders."""
    d_sae: int
    mesh: Mesh
    is_transcoder: bool = False
    """Whether something other than the input is reconstructed."""

    @property
    def n_local(self) -> int:
        """Features of a rank."""
        return -(-self.d_sae // self.mesh.features)

    @property
    def n_own(self) -> int:
        """Features of a rank whose rows it moves: a replica's share where replicas divide the optimizer."""
        return -(-self.n_local // self.mesh.dp) if self.spec.shard_optimizer else self.n_local

    @property
    def n_tokens(self) -> int:
        """Tokens of a step that a replica encodes."""
        return -(-self.spec.batch_size // self.mesh.dp)

    @property
    def is_tied(self) -> bool:
        """Whether encoder and decoder are one matrix."""
        return self.spec.alignment == "tied"

    @property
    def row_width(self) -> int:
        """Numbers in a row of activations that is read: a transcoder's target follows its input."""
        return self.d_in + (self.d_out if self.is_transcoder else 0)

    @property
    def feature_width(self) -> int:
        """Weights of a feature in both matrices."""
        return self.d_out + (0 if self.is_tied else self.d_in)

    @property
    def n_vectors(self) -> int:
        """Numbers of a feature beside its rows: b_enc, and what its activation trains besides."""
        match self.spec.activation:
            case JumpReLU():
                return 2
            case Gated():
                return 3
            case _:
                return 1

    @property
    def n_picks(self) -> float:
        """Active features of a token on all shards, as far as that is known beforehand."""
        activation = self.spec.activation
        return float(activation.k) if chooses_k(activation) else self.d_sae / 16

    @property
    def may_round(self) -> bool:
        """Whether the encoder's product may be bfloat16: where k features are chosen, if the hardware is fast at it."""
        if not chooses_k(self.spec.activation) or self.spec.encoder_dtype == "float32":
            return False
        return self.spec.encoder_dtype == "bfloat16" or self.is_large

    @property
    def is_large(self) -> bool:
        """Whether the encoder's product is large enough to gain by bfloat16."""
        return self.spec.batch_size * self.d_in * self.d_sae >= MIN_PRODUCTS

    @property
    def exchanges_batch(self) -> bool:
        """Whether replicas exchange the batch: as the spec says, or where that is less to receive.

        In a ring of dp replicas a rank receives (dp - 1) / dp of the batch, or twice that of the dense gradients.
        """
        if self.spec.gradient_exchange != "auto":
            return self.spec.gradient_exchange == "batch"
        batch = self.spec.batch_size * (
            self.d_in + self.d_out * n_residual_rows(self.spec.activation) + 4 * self.n_picks / self.mesh.features
        )
        return batch <= 2 * (self.d_sae // self.mesh.features) * (self.d_in + self.d_out)


def aux_of(activation: Activation) -> AuxK | None:
    """The auxiliary loss, if any."""
    return activation.aux if isinstance(activation, TopK | BatchTopK | Matryoshka) else None


def n_residual_rows(activation: Activation) -> int:
    """Rows of residual gradients of each token: one for every Matryoshka group, and one for the auxiliary loss."""
    n_groups = len(activation.group_fractions) if isinstance(activation, Matryoshka) else 1
    return n_groups + (aux_of(activation) is not None)


def resolve_k_aux(aux: AuxK | None, *, d_in: int, d_sae: int) -> int:
    """Dead features used per token by the auxiliary loss: given, or the power of two nearest d_in / 2."""
    if aux is not None and aux.k is not None:
        return min(aux.k, d_sae)
    half = d_in / 2
    below = 1 << max(0, int(half).bit_length() - 1)
    return min(below if half / below <= 1.5 else 2 * below, d_sae)
