"""A train spec that cannot be meant is refused, and says why."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gnomon.specs import BatchTopK, TopK, TrainSpec

BASE: dict[str, Any] = {
    "activations": {"kind": "store", "id": "act_" + "0" * 32},
    "d_sae": 256,
    "token_budget": 10**6,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation": {"kind": "matryoshka", "group_fractions": [0.5, 0.4]}}, "sum to 0.9; they must sum to 1"),
        ({"activation": {"kind": "matryoshka", "group_fractions": [1e-7, 1 - 1e-7]}}, "d_sae=256 features empty"),
        ({"activation": {"kind": "matryoshka", "k": 257}}, "k=257 exceeds d_sae=256"),
        ({"activation": {"kind": "jumprelu", "bandwidth": 0}}, "greater than 0"),
        ({"activation": {"kind": "gated", "k": 3}}, "Extra inputs"),
        ({"hook_names": ["a", "b"], "hook_name": "a"}, "excludes hook_name"),
        ({"hook_names": ["a", "b"], "target_hook_name": "c"}, "excludes hook_name and target_hook_name"),
        ({"hook_names": ["a", "b", "a"]}, "same hook twice"),
        ({"hook_names": ["a"]}, "at least 2 items"),
        ({"d_sae": True}, "d_sae is true"),
        ({"optimizer": {"lr": True}}, "lr is true"),
        ({"activation": {"kind": "topk", "aux": {"k": True}}}, "k is true"),
        ({"hook_name": "a", "target_hook_name": "b"}, "set alignment='none'"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        TrainSpec.model_validate(BASE | change)


@pytest.mark.parametrize(
    ("kind", "lr", "beta1"), [("jumprelu", 7e-5, 0.0), ("gated", 5e-5, 0.9), ("topk", 2e-4, 0.0), ("relu", 2e-4, 0.9)]
)
def test_variants_bring_their_own_optimizer_defaults_and_yield_to_given_ones(
    kind: str, lr: float, beta1: float
) -> None:
    long_run = {"token_budget": 4096 * 10**6}
    spec = TrainSpec.model_validate(BASE | long_run | {"activation": {"kind": kind}})
    assert spec.resolve_lr(2**14) == pytest.approx(lr) and spec.beta1 == beta1
    given = TrainSpec.model_validate(BASE | {"activation": {"kind": kind}, "optimizer": {"lr": 1e-3, "beta1": 0.5}})
    assert (given.resolve_lr(2**14), given.beta1) == (1e-3, 0.5)
    # as it travels: defaults written out must not look like choices
    assert TrainSpec.model_validate(spec.model_dump(mode="json")).beta1 == beta1


def test_group_bounds_cover_every_feature_once() -> None:
    spec = TrainSpec.model_validate(BASE | {"activation": {"kind": "matryoshka"}})
    assert spec.activation.kind == "matryoshka"
    assert spec.activation.group_bounds(96) == (3, 9, 21, 45, 96)
    assert all(spec.activation.group_bounds(d_sae)[-1] == d_sae for d_sae in range(32, 3000, 7))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"variants": []}, "at least 1 item"),
        ({"variants": [{"name": f"v{i}"} for i in range(65)]}, "at most 64 items"),
        ({"variants": [{"name": "A"}]}, "should match pattern"),
        ({"variants": [{"name": "../a"}]}, "should match pattern"),
        ({"variants": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}, "same name twice"),
        ({"variants": [{"name": "a", "d_sae": 3}]}, "Extra inputs"),
        ({"variants": [{"name": "a"}, {"name": "b", "k": 257}]}, "variant 'b': k=257 exceeds d_sae=256"),
        ({"variants": [{"name": "a", "activation": {"kind": "relu"}, "k": 3}]}, "variant 'a': k=3 .* 'relu' has no k"),
        ({"variants": [{"name": "a", "k": 3}], "activation": {"kind": "gated"}}, "'gated' has no k"),
        (
            {"variants": [{"name": "a", "activation": {"kind": "relu"}}], "encoder_dtype": "bfloat16"},
            "variant 'a': enc",
        ),
    ],
)
def test_variants_that_cannot_be_trained_are_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        TrainSpec.model_validate(BASE | change)


def test_a_variant_keeps_the_code_of_what_is_wrong_with_it() -> None:
    transcoder = {"hook_name": "a", "target_hook_name": "b", "alignment": "none"}
    with pytest.raises(ValidationError, match=r"variant 'x'.*set alignment='none'") as raised:
        TrainSpec.model_validate(BASE | transcoder | {"variants": [{"name": "x", "alignment": "orth"}]})
    assert [error["type"] for error in raised.value.errors()] == ["transcoder_alignment"]


def test_each_variant_is_a_spec_of_its_own_on_the_same_data() -> None:
    changes: list[dict[str, Any]] = [
        {"name": "same"},
        {"name": "k", "k": 8},
        {"name": "batch", "activation": {"kind": "batchtopk", "k": 4}, "k": 5},
        {"name": "rate", "lr": 1e-3, "alignment": "none"},
        {"name": "seed", "seed": 7},
    ]
    spec = TrainSpec.model_validate(BASE | {"seed": 3, "optimizer": {"beta1": 0.5}, "variants": changes})
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert spec.variant_names == ("same", "k", "batch", "rate", "seed")
    alone = TrainSpec.model_validate(BASE | {"seed": 3, "optimizer": {"beta1": 0.5}})
    same, k, batch, rate, seed = spec.variant_specs()
    assert same == alone and alone.variant_specs() == (alone,) and alone.variant_names == ("",)
    assert k == alone.model_copy(update={"activation": TopK(k=8)})
    assert batch.activation == BatchTopK(k=5)
    assert (rate.optimizer.lr, rate.optimizer.beta1, rate.alignment) == (1e-3, 0.5, "none")
    assert seed == alone.model_copy(update={"seed": 7, "data_seed": 3})


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({}, 250_000),
        ({"token_budget": 10**9}, 10**7),
        ({"dead_after_tokens": 7}, 7),
        ({"token_budget": 4096, "batch_size": 4096}, 1024),
    ],
)
def test_dead_window_scales_with_the_run(fields: dict[str, Any], window: int) -> None:
    assert TrainSpec.model_validate(BASE | fields).dead_window == window


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schedule": {"warmup_steps": 244}}, r"schedule\.warmup_steps=244 is not reached by a run of 244 steps"),
        ({"activation": {"kind": "relu", "warmup_steps": 10**7}}, r"activation\.warmup_steps=10000000 is not reached"),
        ({"activation": {"kind": "p_anneal", "start_step": 300}}, r"activation\.start_step=300 is not reached"),
        ({"dead_after_tokens": 10**6 + 1}, "no feature could ever count as dead"),
        ({"profile_steps": 1, "token_budget": 40_960}, "profile_steps=1 traces nothing: .* the run has 10"),
        ({"activation": {"kind": "p_anneal", "n_updates": 245}}, r"activation\.n_updates=245 exceeds the 244 steps"),
    ],
)
def test_settings_behind_the_end_of_the_run_are_named(change: dict[str, Any], word: str) -> None:
    spec = TrainSpec.model_validate(BASE | change)  # a job of an earlier release may hold it
    with pytest.raises(ValueError, match=word):
        spec.check_reach()


@pytest.mark.parametrize(("d_in", "factor"), [(128, 1e-9), (128, 1 / 128), (128, 0.011), (8192, 4096), (2**23, 2.01)])
def test_expansion_factor_keeps_within_the_bounds_of_d_sae(d_in: int, factor: float) -> None:
    fields = {name: value for name, value in BASE.items() if name != "d_sae"}
    spec = TrainSpec.model_validate(fields | {"expansion_factor": factor, "activation": {"kind": "relu"}})
    with pytest.raises(ValueError, match=r"expansion_factor=.* d_sae=\d+, wanted 2 to 16777216"):
        spec.resolve_d_sae(d_in)
    assert (
        TrainSpec.model_validate(fields | {"expansion_factor": 2, "activation": {"kind": "relu"}}).resolve_d_sae(1) == 2
    )


def test_aims_beyond_all_features_are_named() -> None:
    spec = TrainSpec.model_validate(BASE | {"activation": {"kind": "jumprelu", "target_l0": 2**23}})
    with pytest.raises(ValueError, match=r"activation\.target_l0=8\.38861e\+06 exceeds d_sae=64"):
        spec.check_reach(64)
    spec.check_reach(None)


def test_usual_settings_are_within_reach() -> None:
    TrainSpec.model_validate(BASE).check_reach()
    TrainSpec.model_validate(BASE | {"activation": {"kind": "p_anneal"}, "token_budget": 4096}).check_reach()
