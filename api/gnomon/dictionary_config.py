"""cfg.json of a dictionary: what its weights mean, and which tensors there must be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gnomon.errors import CorruptArtifact, InvalidRequest, NotFound

Activation = Literal["topk", "jumprelu", "standard", "gated"]
Architecture = Literal[
    "topk",
    "jumprelu",
    "standard",
    "gated",
    "transcoder",
    "topk_transcoder",
    "jumprelu_transcoder",
    "gated_transcoder",
    "crosscoder",
]
_KINDS: dict[Architecture, Activation] = {
    "topk": "topk",
    "jumprelu": "jumprelu",
    "standard": "standard",
    "gated": "gated",
    "transcoder": "standard",
    "topk_transcoder": "topk",
    "jumprelu_transcoder": "jumprelu",
    "gated_transcoder": "gated",
}
MAX_CONFIG_BYTES = 1 << 20
CONFIG_FILE = "cfg.json"


class DictionaryConfig(BaseModel):
    """cfg.json of a dictionary: what its weights mean.

    Evaluation suites write into it what they need (SAEBench its model, layer and dtype): a name that is no field of it
    is kept in the metadata, and read from there.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), use_attribute_docstrings=True)

    architecture: Architecture
    """Which features are active: "topk", "jumprelu", "standard" (ReLU) or "gated"; of a "crosscoder", see activation.

    With "_transcoder" behind it, or "transcoder" alone for ReLU: reads one hook and reconstructs another.
    """
    activation: Activation | None = None
    """Which features are active ("crosscoder" only)."""
    d_in: int = Field(ge=1, le=2**24)
    """Width of the activations that are encoded; of a crosscoder, of all hooks together."""
    d_out: int | None = Field(default=None, ge=1, le=2**24)
    """Width of what is reconstructed (transcoders only); None = d_in."""
    hooks: dict[str, int] | None = None
    """Module paths of the joined hooks, in order, with the width of each ("crosscoder" only)."""
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            super().__setattr__(name, value)
        else:
            self.metadata[name] = value

    def __getattr__(self, name: str) -> Any:
        """What was noted in the metadata; called for what is neither a field nor a property."""
        metadata = self.__dict__.get("metadata", {})
        if name in metadata:
            return metadata[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}, and its metadata neither")

    @property
    def kind(self) -> Activation:
        """Which features are active, whatever is read and reconstructed."""
        if self.activation is not None:
            return self.activation
        return _KINDS[self.architecture]

    @property
    def is_transcoder(self) -> bool:
        """Whether another hook than the input is reconstructed."""
        return self.architecture.endswith("transcoder")

    @property
    def hooks_read(self) -> tuple[str, ...]:
        """Module paths of the hooks whose activations are encoded, joined in this order."""
        if self.hooks is not None:
            return tuple(self.hooks)
        return (self.hf_hook_name or "",)

    @property
    def hooks_written(self) -> tuple[str, ...]:
        """Module paths of the hooks that are reconstructed."""
        return (self._text("hf_hook_name_out") or "",) if self.is_transcoder else self.hooks_read

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
        """Layer that the hook belongs to: as noted, else the first number in its name."""
        noted = self.metadata.get("hook_layer")
        if isinstance(noted, int):
            return noted
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


def load_config(folder: Path) -> DictionaryConfig:
    """Read and check cfg.json of a dictionary's folder."""
    path = existing_file(folder, CONFIG_FILE)
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
    check_config(cfg)
    return cfg


def wanted_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the weights must hold, no more and no fewer, with their shapes."""
    d_out = cfg.d_out if cfg.is_transcoder and cfg.d_out is not None else cfg.d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, d_out)}
    vectors = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(cfg.kind, ("b_enc",))
    return shapes | dict.fromkeys(vectors, (cfg.d_sae,)) | {"b_dec": (d_out,)}


def check_config(cfg: DictionaryConfig) -> None:
    """Raise CorruptArtifact where the parts of a config contradict each other."""
    if (cfg.activation is not None) != (cfg.architecture == "crosscoder"):
        raise CorruptArtifact(
            f"activation={cfg.activation!r} with architecture {cfg.architecture!r}: a crosscoder names its activation, "
            "all others are named by their architecture"
        )
    if cfg.kind == "topk" and not 1 <= (cfg.k or 0) <= cfg.d_sae:
        raise CorruptArtifact(f"a 'topk' dictionary needs k from 1 to d_sae={cfg.d_sae}, cfg.json has k={cfg.k}")
    if (cfg.hooks is not None) != (cfg.architecture == "crosscoder") or (
        cfg.hooks is not None and sum(cfg.hooks.values()) != cfg.d_in
    ):
        raise CorruptArtifact(
            f"hooks={cfg.hooks} do not make up d_in={cfg.d_in}; a crosscoder, and no other, has hooks"
        )
    if cfg.is_transcoder and cfg.apply_b_dec_to_input:
        raise CorruptArtifact("apply_b_dec_to_input is true in a transcoder, whose b_dec belongs to another hook")


def existing_file(folder: Path, name: str) -> Path:
    """Path of a file of a dictionary's folder; raises NotFound where there is none."""
    path = folder / name
    if not path.is_file():
        raise NotFound(f"no file {name!r} in {str(folder)!r}; wanted a folder in SAELens layout", code="missing_file")
    return path
