"""Headers of model files: safetensors and GGUF, read without loading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from gnomon.errors import InvalidRequest
from gnomon.safetensors_header import read_header
from gnomon_workers.models.gguf_header import GgufHeader, parse_gguf

MAX_HEADER_BYTES: Final = 32 << 20
MAX_CONFIG_BYTES: Final = 4 << 20
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_OTHER_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")


def bad_model(message: str) -> InvalidRequest:
    """A model that cannot be used."""
    return InvalidRequest(message, code="unknown_model")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; raises InvalidRequest, "unknown_model"."""
    path = folder / "config.json"
    if not path.is_file():
        raise bad_model(f"{str(folder)!r} has no config.json; give a folder in Hugging Face layout")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise bad_model(f"{str(path)!r} is not a JSON object")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, by its index where it has one; pickled weights are refused."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise bad_model(f"{str(folder / INDEX)!r} has no weight_map")
        files = sorted(set(names.values()))
    else:
        files = [SINGLE]
    for name in files:
        if "/" in name or not (folder / name).is_file():
            others = sorted(other.name for pattern in _OTHER_WEIGHTS for other in folder.glob(pattern))
            hint = f"; it has {', '.join(others[:5])}, which may run code and is never read" if others else ""
            raise bad_model(f"{str(folder)!r} has no {name}{hint}; convert the weights to safetensors")
    return tuple(folder / name for name in files)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file; raises InvalidRequest, "unknown_model"."""
    with path.open("rb") as file:
        try:
            header = read_header(file, max_bytes=MAX_HEADER_BYTES)
        except ValueError as error:
            raise bad_model(f"{str(path)!r} cannot be read: {error}") from error
    return {name: info.shape for name, info in header.tensors.items()}


def read_gguf(path: Path) -> GgufHeader:
    """Header of a GGUF file; raises InvalidRequest, "unknown_model"."""
    try:
        header = parse_gguf(path)
    except ValueError as error:
        raise bad_model(f"{str(path)!r} is not a readable GGUF file: {error}") from error
    if not isinstance(header.fields.get("general.architecture"), str):
        raise bad_model(f"{str(path)!r} does not say its architecture")
    return header


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_CONFIG_BYTES and path.name != INDEX:
        raise bad_model(f"{str(path)!r} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise bad_model(f"{str(path)!r} is not JSON ({error})") from error
