"""A trained dictionary as a plain torch module; needs torch and safetensors (the extra `torch`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gnomon._safetensors import check_shapes, read_header
from gnomon.errors import CorruptArtifact, InvalidRequest, NotFound

Architecture = Literal["topk", "jumprelu", "standard"]
MAX_CONFIG_BYTES = 1 << 20
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DictionaryConfig(BaseModel):
    """cfg.json of a dictionary: what its weights mean."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    architecture: Architecture
    """Which features are active: "topk", "jumprelu" or "standard" (ReLU)."""
    d_in: int = Field(ge=1, le=2**24)
    """Width of the activations."""
    d_sae: int = Field(ge=1, le=2**28)
    """Number of features."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Element type of the weights."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec from the input before encoding."""
    normalize_activations: Literal["none"] = "none"
    """Scaling is folded into the weights; no other value can be read."""
    reshape_activations: Literal["none"] = "none"
    """Inputs are rows of width d_in; no other value can be read."""
    rescale_acts_by_decoder_norm: Literal[False] = False
    """Decoder rows have unit norm, so there is nothing to rescale by."""
    k: int | None = Field(default=None, ge=1)
    """Active features per token ("topk" only)."""
    metadata: dict[str, Any] = {}
    """Where the dictionary comes from: model, hook, data, and how it was trained."""

    @property
    def model_name(self) -> str | None:
        """Model whose activations were used."""
        return self._text("model_name")

    @property
    def hook_name(self) -> str | None:
        """Hook in TransformerLens' naming ("blocks.6.hook_resid_post"), where it has one."""
        return self._text("hook_name")

    @property
    def hf_hook_name(self) -> str | None:
        """Hook as a module path of the Hugging Face model ("model.layers.6")."""
        return self._text("hf_hook_name")

    @property
    def hook_layer(self) -> int | None:
        """Layer that the hook belongs to: the first number in its name."""
        found = re.search(r"\.(\d+)(\.|$)", self.hook_name or self.hf_hook_name or "")
        return int(found[1]) if found else None

    @property
    def context_size(self) -> int | None:
        """Tokens in a context during training."""
        size = self.metadata.get("context_size")
        return size if isinstance(size, int) else None

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


class Dictionary(nn.Module):
    """A sparse autoencoder: encode activations into features, decode features into activations.

    W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc (d_sae,), b_dec (d_in,), and for "jumprelu" threshold
    (d_sae,). Weights do not require gradients; gradients flow through to the input.
    """

    threshold: nn.Parameter | None

    def __init__(
        self,
        cfg: DictionaryConfig,
        *,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (threshold is not None) != (cfg.architecture == "jumprelu"):
            raise InvalidRequest(f"threshold belongs to 'jumprelu' alone, got architecture {cfg.architecture!r}")
        _check_k(cfg)
        self.cfg = cfg
        self.W_enc = _frozen(W_enc)
        self.W_dec = _frozen(W_dec)
        self.b_enc = _frozen(b_enc)
        self.b_dec = _frozen(b_dec)
        self.threshold = None if threshold is None else _frozen(threshold)

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
        hidden_pre = sae_in @ self.W_enc + self.b_enc
        if self.cfg.architecture == "topk" and self.cfg.k is not None:
            return topk_acts(hidden_pre, self.cfg.k)
        if self.threshold is not None:
            return jumprelu_acts(hidden_pre, self.threshold)
        return torch.relu(hidden_pre)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations (..., d_in) of features (..., d_sae)."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (..., d_in) of activations x (..., d_in)."""
        return self.decode(self.encode(x))

    def alignment(self) -> Tensor:
        """Alignment score <w, d> of every feature (d_sae,), in float32."""
        return (self.W_enc.float().T * self.W_dec.float()).sum(-1)

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
    weights = _existing(folder, WEIGHTS_FILE)
    check_shapes(weights, read_header(weights), _wanted_shapes(cfg))
    try:
        tensors = load_file(weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{str(weights)!r} cannot be read: {error}; download it again") from error
    dtype = dtype or _DTYPES[cfg.dtype]
    return Dictionary(cfg, **{name: tensor.to(dtype) for name, tensor in tensors.items()}).to(device)


def load_config(folder: Path) -> DictionaryConfig:
    """Read and check cfg.json of a dictionary's folder."""
    path = _existing(folder, CONFIG_FILE)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CorruptArtifact(f"{str(path)!r} has {path.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are allowed")
    try:
        cfg = DictionaryConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if field == "architecture" and first["type"] == "literal_error":
            raise InvalidRequest(
                f"{str(path)!r}: architecture {first['input']!r} cannot be read; wanted one of "
                f"{', '.join(get_args(Architecture))}",
                code="unsupported_architecture",
            ) from error
        raise CorruptArtifact(f"{str(path)!r}: {field or 'file'}: {first['msg']}") from error
    _check_k(cfg)
    return cfg


def _wanted_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "W_dec": (cfg.d_sae, cfg.d_in),
        "b_enc": (cfg.d_sae,),
        "b_dec": (cfg.d_in,),
    }
    if cfg.architecture == "jumprelu":
        shapes["threshold"] = (cfg.d_sae,)
    return shapes


def _check_k(cfg: DictionaryConfig) -> None:
    if cfg.architecture == "topk" and not 1 <= (cfg.k or 0) <= cfg.d_sae:
        raise CorruptArtifact(f"a 'topk' dictionary needs k from 1 to d_sae={cfg.d_sae}, cfg.json has k={cfg.k}")


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise NotFound(f"no file {name!r} in {str(folder)!r}; wanted a folder in SAELens layout", code="missing_file")
    return path


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
