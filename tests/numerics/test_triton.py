"""The Triton kernels: equal to dense arithmetic, and machine code for the GPUs that they are made for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("module", ["triton_cases.py", "triton_compiled.py"])
def test_triton_kernels(module: str) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported, as transformers does before us."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if module == "triton_cases.py" and not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / module)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
