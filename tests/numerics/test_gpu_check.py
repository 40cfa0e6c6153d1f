"""`make gpu-check` goes through its motions at toy size where there is no GPU, and says when something is unequal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
UNEQUAL = """
import sys
sys.path.insert(0, {folder!r})
import gpu_check, gpu_sizes, gpu_oracle
found = gpu_sizes.Check(name="made up", status="unequal", error=1.0, limit=0.0)
gpu_oracle.checks = lambda device, is_toy: iter([found])
sys.exit(gpu_check.main())
"""
WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "fsspec", "obstore", "ray", "rich", "sqlalchemy", "typer", "zarr"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program in an interpreter of its own that finds the project only through its own file."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_check_runs_at_toy_size_with_few_packages(tmp_path: Path) -> None:
    main = f"sys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu_check\nsys.exit(gpu_check.main())"
    done = run(WITHOUT + main, "--json", "report.json", "--minutes", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["is_toy"]
    assert {check["status"] for check in report["checks"]} == {"equal"}
    names = " ".join(check["name"] for check in report["checks"])
    assert all(word in names for word in ("selection", "sparse products", "rows orth", "ties", "resumed", "bfloat16"))
    assert {row["run"] for row in report["table"]} == {"topk", "batchtopk", "unaligned", "torch"}
    assert all(tuned for tuned in report["tuning"].values())


def test_what_is_unequal_ends_with_1_and_is_in_the_report(tmp_path: Path) -> None:
    program = UNEQUAL.format(folder=str(BENCHMARKS))
    done = run(program, "--json", "report.json", "--stages", "right", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "unequal  made up" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["checks"][0]["status"] == "unequal"


def test_what_there_was_no_time_for_is_said(tmp_path: Path) -> None:
    main = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu_check\nsys.exit(gpu_check.main())"
    done = run(main, "--json", "report.json", "--minutes", "0", "--stages", "tuning", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["skipped"][0]["why"] == "no time was left"
