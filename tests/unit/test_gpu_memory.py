"""The memory of GPUs, from Ray's list of nodes and from the driver's tool; and what plans make of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gnomon.errors import InvalidRequest
from gnomon.resources import ClusterState
from gnomon.specs import Mesh, TrainSpec
from gnomon_service.local.gpus import least_gpu_memory_bytes
from gnomon_service.local.ray_head import LocalRay
from gnomon_service.planning.costs import Room, choose
from gnomon_service.settings import Settings
from gnomon_workers.attempts.gpu_memory import LABEL, gpu_memory_bytes
from gnomon_workers.sae.costs import TrainJob
from tests.support.service_jobs import stored

GIB = 2**30


def ray_node(label: str | None = None, *types: str, n_gpus: float = 1.0) -> dict[str, Any]:
    """A node as Ray lists it."""
    resources = {
        "CPU": 8.0,
        **({"GPU": n_gpus} if n_gpus else {}),
        **{f"accelerator_type:{each}": 1.0 for each in types},
    }
    return {"Resources": resources, "Labels": {} if label is None else {LABEL: label}}


@pytest.mark.parametrize(
    ("node", "n_bytes"),
    [
        (ray_node(str(80 * GIB), "H100"), 80 * GIB),
        (ray_node(str(10 * GIB), "L4"), 10 * GIB),
        (ray_node(None, "L4"), 22 * GIB),
        (ray_node(None, "H200"), 139 * GIB),
        (ray_node(None, "H100"), None),
        (ray_node(None, "A100"), None),
        (ray_node(None, "L4", "A100"), None),
        (ray_node(None, "L4", "T4"), 14 * GIB),
        (ray_node(), None),
        (ray_node("80 GiB", "H100"), None),
        (ray_node("0"), None),
        (ray_node("9" * 30), None),
        (ray_node(str(80 * GIB), "L4", n_gpus=0), None),
        ({"Resources": {"GPU": 1.0, "accelerator_type:T4": 1.0}}, 14 * GIB),
    ],
)
def test_a_node_says_by_label_or_type_what_its_gpus_have(node: dict[str, Any], n_bytes: int | None) -> None:
    assert gpu_memory_bytes(node) == n_bytes


def offer(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in the place of the driver's tool."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "n_bytes"),
    [
        ("echo 81559; echo 40960", 40_960 * 2**20),
        ("echo '[N/A]'", None),
        ("exit 9", None),
        ("true", None),
    ],
)
def test_a_local_ray_is_told_what_the_tool_says(
    script: str, n_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, script, monkeypatch)
    assert least_gpu_memory_bytes() == n_bytes
    argv = LocalRay(folder=tmp_path).argv(Settings(home=tmp_path / "home"))
    assert [each for each in argv if each.startswith("--labels")] == (
        [] if n_bytes is None else [f"--labels={LABEL}={n_bytes}"]
    )


def test_without_the_tool_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert least_gpu_memory_bytes() is None


def room_of(*gib: int | None, n_gpus: int = 4) -> Room:
    """A cluster of nodes with GPUs of so much memory, and one without."""
    nodes = [
        {"id": str(number), "name": "n", "n_cpus": 8, "n_gpus": n_gpus, "gpu_memory_bytes": each and each * GIB}
        for number, each in enumerate(gib)
    ]
    nodes.append({"id": "cores", "name": "n", "n_cpus": 8, "n_gpus": 0, "gpu_memory_bytes": None})
    state = {"seen_at": "2026-01-01T00:00:00Z", "n_cpus": 8, "n_gpus": n_gpus * len(gib), "nodes": nodes}
    room = Room.of(ClusterState.read(state))
    assert room is not None
    return room


def test_a_place_has_what_the_largest_gpu_has_where_all_are_known() -> None:
    assert room_of(80).memory_bytes_per_place == 80 * GIB
    assert room_of(24, 80).memory_bytes_per_place == 80 * GIB
    assert room_of(24, None).memory_bytes_per_place is None
    assert room_of(None).memory_bytes_per_place is None


def test_what_fits_no_gpu_is_refused_and_auto_takes_a_mesh_that_fits() -> None:
    fields: dict[str, Any] = {"activations": stored(), "d_sae": 2**20, "batch_size": 4096, "token_budget": 10**9}
    auto = TrainJob.of(TrainSpec(**fields), 4096, device="gpu")
    one = TrainJob.of(TrainSpec(**fields, mesh=Mesh()), 4096, device="gpu")
    assert 80 * GIB < one.memory(Mesh()).state_bytes < 4 * 80 * GIB
    with pytest.raises(InvalidRequest, match="W_enc, W_dec and their moments alone need") as caught:
        choose(one, room_of(80))
    assert (caught.value.code, caught.value.detail["term"]) == ("does_not_fit", "state")
    assert choose(one, room_of(None)).mesh == Mesh(), "what is not known refuses nothing"
    chosen = choose(auto, room_of(80)).mesh
    assert chosen.features > 1 and auto.memory(chosen).n_bytes <= 80 * GIB
    with pytest.raises(InvalidRequest, match="alone need"):
        choose(auto, room_of(16))
