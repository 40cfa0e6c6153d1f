"""Scratch folders: gone with their process, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gnomon_workers.runtime.scratch import remove_abandoned, scratch_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _use(place: Path, pipe: Connection) -> None:
    tempfile.tempdir = str(place)
    with scratch_folder() as folder:
        (folder / "large").write_bytes(b"x")
        pipe.send(folder)
        pipe.recv()


def test_a_folder_is_gone_after_use(place: Path) -> None:
    with scratch_folder() as folder:
        (folder / "large").write_bytes(b"x")
    assert list(place.iterdir()) == []


def test_a_killed_process_leaves_a_folder_that_the_next_removes_while_others_live(place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes, folders = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_use, args=(place, theirs), daemon=True)
        process.start()
        processes.append((process, ours))
        folders.append(ours.recv())
    os.kill(processes[0][0].pid or 0, signal.SIGKILL)
    processes[0][0].join(30)
    assert all((folder / "large").exists() for folder in folders), "the kill left nothing behind, or the use removed it"
    remove_abandoned()
    assert not folders[0].exists() and (folders[1] / "large").exists()
    with scratch_folder():
        assert (folders[1] / "large").exists()
    processes[1][1].send(None)
    processes[1][0].join(30)
    assert list(place.iterdir()) == []
