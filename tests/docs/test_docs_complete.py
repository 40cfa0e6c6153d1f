"""Documentation that is missing or out of date fails here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from gnomon import errors
from gnomon.dictionary_config import Architecture
from gnomon.errors import GnomonError
from gnomon.resources import Event
from gnomon.specs import (
    DEFAULT_BETAS,
    DEFAULT_LR,
    Activation,
    Adam,
    Alignment,
    AuxK,
    Gated,
    JumpReLU,
    Matryoshka,
    PAnneal,
    ReLU,
    Spec,
    TrainSpec,
)
from gnomon_service.app import make_app
from gnomon_service.rest.key_gate import PUBLIC_PATHS
from gnomon_service.settings import Settings
from tests.support.blocks import ROOT, blocks

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOT_RUN = {
    "make demo": "takes minutes; run by hand",
    "make test": "is this",
    "gnomon up": "the example tests start the same thing in process",
    "pip install torch": "is what `make venv` does",
    "mkdir -p inputs": "the example tests bring their own model and text",
}
"""First line of each block of the README that no test runs, and why."""


def page(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text()


def test_every_endpoint_is_documented_with_its_method(tmp_path: Path) -> None:
    text = page("docs/rest.md")
    paths = make_app(Settings(home=tmp_path)).openapi()["paths"]
    served = {(method.upper(), path) for path, item in paths.items() for method in item}
    documented = set(re.findall(r"\| `(GET|POST|PATCH|DELETE) (\S+)` \|", text))
    assert documented == served


def test_public_paths_are_documented() -> None:
    public = set(re.findall(r"\| `GET (\S+)` \| .* \| public \|", page("docs/rest.md")))
    assert public == PUBLIC_PATHS
    assert all(f"`{path}`" in page("SECURITY.md") for path in PUBLIC_PATHS)


def test_every_setting_is_documented() -> None:
    text = page("docs/operations.md")
    documented = set(re.findall(r"`(GNOMON_[A-Z_]+)`", text.split("## Settings")[1].split("Workers keep")[0]))
    assert documented == {f"GNOMON_{name.upper()}" for name in Settings.model_fields}


def test_every_error_of_the_api_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GnomonError)]
    travelling = {kind.__name__: kind.status for kind in kinds if kind.status != 500}
    text = page("docs/rest.md")
    for name, status in travelling.items():
        assert re.search(rf"\| {status} \| .*`{name}`", text), name


def test_every_event_kind_is_documented() -> None:
    described = Event.model_fields["kind"].description or ""
    assert set(re.findall(r"^\| `(\w+)` \|", page("docs/rest.md").split("## Events")[1], re.MULTILINE)) == set(
        re.findall(r"\"(\w+)\"", described)
    )


def test_every_alignment_is_documented() -> None:
    section = page("docs/method.md").split("### The five values")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", section, re.MULTILINE)
    assert set(rows) == set(get_args(Alignment))
    default = TrainSpec.model_fields["alignment"].default
    assert f"| `{default}` (default) |" in page("docs/method.md")


def test_every_activation_is_documented_with_its_settings() -> None:
    section = page("docs/method.md").split("### Activations")[1].split("\n### ")[0]
    formulas, settings = section.split("| `activation` | setting |")
    activations: tuple[type[Spec], ...] = get_args(get_args(Activation)[0])
    kinds = {activation.model_fields["kind"].default: activation for activation in activations}
    assert set(re.findall(r"^\| `(\w+)` \|", formulas, re.MULTILINE)) - {"activation"} == set(kinds)
    assert set(re.findall(r"^\|[^|]*\| `(\w+)` \|", settings, re.MULTILINE)) == {
        field for activation in activations for field in activation.model_fields if field != "kind"
    }
    exported = page("docs/formats.md").split("| `architecture` |")[1]
    assert all(f"`{architecture}`" in exported for architecture in get_args(Architecture))


def test_defaults_of_activations_that_the_method_page_states_hold() -> None:
    assert Matryoshka().group_fractions == (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    assert (JumpReLU().bandwidth, JumpReLU().initial_threshold) == (0.001, 0.001)
    assert {Gated().l1_coefficient, ReLU().l1_coefficient, PAnneal().l1_coefficient} == {0.04}
    assert (PAnneal().final_p, PAnneal().n_updates, AuxK().coefficient) == (0.2, 10, 1 / 32)
    assert DEFAULT_LR == {"jumprelu": 7e-5, "gated": 5e-5}
    chooses_k, penalised = {"topk", "batchtopk", "matryoshka"}, {"gated", "relu", "p_anneal"}
    assert (
        dict.fromkeys(chooses_k, (0, 0.99)) | dict.fromkeys(penalised, (0.9, 0.999)) | {"jumprelu": (0, 0.999)}
        == DEFAULT_BETAS
    )


def test_defaults_that_the_method_page_states_hold() -> None:
    spec = TrainSpec.model_validate(
        {
            "activations": {"kind": "store", "id": "act_" + "0" * 32},
            "d_sae": 2**14,
            "token_budget": 4096 * 400_000,
        }
    )
    assert spec.resolve_lr(2**14) == pytest.approx(2e-4)
    shorter = spec.model_copy(update={"token_budget": 4096 * 4_000})
    assert shorter.resolve_lr(2**14) == pytest.approx(2e-3) and shorter.resolve_lr(2**10) == pytest.approx(7e-3)
    assert (spec.warmup_steps, shorter.warmup_steps) == (1000, 200)
    assert (spec.normalize, spec.schedule.decay_fraction) == ("centred", 1.0)
    assert (Adam().clip_norm, Adam().b_enc_rate, Adam().b_dec_rate) == (0.2, 5.0, 0.03)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_block_of_the_readme_is_run_or_has_a_reason_not_to_be() -> None:
    code = [(name, text) for name, language, text in blocks() if language in ("bash", "python")]
    unnamed = {text.splitlines()[0] for name, text in code if not name}
    assert unnamed == set(NOT_RUN)
    assert {name for name, _ in code if name} == {"cli", "curl", "curl-events", "figures", "sdk"}
