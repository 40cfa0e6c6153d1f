"""The most memory that a rank of a training will hold, by what it is for. Imports no torch.

Every formula is that of tensors which the step really makes; tests/numerics/test_costs.py compares them with those, and
benchmarks/plans.py with the memory of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gnomon.specs import Gated, chooses_k
from gnomon_workers.sae.shape import FLOAT_BYTES, Device, Shape, aux_of, n_residual_rows, resolve_k_aux

MOST_SAMPLE_ROWS: Final = 65_536
"""Activations that b_dec is initialised from, at most."""
MOST_SAMPLE_BYTES: Final = 128 << 20
"""What they take at most as float32: every rank reads them, however small its shard."""
BUFFER_BYTES: Final = 256 << 20
"""Of rows that are shuffled together; two are held of each hook."""
PROCESS_BYTES: Final[dict[Device, int]] = {"cpu": 430 << 20, "gpu": 600 << 20}
"""Of a rank without a dictionary: the interpreter and its libraries with what a first step adds, or CUDA's own."""
BLOCK_BYTES: Final[dict[Device, int]] = {"cpu": 2 << 20, "gpu": 1 << 30}
"""Of a matrix [tokens, features of a block] in a step through matrices."""
DENSE_SHARE: Final = 0.2
"""Share of active features up to which float32 steps hold them as lists; .1 where products are bfloat16."""
PICK_BYTES: Final = 130
"""Of a pick: indices, activation, gradient, and the orders it is sorted by."""
LISTED_BYTES: Final = 95
"""The same of the many picks of a step that has just ceased to go through matrices; and 10 for each vector."""
CANDIDATE_BYTES: Final = 45
"""Of an entry of the groups that features are chosen from, for each byte of the pre-activations: values and masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """The most memory of one rank, in bytes."""

    parts: dict[str, int]
    """By what it is for, in the phase in which all together are most."""
    state_bytes: int
    """What no batch is too small for: weights and moments, in every phase but the first."""
    phase: str
    """That phase: "initialise", "step"; "dense", while most features are active, and "sparse", as soon as few are."""
    variant: str
    """Whose phase it is; empty where there are no variants."""

    @property
    def n_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows that a run reads."""

    n_rows: int
    n_bytes_value: int = 2
    """Of a stored number."""
    n_hooks: int = 1


def rank_memory(shapes: Sequence[Shape], device: Device, rows: Rows, names: Sequence[str] = ("",)) -> RankMemory:
    """The most memory of a rank that trains dictionaries of these shapes, one after the other in every step.

    What a dictionary keeps from step to step adds up over all of them; what a step needs besides is that of the worst.
    """
    common = {"loader": loader_bytes(shapes[0], rows) if device == "cpu" else 0, "process": PROCESS_BYTES[device]}
    kept = [kept_bytes(shape) for shape in shapes]
    wholes = [
        RankMemory(
            parts=_with({**common, **_held(kept, index, phase)}, passing),
            state_bytes=sum(each["weights"] + each["moments"] for each in kept),
            phase=phase,
            variant=name,
        )
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
        for phase, passing in passing_bytes(shape, device, rows).items()
    ]
    return max(wholes, key=lambda each: each.n_bytes)


def _held(kept: Sequence[dict[str, int]], index: int, phase: str) -> dict[str, int]:
    """What dictionaries keep in a phase of one of them: while it is initialised, what was made before; no buffers."""
    if phase == "initialise":
        made = {part: sum(each[part] for each in kept[:index]) for part in kept[0]}
        return made | {"gradients": 0, "pre_activations": 0}
    return {part: sum(each[part] for each in kept) for part in kept[0]}


def _with(common: dict[str, int], passing: dict[str, int]) -> dict[str, int]:
    return {part: common.get(part, 0) + passing.get(part, 0) for part in {**common, **passing}}


def kept_bytes(shape: Shape) -> dict[str, int]:
    """What a dictionary keeps from step to step: weights, moments, and buffers that are used again.

    With pre-activations goes the copy of the encoder in bfloat16 that they are made by, where there is one.
    """
    vectors = shape.n_local * shape.n_vectors + shape.d_out
    copy = 2 * shape.n_local * shape.d_in if shape.may_round else 0
    return {
        "weights": FLOAT_BYTES * (shape.n_local * shape.feature_width + vectors),
        "moments": 2 * FLOAT_BYTES * (shape.n_own * shape.feature_width + vectors) + 8 * shape.n_local,
        "gradients": FLOAT_BYTES * touched_rows(shape) * shape.feature_width,
        "pre_activations": shape.n_tokens * shape.n_local * pre_activation_bytes(shape) + copy,
    }


def pre_activation_bytes(shape: Shape) -> int:
    """Of a pre-activation: those of "auto" where it is not known whether the hardware is fast at bfloat16 are 2."""
    return 2 if shape.may_round else FLOAT_BYTES


