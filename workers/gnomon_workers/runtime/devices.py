"""Where work runs: what the cluster has, what a member of a gang is given, and what that member then computes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import ray
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What a cluster has in total: work runs on whole GPUs, or on cores where there is no GPU."""

    n_cpus: float
    n_gpus: float

    @classmethod
    def of_cluster(cls) -> Self:
        """Those of the cluster that this process is connected to."""
        resources = ray.cluster_resources()
        return cls(n_cpus=float(resources.get("CPU", 0)), n_gpus=float(resources.get("GPU", 0)))

    @property
    def use_gpu(self) -> bool:
        """Whether members of gangs get a GPU each."""
        return self.n_gpus > 0

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """What members of gangs compute on."""
        return "gpu" if self.use_gpu else "cpu"

    @property
    def n_members(self) -> int:
        """Members of gangs that there is room for on an idle cluster; at least 1."""
        return max(1, int(self.n_gpus if self.use_gpu else self.n_cpus))

    @property
    def of_member(self) -> dict[str, float]:
        """What one member is given, as a bundle of a placement group."""
        return {"CPU": 1.0, **({"GPU": 1.0} if self.use_gpu else {})}

    @property
    def options(self) -> dict[str, Any]:
        """The same as the options of an actor that Ray starts within such a bundle."""
        return {"num_cpus": 1, "num_gpus": 1 if self.use_gpu else 0}

    def __str__(self) -> str:
        return f"{self.n_cpus:g} cores and {self.n_gpus:g} GPUs"


def free_devices() -> Devices:
    """What of the cluster is in use by nobody now."""
    resources = ray.available_resources()
    return Devices(n_cpus=float(resources.get("CPU", 0)), n_gpus=float(resources.get("GPU", 0)))


def own_device() -> torch.device:
    """What this process computes on: the GPU that it was given, else its one core.

    On a core torch gets one thread: members share a machine, and threads beyond its cores would wait for each other.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    torch.set_num_threads(1)
    return torch.device("cpu")
