"""A published dictionary as an evaluation needs it: all of it, its config alone, or some features at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gnomon.dictionary import WEIGHTS_FILE, Dictionary, load_folder
from gnomon.dictionary_config import (
    CONFIG_FILE,
    DictionaryConfig,
    existing_file,
    load_config,
    wanted_shapes,
)
from gnomon.errors import CorruptArtifact
from gnomon.metrics import AlignmentMetrics
from gnomon.safetensors_header import check_shapes, read_dictionary_header
from gnomon_storage.location import Location
from gnomon_workers.evaluate.metrics import alignment_of_blocks
from gnomon_workers.runtime.scratch import scratch_folder

BLOCK_ELEMENTS: Final = 1 << 18
"""Of one matrix, that are held at once: 2 MB in float64, and some times that while norms are taken."""


def load_dictionary(folder: Location) -> Dictionary:
    """A dictionary from its folder, downloaded first where it is remote."""
    with _local(folder, CONFIG_FILE, WEIGHTS_FILE) as path:
        return load_folder(path)


def read_config(folder: Location) -> DictionaryConfig:
    """The config of a dictionary; nothing else of its folder is read."""
    with _local(folder, CONFIG_FILE) as path:
        return load_config(path)


def alignment_of(folder: Location) -> AlignmentMetrics | None:
    """`alignment_of_files` of a folder that may be remote."""
    if read_config(folder).is_transcoder:
        return None
    with _local(folder, CONFIG_FILE, WEIGHTS_FILE) as path:
        return alignment_of_files(path)


def alignment_of_files(folder: Path) -> AlignmentMetrics | None:
    """Alignment scores of a dictionary; None for a transcoder, whose encoder and decoder live in different spaces.

    Holds some features in memory at a time, never the weights. Raises as `gnomon.dictionary.load_folder`.
    """
    config = load_config(folder)
    if config.is_transcoder:
        return None
    weights = existing_file(folder, WEIGHTS_FILE)
    check_shapes(weights, read_dictionary_header(weights), wanted_shapes(config))
    try:
        with safe_open(weights, framework="pt") as file:
            return alignment_of_blocks(_blocks(file))
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{str(weights)!r} cannot be read: {error}; download it again") from error


def _blocks(file: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The encoder that gives features their size (d_in, n), and the decoder (n, d_in), of some features each."""
    W_enc, W_dec = file.get_slice("W_enc"), file.get_slice("W_dec")
    is_gated = "r_mag" in file.keys()  # noqa: SIM118 - the file is no mapping
    d_sae, d_in = W_dec.get_shape()
    n_block = max(1, BLOCK_ELEMENTS // d_in)
    for start in range(0, d_sae, n_block):
        features = slice(start, min(start + n_block, d_sae))
        w = W_enc[:, features].float()
        yield w * file.get_slice("r_mag")[features].float().exp() if is_gated else w, W_dec[features]


@contextmanager
def _local(folder: Location, *names: str) -> Iterator[Path]:
    """The folder on this machine; with the named files alone, for a while, where it is remote."""
    path = folder.local_path()
    if path is not None:
        yield path
        return
    with scratch_folder() as temp:
        for name in names:
            folder.child(name).download(temp / name)
        yield temp
