"""What the GPU check works on: sizes, made-up activations, and a step whose weights are drawn on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
for folder in ("api", "storage", "workers"):  # from a bare checkout: nothing needs to be installed
    if (path := str(ROOT / folder)) not in sys.path:
        sys.path.insert(0, path)

from gnomon.specs import Mesh, StoredActivations, TrainSpec  # noqa: E402
from gnomon_workers.parallel.mesh import ProcessMesh  # noqa: E402
from gnomon_workers.sae.parameters import Parameters  # noqa: E402
from gnomon_workers.sae.plan import make_plan  # noqa: E402
from gnomon_workers.sae.variants import make_variant  # noqa: E402
from gnomon_workers.train.step import TrainStep  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One row of the table."""

    d: int
    n: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"d {self.d:,} n {self.n:,} k {self.k} batch {self.batch:,}"

    @property
    def params(self) -> int:
        """Numbers in both matrices."""
        return 2 * self.d * self.n


TABLE = (
    Sizes(d=4096, n=131_072, k=64, batch=8192),
    Sizes(d=4096, n=65_536, k=64, batch=1024),  # the configuration that flash-sae publishes
    Sizes(d=2304, n=65_536, k=64, batch=8192),
    Sizes(d=1024, n=131_072, k=64, batch=16_384),
)
COMPILED = TABLE[2]
"""The one that PyTorch compiles: a minute each."""
TOY_TABLE = (Sizes(d=16, n=128, k=2, batch=8),)


def made_up_activations(sizes: Sizes, n_tokens: int, device: torch.device, seed: int = 0) -> Tensor:
    """(n_tokens, d): some strong directions, and sparse features of unequal frequency; E|x|^2 = d."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    strength = (1 + torch.arange(64, device=device)) ** -0.7
    x = 1.5 * (draw(n_tokens, 64) * strength) @ draw(64, sizes.d) * (64 / sizes.d) ** 0.5
    features = torch.nn.functional.normalize(draw(8192, sizes.d))
    frequency = (10.0 + torch.arange(8192, device=device)) ** -0.8
    for _ in range(24):
        which = torch.multinomial(frequency, n_tokens, replacement=True, generator=generator)
        x += features[which] * draw(n_tokens, 1).square()
    return x * (sizes.d / x.square().sum(1).mean()) ** 0.5


def batches(sizes: Sizes, device: torch.device, n_batches: int = 4) -> Iterator[Tensor]:
    """Batches without end; the first follow again after n_batches."""
    parts = made_up_activations(sizes, n_batches * sizes.batch, device).split(sizes.batch)
    while True:
        yield from parts


def make_step(sizes: Sizes, device: torch.device, mesh: ProcessMesh | None = None, **fields: Any) -> TrainStep:
    """A fresh step; its weights are unit rows drawn on the device, which takes no time whatever their number."""
    spec = TrainSpec(
        activations=StoredActivations(id="act_" + "0" * 32),
        d_sae=sizes.n,
        batch_size=sizes.batch,
        mesh=Mesh(),
        **{"token_budget": sizes.batch * 1000, **fields},
    )
    plan = make_plan(spec, d_in=sizes.d, mesh=Mesh(), mean_squared_norm=float(sizes.d))
    generator = torch.Generator(device).manual_seed(spec.seed)
    W_dec = torch.nn.functional.normalize(torch.randn(sizes.n, sizes.d, generator=generator, device=device))
    vectors = make_variant(plan.spec.activation, plan.setting).initial_vectors()
    parameters = Parameters(
        W_enc_rows=W_dec if plan.spec.alignment == "tied" else W_dec.clone(),
        W_dec=W_dec,
        b_enc=torch.zeros(sizes.n, device=device),
        b_dec=torch.linspace(-0.01, 0.01, sizes.d, device=device),
        start=0,
        vectors={name: torch.full((sizes.n,), value, device=device) for name, value in vectors.items()},
    )
    return TrainStep(plan, parameters, mesh or ProcessMesh.single())


Status = Literal["equal", "unequal", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one comparison found."""

    name: str
    status: Status
    error: float | None = None
    """Largest relative difference seen."""
    limit: float | None = None
    note: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f" {self.error:.1e} (at most {self.limit:.0e})"
        return f"{self.status:8} {self.name}{error} {self.note}".rstrip()
