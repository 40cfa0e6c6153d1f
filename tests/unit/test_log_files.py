"""Logs of children that live long: of bounded size while they are written, with the latest lines kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gnomon_service.local import log_files
from gnomon_service.local.log_files import rotate
from gnomon_service.local.processes import Child, ChildProcesses
from tests.support.waiting import wait_until

LIMIT = 1_000_000
N_LINES = 200_000
"""Of 100 bytes each."""
WRITER = f"""
import time
for number in range({N_LINES}):
    print(format(number, "099d"), flush=number % 100 == 99)
    if number % 1000 == 999:
        time.sleep(0.02)
print("the end", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "MAX_BYTES", LIMIT)


@pytest.fixture
def children() -> Iterator[ChildProcesses]:
    children = ChildProcesses()
    yield children
    children.stop()


def test_a_child_that_writes_for_long_fills_a_bounded_place(tmp_path: Path, children: ChildProcesses) -> None:
    log = tmp_path / "logs" / "child.log"
    log.parent.mkdir()
    children.add(Child(name="child", argv=[sys.executable, "-c", WRITER], environment=os.environ, log=log))
    highest = 0

    def is_over() -> bool:
        nonlocal highest
        with suppress(FileNotFoundError):  # renamed just now
            highest = max(highest, sum(path.stat().st_size for path in log.parent.iterdir()))
        return "the end" in log_files.last_bytes(log, 2000).decode()

    wait_until(is_over, "the child's last line")
    parts = [log, *(log.with_name(f"{log.name}.{number}") for number in (1, 2, 3))]
    wait_until(lambda: set(log.parent.iterdir()) == set(parts), "the end of the last turn")
    # of 20 MB: four files, one that is copied, and in each what comes between two looks
    assert highest < 15 * LIMIT
    whole = [line for part in reversed(parts) for line in part.read_text().split("\n") if len(line) == 99]
    lines = list(map(int, whole))
    assert lines == sorted(lines) and lines[-1] == N_LINES - 1
    assert len(lines) >= 0.99 * (N_LINES - 1 - lines[0]), "no more than what is written between copying and emptying"


def test_the_latest_parts_are_kept_and_a_short_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    assert not rotate(log)
    log.write_bytes(b"short")
    assert not rotate(log) and log.read_bytes() == b"short"
    for number in range(6):
        log.write_bytes(str(number).encode() * LIMIT)
        assert rotate(log) and log.read_bytes() == b""
    assert [(tmp_path / f"child.log.{n}").read_bytes()[:1] for n in (1, 2, 3)] == [b"5", b"4", b"3"]
    assert len(list(tmp_path.iterdir())) == 4
