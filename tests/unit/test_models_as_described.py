"""What is loaded of a folder is what was described and fingerprinted, whatever else lies there and whatever it says."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gnomon.errors import InvalidRequest, Unavailable
from gnomon.specs import ModelSource
from gnomon_storage.digests import combine, spelled_out
from gnomon_workers.harvest.tokens import encode_joined, load_tokenizer
from gnomon_workers.models import modules, skeleton
from gnomon_workers.models.building import faults_of
from gnomon_workers.models.catalog import ModelDescription, describe_model
from gnomon_workers.models.loading import load_model
from gnomon_workers.models.modules import find_skeleton
from gnomon_workers.models.tokenizers import TOKENIZER_FILES, without_sampling
from gnomon_workers.models.weight_files import INDEX, SINGLE, Tensors, read_config, read_tensors
from tests.support.models import ALICE, make_glassllm

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _described_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are built in this process, which has PyTorch already: a process for each takes many seconds."""
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(modules, "_build", lambda question: json.loads(json.dumps(skeleton._answer(question))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """glassllm in Hugging Face layout."""
    return make_glassllm(tmp_path / "model")


def describe(folder: Path) -> ModelDescription:
    return describe_model(ModelSource(source=str(folder), dtype="float32"), [str(folder.parent)])


def load(folder: Path) -> Weights:
    """Every tensor of the model as it was loaded."""
    source = ModelSource(source=str(folder), dtype="float32")
    return dict(load_model(source, [str(folder.parent)], device=CPU).module.state_dict())


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(dict(weights), path, metadata={"format": "pt"})


def negated(weights: Mapping[str, Tensor]) -> Weights:
    return {name: -tensor for name, tensor in weights.items()}


def set_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def divide(folder: Path, **elsewhere: str) -> None:
    """Weights in two shards; `elsewhere` is what the index says besides or instead."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    halves = {SHARDS[0]: names[:20], SHARDS[1]: names[20:]}
    for file, held in halves.items():
        write(folder / file, {name: weights[name] for name in held})
    places = {name: file for file, held in halves.items() for name in held} | elsewhere
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def beside(folder: Path, name: str) -> None:
    write(folder / name, negated(load_file(folder / SINGLE)))


def other_tokenizer(folder: Path, name: str = "tokenizer.4.0.0.json") -> None:
    """Another tokenizer.json, which the tokenizer's settings name."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / name).write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fast_tokenizer_files": [name]}))


BESIDE: dict[str, Callable[[Path], object]] = {
    "plain": lambda folder: None,
    "shards": divide,
    "another precision": lambda folder: beside(folder, "model.fp16.safetensors"),
    "the original": lambda folder: beside(folder, "consolidated.safetensors"),
    "an adapter without its config": lambda folder: beside(folder, "adapter_model.safetensors"),
    "a folder of another": lambda folder: (folder / "original").mkdir(),
    "a versioned tokenizer": other_tokenizer,
    "generation settings": lambda folder: (
        (folder / "generation_config.json").write_text('{"use_cache": false}') and None
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_described_files_alone_make_the_model(case: str, folder: Path, tmp_path: Path) -> None:
    """A copy of them, without what lies beside, is the same model with the same tokens."""
    BESIDE[case](folder)
    found = describe(folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (*found.files, folder / INDEX):
        if path.is_file():
            shutil.copy(path, alone)
    assert describe(alone).fingerprint() == found.fingerprint()
    loaded, wanted = load(folder), load(alone)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    ids = [list(encode_joined([ALICE], load_tokenizer(place))) for place in (folder, alone)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("case", ["plain", "shards"])
def test_weights_are_read_from_the_described_files_and_from_no_other(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BESIDE[case](folder)
    opened: list[Path] = []
    real: Any = safe_open

    def recorded(path: Path, **options: Any) -> Any:
        opened.append(path)
        return real(path, **options)

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("Transformers looked for files by itself")

    monkeypatch.setattr("gnomon_workers.models.loading.safe_open", recorded)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", never)
    load(folder)
    assert sorted(opened) == sorted(path for path in describe(folder).files if path.suffix == ".safetensors")


def both(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    divide(folder)
    write(folder / SINGLE, negated(weights))


def twice(folder: Path) -> None:
    divide(folder)
    second = load_file(folder / SHARDS[1])
    write(folder / SHARDS[1], {**second, "model.embed_tokens.weight": torch.ones(1024, 128)})


def with_adapter(folder: Path) -> None:
    beside(folder, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def with_lora(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    write(folder / SINGLE, {**weights, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(8, 128)})


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "one file and an index of others": (both, "ambiguous_weights", "remove one of them"),
    "one tensor twice": (twice, "ambiguous_weights", "model.embed_tokens.weight is in model-00001-of-00002"),
    "index of another file": (
        lambda folder: divide(folder, **{"model.embed_tokens.weight": SHARDS[1]}), "ambiguous_weights", "says that",
    ),
    "index of an absent tensor": (lambda folder: divide(folder, absent=SHARDS[1]), "ambiguous_weights", "in None"),
    "weights by another name": (
        lambda folder: set_config(folder, transformers_weights="other.safetensors"), "unsupported_model",
        "transformers_weights to 'other.safetensors'",
    ),
    "a part's weights by another name": (
        lambda folder: set_config(folder, text_config={"transformers_weights": "x.safetensors"}), "unsupported_model",
        "text_config.transformers_weights",
    ),
    "a versioned config": (
        lambda folder: set_config(folder, configuration_files=["config.4.0.0.json"]), "unsupported_model",
        "configuration_files",
    ),
    "an adapter beside": (with_adapter, "unmerged_adapter", "merge_and_unload"),
    "an adapter inside": (with_lora, "incomplete_model", "merge the adapter first"),
    "a billion layers": (
        lambda folder: set_config(folder, num_hidden_layers=10**9), "unsupported_model", "num_hidden_layers to 1e+09",
    ),
    "endless layers of a part": (
        lambda folder: set_config(folder, vision_config={"num_layers": float("inf")}), "unsupported_model",
        "vision_config.num_layers to inf",
    ),
    "a nest": (
        lambda folder: set_config(folder, x=json.loads("[" * 99 + "]" * 99)), "unsupported_model", "nested more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_folders_of_which_several_models_could_be_read_are_refused(case: str, folder: Path) -> None:
    change, code, says = REFUSED[case]
    change(folder)
    with pytest.raises(InvalidRequest) as caught:
        describe(folder)
    assert caught.value.code == code
    assert says in caught.value.message


def test_every_file_of_which_transformers_makes_tokenizers_is_fingerprinted() -> None:
    """But for those that only say how a conversation is written."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    files: set[str] = set()
    for name in sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if isinstance(name, str)}):
        with suppress(ImportError):  # it needs a library of its own
            files |= set((getattr(getattr(transformers, name, None), "vocab_files_names", None) or {}).values())
    assert {"tokenizer.json", "vocab.txt", "spiece.model"} <= files
    assert files <= set(TOKENIZER_FILES)


# ---------------------------------------------------------------------------------------------- dtypes

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_floating_point_numbers_are_named(dtype: str, folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    write(folder / SINGLE, {**weights, UP: weights[UP].mul(50).to(DTYPES[dtype])})
    for read in (describe, load):
        with pytest.raises(InvalidRequest, match=rf"tensor {UP} holds {dtype}, ") as caught:
            read(folder)
        assert caught.value.code == "incomplete_model"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_numbers_of_any_width_are_read(dtype: torch.dtype, folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    write(folder / SINGLE, {name: tensor.to(dtype) for name, tensor in weights.items()})
    describe(folder)
    assert torch.equal(load(folder)[UP], weights[UP].to(dtype).float())


def test_integers_that_the_class_declares_and_residue_are_legal() -> None:
    model: Any = nn.Module()
    model.register_buffer("table", torch.zeros(3, dtype=torch.long))
    model.register_buffer("scale", torch.zeros(3))
    info = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": ["position_ids", "other"], "error_msgs": []}
    odd = {"table": "I64", "position_ids": "I64", "attn.bias": "BOOL", "other": "I8", "scale": "I8"}
    (fault,) = faults_of(model, info, odd)
    assert fault.startswith("tensor scale holds I8")


# ---------------------------------------------------------------------------------------------- configs

NOT_FINITE = [float("inf"), float("-inf"), float("nan"), "Infinity", 1.0, [0.0, float("inf")], {"not": float("inf")}]


def test_configs_with_infinities_are_described_and_told_apart(folder: Path) -> None:
    seen = set()
    for value in NOT_FINITE:
        set_config(folder, time_step_limit=value)
        seen.add((describe(folder).fingerprint(), combine(spelled_out(read_config(folder)))))
    assert len({one for one, _ in seen}) == len({two for _, two in seen}) == len(NOT_FINITE)


def test_what_is_finite_keeps_its_digest(folder: Path) -> None:
    document = {"a": [1, 2.5, None, True, {"b": "Infinity"}], "c": (1,), "d": 10**40}
    assert combine(spelled_out(document)) == combine(document)


# ---------------------------------------------------------------------------------------------- transient failures


def dying(how: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, signal, sys; {how}")


FOUND = {
    "class_name": "L", "n_layers": 4, "hidden_size": 8, "n_embeddings": 9, "context_length": 9, "has_head": True,
    "hooks": {"a": 8}, "not_hooks": {}, "faults": [],
}  # fmt: skip
ANSWERING = dying(f"print({json.dumps({'skeleton': FOUND})!r})")
BUILD = modules._build
TENSORS = Tensors(shapes={"a": (2, 3)})
TRANSIENT = {
    "killed": dying("os.kill(os.getpid(), signal.SIGKILL)"),
    "ended": dying("os.kill(os.getpid(), signal.SIGTERM)"),
    "no room": dying("raise OSError(28, 'No space left on device')"),
    "failed": dying("sys.exit(1)"),
    "not started": ("/nowhere/python",),
}
TOO_MUCH = {
    "time": dying("os.kill(os.getpid(), signal.SIGXCPU)"),
    "memory": dying('print(\'{"failed": "MemoryError"}\')'),
}


@pytest.mark.parametrize("case", [*TRANSIENT, *TOO_MUCH])
def test_what_befell_the_machine_is_not_held_against_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_build", BUILD)
    monkeypatch.setattr(modules, "_COMMAND", (TRANSIENT | TOO_MUCH)[case])
    wanted, code = (Unavailable, "not_built") if case in TRANSIENT else (InvalidRequest, "unsupported_model")
    with pytest.raises(wanted) as caught:
        find_skeleton("x", {}, TENSORS)
    assert caught.value.code == code
    monkeypatch.setattr(modules, "_COMMAND", ANSWERING)
    assert find_skeleton("x", {}, TENSORS).n_layers == 4
    monkeypatch.setattr(modules, "_COMMAND", TRANSIENT["failed"])  # what was found for good is kept
    assert find_skeleton("x", {}, TENSORS).n_layers == 4


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("place", ["settings_of", "fill", "_one_run"])
def test_a_full_machine_is_no_answer_about_a_model(
    place: str, error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(skeleton, place, fail)
    asked = {"config": read_config(folder), "shapes": read_tensors(folder).shapes, "odd_dtypes": {}}
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="full"):
            skeleton._answer(asked)
    else:
        assert skeleton._answer(asked).keys() == {"failed"}


def test_the_time_limit_tells_its_signal_from_a_kill() -> None:
    """Where both limits are the same, Linux sends SIGKILL and not SIGXCPU."""
    code = (
        "import gnomon_workers.models.skeleton as s\n"
        "s.MOST_CPU_S = 1 + int(__import__('time').process_time())\ns._limit()\nwhile True: pass"
    )
    run = subprocess.run([sys.executable, "-c", code], timeout=300)
    assert run.returncode == -signal.SIGXCPU


# ---------------------------------------------------------------------------------------------- tokenizers


def with_dropout(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["dropout"] = 0.5
    path.write_text(json.dumps(tokenizer))
    return AutoTokenizer.from_pretrained(folder)


def unigram(_folder: Path) -> Any:
    pieces = [("<unk>", -9.0), ("a", -1.0), ("b", -1.1), ("ab", -1.2), ("aba", -1.3), ("bab", -1.4)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Backend(Unigram(pieces, unk_id=0)))
    model: Any = tokenizer.backend_tokenizer.model
    model.alpha, model.nbest_size = 0.1, 9
    return tokenizer


DRAWING = {"BPE": (with_dropout, ("dropout",)), "Unigram": (unigram, ("alpha", "nbest_size"))}


@pytest.mark.parametrize("kind", DRAWING)
def test_tokenizers_draw_no_lots(kind: str, folder: Path) -> None:
    make, names = DRAWING[kind]
    tokenizer = make(folder)
    text = "abababababababababab" * 3
    assert len({tuple(tokenizer(text).input_ids) for _ in range(9)}) > 1, "the test would show nothing"
    assert without_sampling(tokenizer) == names
    assert len({tuple(tokenizer(text).input_ids) for _ in range(9)}) == 1


def test_a_loaded_tokenizer_says_that_it_drew_lots(folder: Path) -> None:
    assert "sampling_switched_off" not in load_tokenizer(folder).provenance()
    with_dropout(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.provenance()["sampling_switched_off"] == ["dropout"]
    assert len({tuple(next(encode_joined([ALICE], tokenizer))) for _ in range(5)}) == 1


def test_sampling_that_cannot_be_switched_off_is_refused() -> None:
    class Sampling:
        sp_model_kwargs: dict[str, Any] = {"enable_sampling": True}  # noqa: RUF012

    with pytest.raises(InvalidRequest) as caught:
        without_sampling(Sampling())
    assert caught.value.code == "random_tokenizer"


def test_tensors_of_two_files_are_counted_once() -> None:
    with pytest.raises(InvalidRequest, match=r"a is in x and in y"):
        Tensors.of_files([("x", {"a": 1}), ("y", {"a": 1})], None)
