"""Our loaded dictionary and the real sae-lens agree on the same folder.

sae-lens lives in an environment of its own (`make saelens`); GNOMON_SAELENS_PYTHON names its interpreter.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gnomon
from gnomon.specs import Activation, BatchTopK, ReLU
from tests.support.dictionary_folders import D_IN, make_folder
from tests.support.exported import SCALE, trained_folder, transcoder_folder
from tests.support.steps import data
from tests.support.variants import VARIANTS

pytestmark = pytest.mark.saelens

ARCHITECTURES = ("topk", "jumprelu", "standard")
TRANSCODERS: dict[str, Activation] = {
    "transcoder-relu": ReLU(l1_coefficient=0.1),
    "transcoder-batchtopk": BatchTopK(k=5, threshold_beta=0.8),
}
TRAINED: dict[str, Activation] = {f"trained-{name}": VARIANTS[name] for name in VARIANTS if "+" not in name}
"""Exports of dictionaries that were trained on raw inputs, with the scaling folded."""
PROGRAM = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
for folder in map(Path, sys.argv[1:]):
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(load_file(folder.with_suffix(".in"))["x"]).detach()
    out = sae.decode(acts).detach()
    save_file({"acts": acts.contiguous(), "out": out.contiguous()}, folder.with_suffix(".out"))
    print(sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dictionary of each architecture, with inputs and what sae-lens makes of them beside it."""
    python = os.environ.get("GNOMON_SAELENS_PYTHON")
    if not python:
        pytest.skip("GNOMON_SAELENS_PYTHON is not set; `make saelens` makes the environment")
    root = tmp_path_factory.mktemp("saelens")
    folders = {name: make_folder(root / name, name) for name in ARCHITECTURES}
    folders |= {name: trained_folder(root / name, activation) for name, activation in TRAINED.items()}
    folders |= {name: transcoder_folder(root / name, activation) for name, activation in TRANSCODERS.items()}
    for name, folder in folders.items():
        x = torch.randn(64, D_IN) if name in ARCHITECTURES else SCALE * data(64)
        save_file({"x": x}, folder.with_suffix(".in"))
    command = [python, "-c", PROGRAM, *map(str, folders.values())]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = ["tiny", "blocks.2.hook_resid_post"] * len(ARCHITECTURES)
    assert run.stdout.split() == names + ["m", "blocks.3.hook_resid_post"] * (len(TRAINED) + len(TRANSCODERS))
    return folders


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRAINED, *TRANSCODERS])
def test_same_features_and_reconstructions(folders: dict[str, Path], architecture: str) -> None:
    folder = folders[architecture]
    theirs, ours = load_file(folder.with_suffix(".out")), gnomon.load(folder)
    acts = ours.encode(load_file(folder.with_suffix(".in"))["x"])
    assert int((acts > 0).sum()) > 0
    atol = 1e-6 * (1 if architecture in ARCHITECTURES else SCALE)
    torch.testing.assert_close(acts, theirs["acts"], rtol=1e-5, atol=atol)
    torch.testing.assert_close(ours.decode(acts), theirs["out"], rtol=1e-5, atol=atol)
