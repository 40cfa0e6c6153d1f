"""Measuring the tests' coverage does not crash what is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, time
import coverage, coverage_saving

coverage_saving.EVERY_S = 0.001
measured = coverage.Coverage(data_file={data!r}, config_file={config!r}, auto_data=True, source_pkgs=["json"])
measured.start()
until = time.monotonic() + 0.2
while time.monotonic() < until:
    json.loads(json.dumps([1.0]))
"""


def test_program_that_ends_while_it_is_saved_ends_well(tmp_path: Path) -> None:
    config = tmp_path / "coveragerc"
    config.write_text("[run]\nparallel = true\nplugins = coverage_saving\n")
    program = PROGRAM.format(data=str(tmp_path / "data"), config=str(config))
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(8)]
    assert [run.returncode for run in runs] == [0] * 8, runs[0].stderr
    assert list(tmp_path.glob("data.*"))
