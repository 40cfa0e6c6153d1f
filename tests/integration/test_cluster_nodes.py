"""What a real Ray says of its nodes."""

from __future__ import annotations

from gnomon_workers.attempts.cluster import RayCluster
from gnomon_workers.attempts.gpu_memory import LABEL
from tests.support.rays import NAMESPACE, local_ray


def test_a_node_tells_its_cores_its_gpus_and_their_memory() -> None:
    with local_ray(n_cpus=2, num_gpus=3, labels={LABEL: "85520809984"}):
        (node,) = RayCluster(namespace=NAMESPACE).snapshot().nodes
    assert (node.n_cpus, node.n_gpus, node.gpu_memory_bytes) == (2, 3, 85_520_809_984)
