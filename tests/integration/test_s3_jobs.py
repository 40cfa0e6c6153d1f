"""Harvest, training, evaluation and export with every byte in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gnomon.dictionary import load_folder
from gnomon.specs import HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.attempts.cluster import RayCluster
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.harvest.text import check_text
from gnomon_workers.models.catalog import describe_model
from gnomon_workers.runtime.protocol import Assignment, ClusterUnreachable, Outcome
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.rays import NAMESPACE, local_ray
from tests.support.seaweed import environment, new_place, s3_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray whose workers reach an S3 server through their environment, as in production."""
    with (
        s3_server(tmp_path_factory.mktemp("weed")) as variables,
        environment(variables),
        local_ray(n_cpus=3),
    ):
        yield RayCluster(namespace=NAMESPACE)


def finish(cluster: RayCluster, task: Assignment) -> dict[str, Any]:
    """Run an attempt to success; returns its result."""
    cluster.start(task)

    def outcome() -> Outcome | None:
        try:
            poll = cluster.poll(task.job_id, task.attempt, 0)
        except ClusterUnreachable:  # no answer in time, on a busy machine
            return None
        assert poll is not None
        return poll.outcome

    ended = wait_until(outcome, f"the end of {task.job_id}", every_s=0.2)
    cluster.kill(task.job_id, task.attempt)
    assert ended.status == "succeeded", ended
    return dict(ended.result)


def harvest_spec(folder: Path) -> HarvestSpec:
    """A harvest of a small model and text, which lie in a local folder."""
    make_glassllm(folder / "model")
    make_corpus(folder / "corpus.jsonl", n_documents=300)
    return HarvestSpec.model_validate(
        {
            "model": {"source": str(folder / "model"), "dtype": "float32"},
            "text": [{"url": str(folder / "corpus.jsonl")}],
            "hooks": ["model.layers.1"],
            "context_length": 64,
            "token_budget": 8192,
            "segment_tokens": 2048,
        }
    )


def train_spec(store: str) -> dict[str, Any]:
    """A short training on two shards, with its evaluation."""
    return {
        "kind": "train",
        "activations": {"kind": "store", "id": store},
        "d_sae": 256,
        "activation": {"kind": "topk", "k": 8},
        "batch_size": 128,
        "token_budget": 128 * 100,
        "mesh": {"dp": 1, "features": 2},
        "optimizer": {"lr": 3e-3},
        "checkpoint_every": 30,
        "evaluation": {"n_tokens": 400, "n_ce_tokens": 256},
    }


def test_a_dictionary_is_made_in_an_object_store(cluster: RayCluster, tmp_path: Path) -> None:
    harvest, roots = harvest_spec(tmp_path), (str(tmp_path),)
    store = store_id(harvest, describe_model(harvest.model, roots).fingerprint(), check_text(harvest.text, roots))
    root = new_place()
    Location.open(root).child("ready").write_bytes(b"")  # makes the bucket, as an operator would
    common: dict[str, Any] = {"attempt": 1, "project": "p", "storage_root": root}
    common |= {"input_roots": roots, "store_id": store}
    spec = harvest.model_dump(mode="json")
    finish(cluster, Assignment(job_id="job_harvest", kind="harvest", spec=spec, **common))
    assert list(ActivationStore.open(Location.open(root).child("activations", store)).damages()) == []
    train = Assignment(job_id="job_train", kind="train", spec=train_spec(store), dictionary_id="dict_s3", **common)
    record = finish(cluster, train)["records"][0]
    assert record["location"] == f"{root}/dictionaries/dict_s3/attempt-0001"
    assert 0 < record["metrics"]["fvu"] < 1 and record["metrics"]["ce_loss_score"] > 0
    folder = Location.open(record["location"])
    assert {name: folder.child(name).size() for name in record["files"]} == record["files"]
    folder.download(tmp_path / "dictionary")
    assert load_folder(tmp_path / "dictionary").cfg.k == 8
    # by files, for this server goes on naming folders that were emptied
    left = {name.split("/")[0] for name in Location.open(root).child("checkpoints", "job_train").walk()}
    assert left == {"step-00000090.a0001", "step-00000100.a0001"}
