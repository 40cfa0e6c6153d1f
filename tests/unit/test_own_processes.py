"""Tests find their own processes, and leave alone what looks the same and is another's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from tests.support.own_processes import own_pids
from tests.support.waiting import wait_until

NAME = "ray::HarvestWorker"
SLEEP = f"import time; '{NAME}'; print('up', flush=True); time.sleep(3600)"
ORPHAN = f"""
import subprocess, sys
silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
other = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], **silent)
print(other.pid)
"""


def test_a_process_of_the_same_name_that_is_not_ours_is_not_found() -> None:
    mine = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE)
    other = int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, check=True).stdout)
    try:
        assert mine.stdout is not None and mine.stdout.readline() == b"up\n"
        wait_until(lambda: NAME in " ".join(psutil.Process(other).cmdline()), "the other process")
        assert own_pids(NAME) == [mine.pid]
    finally:
        mine.kill()
        mine.communicate()
        os.kill(other, signal.SIGKILL)
    assert own_pids(NAME) == []
