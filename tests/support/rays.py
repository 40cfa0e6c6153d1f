"""A real local Ray for tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NAMESPACE = "gnomon-test"


@contextmanager
def local_ray(*, n_cpus: int) -> Iterator[None]:
    """A Ray of this process with n_cpus logical cores, gone afterwards."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations on import
        import ray

        ray.init(
            num_cpus=n_cpus,
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAMESPACE,
            object_store_memory=100 << 20,
        )
    try:
        yield
    finally:
        ray.shutdown()
