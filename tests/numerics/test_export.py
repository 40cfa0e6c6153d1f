"""The export is the trained dictionary: scaling folded, shards joined, alignment kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gnomon.dictionary import load_folder
from gnomon.specs import Alignment, BatchTopK, TopK
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint
from gnomon_workers.dictionaries.folder import publish, published
from gnomon_workers.dictionaries.saelens import transformer_lens_name
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.alignment import alignment_scores
from gnomon_workers.sae.sparse import decode
from gnomon_workers.train.saving import save_checkpoint
from tests.support.exported import SCALE, exported, scaled_plan, trained
from tests.support.ranks import RankPool
from tests.support.steps import data


@pytest.mark.parametrize("alignment", ["orth", "tied", "none"])
def test_export_reconstructs_raw_inputs_as_training_did(tmp_path: Path, alignment: Alignment) -> None:
    plan = scaled_plan(TopK(k=5), alignment)
    step = trained(plan, ProcessMesh.single())
    checkpoints = Location.open(f"file://{tmp_path}").child("checkpoints")
    checkpoint = save_checkpoint(checkpoints, step, number=30, attempt=1)
    dictionary = load_folder(exported(tmp_path / "out", plan, checkpoint, checkpoints))
    x = SCALE * data(16, seed=99)
    picks = step.select(x)
    wanted = (decode(picks, step.parameters.W_dec) + step.parameters.b_dec) * SCALE
    torch.testing.assert_close(dictionary(x), wanted, rtol=1e-4, atol=1e-4 * SCALE)
    acts = dictionary.encode(x)
    assert torch.equal(acts.nonzero()[:, 1], picks.features)
    scores = alignment_scores(dictionary.W_enc.t(), dictionary.W_dec)
    assert torch.equal(dictionary.W_dec, step.parameters.W_dec)
    if alignment != "none":
        assert (scores - 1).abs().max() <= 1e-5


def test_batchtopk_export_keeps_what_passes_the_folded_threshold(tmp_path: Path) -> None:
    plan = scaled_plan(BatchTopK(k=5, threshold_beta=0.8))
    step = trained(plan, ProcessMesh.single())
    checkpoints = Location.open(f"file://{tmp_path}").child("checkpoints")
    checkpoint = save_checkpoint(checkpoints, step, number=30, attempt=1)
    dictionary = load_folder(exported(tmp_path / "out", plan, checkpoint, checkpoints))
    x = SCALE * data(64, seed=99)
    hidden = (x / SCALE - step.parameters.b_dec) @ step.parameters.W_enc + step.parameters.b_enc
    wanted = torch.where(hidden > step.state["threshold"], hidden, 0.0) * SCALE
    torch.testing.assert_close(dictionary.encode(x), wanted, rtol=1e-4, atol=1e-3)
    l0 = (dictionary.encode(x) > 0).sum(1).float().mean()
    assert 3 <= l0 <= 7


def _sharded_on(mesh: ProcessMesh, root: Path) -> Checkpoint:
    step = trained(scaled_plan(TopK(k=5), features=mesh.features), mesh)
    return save_checkpoint(Location.open(f"file://{root}").child("sharded"), step, number=30, attempt=1)


def test_export_of_shards_equals_the_unsharded_one(ranks: RankPool, tmp_path: Path) -> None:
    root = Location.open(f"file://{tmp_path}")
    plan = scaled_plan(TopK(k=5))
    whole = save_checkpoint(root.child("whole"), trained(plan, ProcessMesh.single()), number=30, attempt=1)
    sharded = ranks.run(_sharded_on, 1, 4, tmp_path)[0]
    assert len(sharded.shards) == 4
    one = load_folder(exported(tmp_path / "one", plan, whole, root.child("whole")))
    four = load_folder(exported(tmp_path / "four", plan, sharded, root.child("sharded")))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_a_folder_is_published_once_its_manifest_is_there(tmp_path: Path) -> None:
    dictionary = Location.open(f"file://{tmp_path}").child("dictionaries", "dict_1")
    local = tmp_path / "local"
    local.mkdir()
    (local / "cfg.json").write_text("{}")
    dictionary.child("attempt-0001", "cfg.json").write_bytes(b"half an attempt")
    assert published(dictionary) is None
    record = publish(dictionary.child("attempt-0002"), local, {"d_in": 4})
    assert published(dictionary) == record
    assert record["files"] == {"cfg.json": 2} and record["location"].endswith("attempt-0002")


def test_hook_names_translate_to_transformer_lens() -> None:
    assert transformer_lens_name("model.layers.6") == "blocks.6.hook_resid_post"
    assert transformer_lens_name("transformer.h.11") == "blocks.11.hook_resid_post"
    assert transformer_lens_name("encoder.layer.2") == "encoder.layer.2"
    assert transformer_lens_name("model.layers.6.mlp") == "model.layers.6.mlp"