def touched_rows(shape: Shape) -> int:
    """Features of a shard that have a gradient in a step: those that any token of the batch picks."""
    if not chooses_k(shape.spec.activation):
        return shape.n_local
    aux = aux_of(shape.spec.activation)
    k = shape.n_picks + (resolve_k_aux(aux, d_in=shape.d_in, d_sae=shape.d_sae) if aux is not None else 0)
    n_tokens = shape.spec.batch_size if shape.exchanges_batch else shape.n_tokens
    touched = shape.n_local * (1 - math.exp(-k * n_tokens / shape.d_sae))
    # beyond half of them the update goes through all; below, its buffers grow by a quarter more than is asked for
    return shape.n_local if touched > shape.n_local / 2 else math.ceil(1.25 * touched)


def passing_bytes(shape: Shape, device: Device, rows: Rows) -> dict[str, dict[str, int]]:
    """What is held for a while, by phase and part."""
    batch = (
        FLOAT_BYTES
        * shape.n_tokens
        * (2 * shape.row_width + shape.d_out * (1 + n_residual_rows(shape.spec.activation)))
    )
    begin = {"initialise": {"batch": sample_rows(shape, rows) * (4 * shape.row_width + 8 * shape.d_out)}}
    if chooses_k(shape.spec.activation):
        step = {"batch": batch, "selection": _selection_bytes(shape), "exchange": exchange_bytes(shape)}
        return begin | {"step": step}
    n_decoded = 2 if isinstance(shape.spec.activation, Gated) else 1
    block = min(BLOCK_BYTES[device], FLOAT_BYTES * shape.n_tokens * shape.n_local)
    dense = {"batch": batch * n_decoded, "selection": 10 * n_decoded * block, "exchange": exchange_bytes(shape)}
    # what the blocks took stays with the process, in pieces too small to be given back
    lists = _list_bytes(shape) + (10 * block if device == "cpu" else 0)
    sparse = {"batch": batch * n_decoded, "selection": lists, "exchange": exchange_bytes(shape)}
    return begin | {"dense": dense, "sparse": sparse}


def _selection_bytes(shape: Shape) -> int:
    """Group maxima, the entries that may be chosen, and the picks of a variant that chooses k."""
    item = pre_activation_bytes(shape)
    n_local_picks = min(shape.n_local, shape.n_picks) * shape.n_tokens
    n_summed = n_local_picks * (shape.mesh.dp if shape.exchanges_batch else 1)
    maxima = shape.n_tokens * shape.n_local * item // 16
    aux = aux_of(shape.spec.activation)
    if aux is not None:  # the pre-activations of dead features, as a copy with its mask
        k_aux = resolve_k_aux(aux, d_in=shape.d_in, d_sae=shape.d_sae)
        maxima += shape.n_tokens * (shape.n_local * (2 * item + 1) + k_aux * 2 * PICK_BYTES)
    return int(maxima + n_local_picks * CANDIDATE_BYTES * item + n_summed * PICK_BYTES)


def _list_bytes(shape: Shape) -> int:
    """The picks of a step of which just few enough features are active to be held as lists."""
    share = DENSE_SHARE / 2 if shape.is_large and shape.spec.encoder_dtype == "auto" else DENSE_SHARE
    n_pairs = shape.n_tokens * shape.n_local
    n_bytes = LISTED_BYTES + 10 * shape.n_vectors
    product = FLOAT_BYTES * n_pairs if share > 0.1 else 0
    n_summed = n_pairs * (shape.mesh.dp if shape.exchanges_batch else 1)
    return int(share * n_summed * n_bytes) + product + n_pairs


def exchange_bytes(shape: Shape) -> int:
    """What replicas and shards receive from each other in a step."""
    mesh = shape.mesh
    received = 0.0
    if mesh.features > 1 and chooses_k(shape.spec.activation):
        received += 2 * FLOAT_BYTES * shape.n_tokens * shape.n_picks * mesh.features
    if mesh.dp > 1:
        if shape.exchanges_batch:
            width = shape.d_in + shape.d_out * n_residual_rows(shape.spec.activation)
            received += 2 * FLOAT_BYTES * shape.spec.batch_size * width
        else:
            received += FLOAT_BYTES * shape.n_local * shape.feature_width
    return int(received)


def most_sample_rows(row_width: int) -> int:
    """Activations that b_dec is initialised from, where a store has as many."""
    return min(MOST_SAMPLE_ROWS, MOST_SAMPLE_BYTES // (FLOAT_BYTES * row_width))


def sample_rows(shape: Shape, rows: Rows) -> int:
    """Activations that b_dec is initialised from."""
    return min(most_sample_rows(shape.row_width), rows.n_rows)


def loader_bytes(shape: Shape, rows: Rows) -> int:
    """Of main memory: shuffled rows of every hook, two buffers where one does not hold them, and the sample."""
    stored = rows.n_rows * shape.row_width * rows.n_bytes_value
    buffers = stored if stored <= BUFFER_BYTES * rows.n_hooks else 2 * min(stored, BUFFER_BYTES * rows.n_hooks)
    sample = FLOAT_BYTES * sample_rows(shape, rows) * shape.row_width
    return buffers + sample + 16 * rows.n_hooks * min(rows.n_rows, buffers // (shape.row_width * rows.n_bytes_value))
