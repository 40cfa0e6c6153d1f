"""A trained dictionary as a plain torch module; needs torch and safetensors (the extra `torch`)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gnomon.dictionary_config import DictionaryConfig, check_config, existing_file, load_config, wanted_shapes
from gnomon.errors import CorruptArtifact, InvalidRequest
from gnomon.safetensors_header import check_shapes, read_dictionary_header

WEIGHTS_FILE = "sae_weights.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Dictionary(nn.Module):
    """A sparse autoencoder: encode activations into features, decode features into activations.

    W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc (d_sae,), b_dec (d_out,); for "jumprelu" threshold (d_sae,); for
    "gated" b_gate and r_mag (d_sae,), and b_enc is the magnitude's bias, which its file calls b_mag. d_out is d_in but
    for transcoders; a crosscoder's activations are those of its hooks, joined. Weights do not require gradients;
    gradients flow through to the input.
    """

    threshold: nn.Parameter | None
    b_gate: nn.Parameter | None
    r_mag: nn.Parameter | None

    def __init__(
        self,
        cfg: DictionaryConfig,
        *,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
        b_gate: Tensor | None = None,
        r_mag: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (threshold is not None) != (cfg.kind == "jumprelu"):
            raise InvalidRequest(f"threshold belongs to 'jumprelu' alone, got architecture {cfg.architecture!r}")
        if (b_gate is not None, r_mag is not None) != (cfg.kind == "gated",) * 2:
            raise InvalidRequest(f"b_gate and r_mag belong to 'gated' alone, got architecture {cfg.architecture!r}")
        check_config(cfg)
        self.cfg = cfg
        self.W_enc = _frozen(W_enc)
        self.W_dec = _frozen(W_dec)
        self.b_enc = _frozen(b_enc)
        self.b_dec = _frozen(b_dec)
        self.threshold = None if threshold is None else _frozen(threshold)
        self.b_gate = None if b_gate is None else _frozen(b_gate)
        self.r_mag = None if r_mag is None else _frozen(r_mag)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights, of features and of reconstructions."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., d_sae) of activations x (..., d_in)."""
        x = x.to(self.dtype)
        sae_in = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        projection = sae_in @ self.W_enc
        if self.b_gate is not None and self.r_mag is not None:
            return gated_acts(projection + self.b_gate, projection * self.r_mag.exp() + self.b_enc)
        hidden_pre = projection + self.b_enc
        if self.cfg.kind == "topk" and self.cfg.k is not None:
            return topk_acts(hidden_pre, self.cfg.k)
        if self.threshold is not None:
            return jumprelu_acts(hidden_pre, self.threshold)
        return torch.relu(hidden_pre)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations (..., d_out) of features (..., d_sae)."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (..., d_out) of activations x (..., d_in)."""
        return self.decode(self.encode(x))

    def magnitude_encoder(self) -> Tensor:
        """The encoder (d_in, d_sae) that gives activations their size; W_enc but for "gated", whose gate it is."""
        return self.W_enc if self.r_mag is None else self.W_enc * self.r_mag.exp()

    def alignment(self) -> Tensor:
        """Alignment score <w, d> of every feature (d_sae,), in float32.

        Raises InvalidRequest for a transcoder: its encoder and decoder live in different spaces.
        """
        if self.cfg.is_transcoder:
            raise InvalidRequest("a transcoder has no alignment score: encoder and decoder live in different spaces")
        return (self.magnitude_encoder().float().T * self.W_dec.float()).sum(-1)

    def extra_repr(self) -> str:
        """Shape and kind, for people."""
        return f"{self.cfg.architecture}, d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}"


def topk_acts(hidden_pre: Tensor, k: int) -> Tensor:
    """Keep the k largest pre-activations of each row (..., d_sae), then ReLU.

    Ties are broken towards the lower index, so the result does not depend on the device or on sharding.
    """
    acts = torch.relu(hidden_pre)
    # Whether ReLU comes before or after makes no difference: what it zeroes is zero either way.
    smallest = acts.topk(k, dim=-1, sorted=True).values[..., -1:]
    kept = ~(acts < smallest)  # written so that NaN stays NaN instead of becoming a silent zero
    if bool(((kept & (acts > 0)).sum(-1) > k).any()):
        larger = ~(acts <= smallest)
        tied = acts == smallest
        n_free = k - larger.sum(-1, keepdim=True)
        kept = larger | (tied & (tied.cumsum(-1) <= n_free))
    return torch.where(kept, acts, torch.zeros_like(acts))


def jumprelu_acts(hidden_pre: Tensor, threshold: Tensor) -> Tensor:
    """Keep pre-activations (..., d_sae) strictly above the threshold (d_sae,), then ReLU."""
    acts = torch.relu(hidden_pre)
    return torch.where(hidden_pre <= threshold, torch.zeros_like(acts), acts)


def gated_acts(gates: Tensor, magnitudes: Tensor) -> Tensor:
    """Magnitudes (..., d_sae), then ReLU, where the gate (..., d_sae) is positive."""
    acts = torch.relu(magnitudes)
    return torch.where(gates <= 0, torch.zeros_like(acts), acts)


def load_folder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Dictionary:
    """Load a dictionary from a folder in SAELens layout (cfg.json, sae_weights.safetensors).

    Names, shapes, types and extents are checked against cfg.json before any weight is read.
    Raises NotFound where a file is missing, CorruptArtifact where one is not what it should be,
    InvalidRequest for an architecture that cannot be read.
    """
    folder = Path(path)
    cfg = load_config(folder)
    weights = existing_file(folder, WEIGHTS_FILE)
    check_shapes(weights, read_dictionary_header(weights), wanted_shapes(cfg))
    try:
        tensors = load_file(weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{str(weights)!r} cannot be read: {error}; download it again") from error
    dtype = dtype or _DTYPES[cfg.dtype]
    if "b_mag" in tensors:
        tensors["b_enc"] = tensors.pop("b_mag")
    return Dictionary(cfg, **{name: tensor.to(dtype) for name, tensor in tensors.items()}).to(device)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
