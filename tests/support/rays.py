"""A real local Ray for tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

NAMESPACE = "gnomon-test"


@contextmanager
def local_ray(*, n_cpus: int, **options: Any) -> Iterator[None]:
    """A Ray of this process with n_cpus logical cores and other options of its own, gone afterwards."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations on import
        import ray

        ray.init(
            address="local",  # never one that happens to run on this machine
            num_cpus=n_cpus,
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAMESPACE,
            object_store_memory=100 << 20,
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()


class TwoMachines:
    """A Ray whose second node comes and goes."""

    def __init__(self, cluster: Any, n_cpus: int) -> None:
        """n_cpus: cores of the second."""
        self._cluster = cluster
        self._n_cpus = n_cpus
        self.add_second()

    @property
    def address(self) -> str:
        """Where drivers connect."""
        return str(self._cluster.address)

    def add_second(self) -> None:
        """Let it come."""
        self._second = self._cluster.add_node(num_cpus=self._n_cpus, object_store_memory=100 << 20)

    def lose_second(self) -> None:
        """Let it go at once, with all that runs there."""
        self._cluster.remove_node(self._second, allow_graceful=False)


@contextmanager
def two_machines(*, n_cpus: int = 1, n_cpus_of_second: int | None = None) -> Iterator[TwoMachines]:
    """Two nodes on this machine, of n_cpus cores each unless the second has others; gone afterwards."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations on import
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": n_cpus, "object_store_memory": 100 << 20, "include_dashboard": False}
        # it would make itself the Ray of this machine, which other tests, or another's service, would then connect to
        with patch("ray._private.utils.write_ray_address"):
            cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, namespace=NAMESPACE)
    try:
        yield TwoMachines(cluster, n_cpus_of_second or n_cpus)
    finally:
        ray.shutdown()
        with patch("ray._common.utils.reset_ray_address"):
            cluster.shutdown()
