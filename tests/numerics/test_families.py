"""Every family of models that Transformers can build tiny: what is offered works, and what works is what is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_workers.evaluate.patching import Hooks, patch_sums
from gnomon_workers.models.loading import LoadedModel, load_model, read_activations
from gnomon_workers.models.modules import Skeleton, is_causal, refuse_faults
from gnomon_workers.models.skeleton import NotHarvestable, describe
from gnomon_workers.models.weight_files import read_config, read_tensors
from tests.support.families import families, make_model, tiny_config

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
outcomes: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    """Prints how many families there are of each kind, and holds that it is most of them."""
    outcomes.clear()
    yield
    print("\nfamilies:", dict(outcomes))
    n_seen = sum(n for outcome, n in outcomes.items() if outcome != "hooks")
    if n_seen == len(families()):
        assert outcomes["causal"] >= 130
        assert outcomes["read alone"] >= 70


@pytest.fixture
def skeleton(family: str, tmp_path: Path) -> Skeleton:
    """What is offered of a tiny model of the family, which is saved in tmp_path."""
    architecture = families()[family]
    causal = is_causal({"architectures": [architecture]})
    try:
        make_model(tmp_path, tiny_config(family, architecture), causal=causal)
    except Exception as error:
        outcomes["not built tiny"] += 1
        pytest.skip(f"no tiny model: {type(error).__name__}: {str(error)[:150]}")
    config = read_config(tmp_path)
    config["architectures"] = [architecture]  # of a base class, save_pretrained writes that class's own name
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = read_tensors(tmp_path)
    try:
        found = describe(config, tensors.shapes, tensors.odd_dtypes)
    except NotHarvestable as error:
        outcomes["refused"] += 1
        pytest.skip(f"refused: {error}")
    return found


@pytest.mark.parametrize("family", families())
def test_family_is_read_as_it_is(family: str, skeleton: Skeleton, tmp_path: Path) -> None:
    refuse_faults(family, skeleton.faults)  # nothing is wrong with a model as it was saved
    model = load_model(ModelSource(source=str(tmp_path), dtype="float32"), [str(tmp_path)], device=CPU)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if any("trial run" in why for why in skeleton.not_hooks.values()) and (why := failure_of(model, ids)):
        outcomes["does not run at these sizes"] += 1
        pytest.skip(f"the tiny model does not run: {why}")
    seen = read_activations(model.module, list(skeleton.hooks), ids, mask)
    assert {name: tuple(acts.shape) for name, acts in seen.items()} == {
        name: (2, 9, width) for name, width in skeleton.hooks.items()
    }
    alone = read_activations(model.module, list(skeleton.hooks), ids[:1], mask[:1])
    assert all(torch.allclose(alone[name], acts[:1], atol=1e-4) for name, acts in seen.items())
    assert model.is_causal == skeleton.has_head
    if model.is_causal:
        _check_predictions(model, skeleton, ids)
    outcomes["causal" if model.is_causal else "read alone"] += 1
    outcomes["hooks"] += len(skeleton.hooks)


def failure_of(model: LoadedModel, ids: torch.Tensor) -> str | None:
    """What ends a pass of the model itself, or of its encoder."""
    whole: Any = model.module
    module = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    try:
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return None


def _check_predictions(model: LoadedModel, skeleton: Skeleton, ids: torch.Tensor) -> None:
    """In place of a layer's output the same output gives the cross-entropy that the model gives."""
    layers = [name for name in skeleton.hooks if name.rsplit(".", 1)[-1].isdigit()]
    logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    hooks = layers or list(skeleton.hooks)
    for hook in {hooks[len(hooks) // 2], hooks[-1], next(iter(skeleton.hooks))}:
        sums = patch_sums(model.module, Hooks.one(hook), ids, ids >= 0, lambda x: x)
        assert sums.ce_original == pytest.approx(float(wanted), rel=1e-4)
        assert sums.ce_patched == pytest.approx(sums.ce_original, rel=1e-6)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(NotHarvestable, match="tinything"):
        describe({"model_type": "tinything", "architectures": ["TinyThingForCausalLM"]}, {})


def test_faults_of_a_checkpoint_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"tensor a is missing") as caught:
        refuse_faults("x", ("tensor a is missing",))
    assert caught.value.code == "incomplete_model"
