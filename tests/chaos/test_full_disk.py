"""SQLite on a disk that is full for a while, a real one: nothing acknowledged is lost, and work goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SMALL_DISK = "mount -t tmpfs -o size=24m tmpfs {disk} && exec {python} -m tests.chaos.small_disk {disk} {home}"


def test_a_disk_that_is_full_refuses_and_loses_nothing(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which this machine does not give")
    disk, home = tmp_path / "disk", tmp_path / "home"
    disk.mkdir()
    home.mkdir()
    script = SMALL_DISK.format(disk=disk, home=home, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "lost 0" in done.stdout
