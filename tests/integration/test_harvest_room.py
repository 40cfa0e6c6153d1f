"""A harvest on a disk that is too small, a real one: it waits before any work, and goes on once there is room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SMALL_DISK = "mount -t tmpfs -o size=16m tmpfs {place} && exec {python} -m tests.support.harvest_on_small_disk {place}"


def test_a_harvest_that_does_not_fit_waits_before_any_work_and_goes_on(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which this machine does not give")
    script = SMALL_DISK.format(place=tmp_path, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all is well"
