"""What a training will take of memory and disk, and on which mesh it is worth its devices. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

from gnomon.errors import InvalidRequest
from gnomon.specs import Mesh, TrainSpec
from gnomon.specs.train import MOST_OF_AN_AXIS
from gnomon_workers.sae.memory import RankMemory, Rows, rank_memory
from gnomon_workers.sae.shape import FLOAT_BYTES, Device, Shape
from gnomon_workers.sae.speeds import step_seconds

N_KEPT: Final = 2
"""Checkpoints kept: the last, and the one before it in case the last is found damaged."""
WORTH: Final = 0.7
"""Least parallel efficiency: where n times the devices are less than this share of n times as fast, they do not pay."""
MOST_CONSIDERED: Final = 256
"""Meshes that a choice is made among."""
UNKNOWN_ROWS: Final = 1 << 20
"""Rows of a store of which nothing is known: more change no mesh."""
_HEADER_BYTES: Final = 1500
"""Of a file of tensors, and of a small one of JSON."""

# ------------------------------------------------------------------------------------------------ disk


def checkpoint_bytes(shape: Shape) -> int:
    """Bytes of a checkpoint: weights and moments of all shards, float32, and the age of every feature."""
    trained = shape.d_sae * (shape.feature_width + shape.n_vectors) + shape.d_out * shape.mesh.features
    return 3 * FLOAT_BYTES * trained + 8 * shape.d_sae + _HEADER_BYTES * shape.mesh.features


def kept_checkpoints(spec: TrainSpec) -> tuple[int, int]:
    """Checkpoints of a dictionary that are kept while it is trained, and that there are while another is written."""
    n_made = -(-spec.n_steps // spec.checkpoint_every)
    return min(N_KEPT, n_made), min(N_KEPT + 1, n_made)


def dictionary_bytes(shape: Shape) -> int:
    """Bytes of a dictionary as it is exported: two matrices, tied ones too, with biases and thresholds, float32."""
    n_vectors = {"topk": 1, "relu": 1, "p_anneal": 1, "gated": 3}.get(shape.spec.activation.kind, 2)
    sparsity = shape.d_sae if shape.spec.evaluation is not None else 0
    weights = shape.d_sae * (shape.d_in + shape.d_out + n_vectors) + shape.d_out
    return FLOAT_BYTES * (weights + sparsity) + 6 * _HEADER_BYTES


# ------------------------------------------------------------------------------------------------ meshes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A train spec on its store, before its mesh is known."""

    spec: TrainSpec
    specs: tuple[TrainSpec, ...]
    """That of every variant."""
    d_in: int
    d_out: int
    d_sae: int
    is_transcoder: bool
    device: Device
    rows: Rows

    @classmethod
    def of(
        cls,
        spec: TrainSpec,
        d_in: int,
        *,
        d_out: int | None = None,
        device: Device = "cpu",
        rows: Rows | None = None,
    ) -> Self:
        """A spec for inputs of width d_in; d_out is that of a transcoder's target. Raises as resolve_d_sae."""
        return cls(
            spec=spec,
            specs=spec.variant_specs(),
            d_in=d_in,
            d_out=d_out or d_in,
            is_transcoder=d_out is not None,
            d_sae=spec.resolve_d_sae(d_in),
            device=device,
            rows=rows or Rows(n_rows=UNKNOWN_ROWS, n_hooks=len(spec.hook_names or ("",)) + (d_out is not None)),
        )

    def with_rows(self, rows: Rows) -> Self:
        """The same on rows that are known by now."""
        return replace(self, rows=rows)

    def shapes(self, mesh: Mesh) -> list[Shape]:
        """The shape of every variant on a mesh."""
        return [
            Shape(
                spec=spec,
                d_in=self.d_in,
                d_out=self.d_out,
                d_sae=self.d_sae,
                mesh=mesh,
                is_transcoder=self.is_transcoder,
            )
            for spec in self.specs
        ]

    def memory(self, mesh: Mesh) -> RankMemory:
        """The most memory of a rank."""
        return rank_memory(self.shapes(mesh), self.device, self.rows, self.spec.variant_names)

    def step_seconds(self, mesh: Mesh) -> float:
        """Seconds of a step of all variants, with the speeds of the documented machines."""
        return sum(step_seconds(shape, self.device) for shape in self.shapes(mesh))

    def meshes(self, n_devices: int) -> list[Mesh]:
        """Meshes of at most n_devices ranks that divide the batch and the dictionary, the smallest first.

        Where there are more than MOST_CONSIDERED, those of sizes evenly spread: requests wait for what is made of them.
        """
        found = [
            Mesh(dp=dp, features=features)
            for dp in range(1, min(n_devices, MOST_OF_AN_AXIS) + 1)
            if self.spec.batch_size % dp == 0
            for features in range(1, min(n_devices // dp, MOST_OF_AN_AXIS) + 1)
            if self.d_sae % features == 0
        ]
        sizes = sorted({n_ranks(mesh) for mesh in found})
        every = -(-len(found) // MOST_CONSIDERED)
        kept = {sizes[0], *sizes[::-every]}
        return sorted((mesh for mesh in found if n_ranks(mesh) in kept), key=lambda mesh: (n_ranks(mesh), mesh.dp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A mesh, and why this one."""

    mesh: Mesh
    why: str


def n_ranks(mesh: Mesh) -> int:
    """Devices that a mesh takes."""
    return mesh.dp * mesh.features


def named(mesh: Mesh) -> str:
    """A mesh as it is written: dp x features."""
    return f"{mesh.dp} x {mesh.features}"


def choose_mesh(
    spec: TrainSpec,
    d_in: int,
    n_devices: int,
    memory_bytes: float | None,
    *,
    d_out: int | None = None,
    device: Device = "cpu",
    rows: Rows | None = None,
) -> Mesh:
    """The mesh that a spec asks for, or of "auto" the one that pays on n_devices of memory_bytes each (None: unknown).

    Raises ValueError as resolve_d_sae, InvalidRequest, "does_not_fit", as `pay`.
    """
    if isinstance(spec.mesh, Mesh):
        return spec.mesh
    job = TrainJob.of(spec, d_in, d_out=d_out, device=device, rows=rows)
    return pay(job, n_devices, memory_bytes).mesh


def meshes_that_pay(job: TrainJob, n_devices: int, memory_bytes: float | None) -> Iterator[Mesh]:
    """The mesh that pays on n_devices, and then those on ever fewer, down to the smallest that has the memory.

    Raises InvalidRequest, "does_not_fit", as `pay`.
    """
    least = n_ranks(_with_memory(job, job.meshes(max(1, n_devices)), memory_bytes)[0])
    mesh = pay(job, n_devices, memory_bytes).mesh
    yield mesh
    while n_ranks(mesh) > least:
        mesh = pay(job, n_ranks(mesh) - 1, memory_bytes).mesh
        yield mesh


def smallest_that_holds(job: TrainJob, memory_bytes: float) -> Mesh:
    """The fewest shards that have the memory for their weights and moments, however many devices there are.

    Raises InvalidRequest, "does_not_fit", where no number of shards does.
    """
    most = min(job.d_sae, MOST_OF_AN_AXIS)
    meshes = [Mesh(features=n) for n in range(1, most + 1) if job.d_sae % n == 0]
    for mesh in meshes:
        if job.memory(mesh).state_bytes <= memory_bytes:
            return mesh
    check_fits(job, meshes[-1], memory_bytes)
    return meshes[-1]


def pay(job: TrainJob, n_devices: int, memory_bytes: float | None) -> Choice:
    """The fastest mesh that leaves no device idle for more than 1 - WORTH of its time.

    Counted from the smallest mesh that has the memory: with n times its devices, another must be WORTH n times as fast.
    Of equally fast ones that with fewer ranks, then with fewer shards. Raises InvalidRequest, "does_not_fit", where the
    weights and moments alone exceed the memory on every mesh.
    """
    meshes = _with_memory(job, job.meshes(max(1, n_devices)), memory_bytes)
    seconds = {mesh: job.step_seconds(mesh) for mesh in meshes}
    fewest = n_ranks(meshes[0])
    base = min((mesh for mesh in meshes if n_ranks(mesh) == fewest), key=seconds.__getitem__)
    efficiency = {mesh: seconds[base] * fewest / (seconds[mesh] * n_ranks(mesh)) for mesh in meshes}
    worth = [mesh for mesh in meshes if efficiency[mesh] >= WORTH]
    best = min(worth, key=lambda mesh: (seconds[mesh], n_ranks(mesh), mesh.features))
    return Choice(mesh=best, why=_why(best, base, seconds, n_devices, memory_bytes))


def _why(best: Mesh, base: Mesh, seconds: dict[Mesh, float], n_devices: int, memory_bytes: float | None) -> str:
    """A sentence about a choice."""
    needs = f"{named(base)} is the smallest with enough memory" if memory_bytes and n_ranks(base) > 1 else ""
    gain = seconds[base] / seconds[best]
    said = [needs, f"{named(best)} is {gain:.1f} times as fast as {named(base)}" if best != base else ""]
    larger = [mesh for mesh in seconds if n_ranks(mesh) > n_ranks(best)]
    if larger:
        other = min(larger, key=seconds.__getitem__)
        more, faster = n_ranks(other) / n_ranks(best), seconds[best] / seconds[other]
        said.append(
            f"{named(other)} would take {more:.1f} times the devices to be {faster:.1f} times as fast"
            if faster > 1
            else "on more ranks none is faster"
        )
    elif n_ranks(best) < n_devices:
        said.append(f"no mesh of more ranks divides the batch and the dictionary among {n_devices}")
    return "; ".join(filter(None, said)) or f"{named(best)} takes all there is"


def _with_memory(job: TrainJob, meshes: list[Mesh], memory_bytes: float | None) -> list[Mesh]:
    """Meshes whose ranks have the memory; where none is expected to, the one that needs the least."""
    if memory_bytes is None:
        return meshes
    needed = {mesh: job.memory(mesh) for mesh in meshes}
    fitting = [mesh for mesh in meshes if needed[mesh].n_bytes <= memory_bytes]
    if fitting:
        return fitting
    least = min(meshes, key=lambda mesh: needed[mesh].n_bytes)
    check_fits(job, least, memory_bytes)
    return [least]


def check_fits(job: TrainJob, mesh: Mesh, memory_bytes: float | None) -> None:
    """Raise InvalidRequest, "does_not_fit", where weights and moments alone exceed the memory of a rank.

    No batch is so small that they would fit. What a batch takes besides is an estimate, and refuses nothing.
    """
    if memory_bytes is None:
        return
    state = job.memory(mesh).state_bytes
    if state <= memory_bytes:
        return
    matrices = "W_enc, W_dec" if job.spec.alignment != "tied" else "W_dec"
    of = f" of {len(job.specs)} variants" if len(job.specs) > 1 else ""
    raise InvalidRequest(
        f"{matrices} and their moments{of} alone need {gib(state)} a rank on {named(mesh)}, and a rank has "
        f"{gib(memory_bytes)}; lower d_sae, or divide it over more devices",
        code="does_not_fit",
        term="state",
        needed_bytes=state,
        memory_bytes=int(memory_bytes),
    )


def gib(n_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 2**30:.3g} GiB"
