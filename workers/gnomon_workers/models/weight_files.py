"""Which files of a folder hold a model's weights, and what their headers say, for whoever describes or loads it.

Nothing here reads a weight. What is loaded is what was described, because both ask here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from gnomon.errors import InvalidRequest
from gnomon.safetensors_header import read_header
from gnomon_workers.models.gguf_header import GgufHeader, parse_gguf

MAX_HEADER_BYTES: Final = 32 << 20
MAX_CONFIG_BYTES: Final = 4 << 20
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")
"""Floating-point numbers as they are; of others (quantised, boolean, complex) a cast makes another model."""
_ADAPTER: Final = "adapter_config.json"
_OTHER_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What the headers of a checkpoint's files say."""

    shapes: Mapping[str, tuple[int, ...]]
    odd_dtypes: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are not of WEIGHT_DTYPES -> their dtype, as safetensors calls it."""

    @classmethod
    def of_files(cls, files: Iterable[tuple[str, Mapping[str, Any]]], weight_map: Mapping[str, str] | None) -> Self:
        """All tensors of files, which are (name, tensor -> its dtype and shape).

        Raises InvalidRequest, "ambiguous_weights", where two files hold a tensor, or the index names another file.
        """
        found: dict[str, Any] = {}
        places: dict[str, str] = {}
        for file, tensors in files:
            for name, info in tensors.items():
                if name in places:
                    raise _ambiguous(f"tensor {name} is in {places[name]} and in {file}")
                found[name], places[name] = info, file
        for name, file in sorted((weight_map or {}).items()):
            if places.get(name) != file:
                raise _ambiguous(f"{INDEX} says that tensor {name} is in {file}, and it is in {places.get(name)}")
        return cls(
            shapes={name: tuple(info.shape) for name, info in found.items()},
            odd_dtypes={name: str(i.dtype) for name, i in found.items() if i.dtype not in WEIGHT_DTYPES},
        )


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
    """The safetensors files of a folder: those of its index where it has one, else model.safetensors.

    Raises InvalidRequest: "unknown_model" where one is missing (pickled weights are refused), "ambiguous_weights" where
    both are there and differ, "unmerged_adapter".
    """
    if (folder / _ADAPTER).is_file():
        raise unmerged_adapter(f"{str(folder)!r} has an {_ADAPTER}")
    weight_map = _weight_map(folder)
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in files:
        if "/" in name or not (folder / name).is_file():
            others = sorted(other.name for pattern in _OTHER_WEIGHTS for other in folder.glob(pattern))
            hint = f"; it has {', '.join(others[:5])}, which may run code and is never read" if others else ""
            raise bad_model(f"{str(folder)!r} has no {name}{hint}; convert the weights to safetensors")
    if (folder / SINGLE).is_file():
        check_alone(files)
    return tuple(folder / name for name in files)


def read_tensors(folder: Path) -> Tensors:
    """The tensors of `weight_files`; raises InvalidRequest as it does, and "ambiguous_weights"."""
    return Tensors.of_files(((path.name, _header(path)) for path in weight_files(folder)), _weight_map(folder))


def check_alone(files: Iterable[str]) -> None:
    """Raise InvalidRequest, "ambiguous_weights", where an index beside model.safetensors names other files."""
    if others := sorted(set(files) - {SINGLE}):
        raise _ambiguous(f"there is {SINGLE}, and {INDEX} names {', '.join(others[:3])}; remove one of them")


def unmerged_adapter(problem: str) -> InvalidRequest:
    """A model beside weights that a library for adapters would add to it."""
    return InvalidRequest(
        f"{problem}: an adapter, which is not read, so the model would be another one without it. Merge the adapter "
        "into the weights first (PEFT: merge_and_unload), or take it out of the folder",
        code="unmerged_adapter",
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index says; raises InvalidRequest, "unknown_model"."""
    index = _read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise bad_model(f"{str(path)!r} has no weight_map")
    return names


def _weight_map(folder: Path) -> dict[str, str] | None:
    return read_index(folder / INDEX) if (folder / INDEX).is_file() else None


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        try:
            return read_header(file, max_bytes=MAX_HEADER_BYTES).tensors
        except ValueError as error:
            raise bad_model(f"{str(path)!r} cannot be read: {error}") from error


def _ambiguous(problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"it is not clear which weights are the model's: {problem}. Save the whole model again, in an empty folder",
        code="ambiguous_weights",
    )


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
