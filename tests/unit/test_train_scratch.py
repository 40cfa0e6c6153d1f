"""Scratch folders: gone with their process, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gnomon_workers.runtime import scratch
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


def _convert(place: Path, pipe: Connection) -> None:
    with scratch_folder(place, prefix=".converting-") as folder:
        (folder / "large").write_bytes(b"x")
        pipe.send(folder)
        pipe.recv()


def test_what_a_killed_process_left_elsewhere_goes_with_the_next_use_and_nothing_else_does(place: Path) -> None:
    kept = place / "gguf-converted"
    kept.mkdir()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_convert, args=(place, theirs), daemon=True)
    process.start()
    left: Path = ours.recv()
    with scratch_folder(place, prefix=".converting-"):
        assert (left / "large").exists(), "its process lives"
    process.kill()
    process.join(30)
    with scratch_folder(place, prefix=".converting-") as folder:
        assert not left.exists() and folder.exists()
        folder.rename(place / "gguf-new")  # what was made takes its place; the name is free for others
    assert sorted(path.name for path in place.iterdir()) == ["gguf-converted", "gguf-new"]


def test_a_folder_is_never_taken_from_its_maker_however_many_come_at_once(place: Path) -> None:
    def use(_: int) -> None:
        with scratch_folder() as folder:
            (folder / "large").write_bytes(b"x")
            remove_abandoned()
            assert (folder / "large").exists()

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(use, range(200)))
    assert list(place.iterdir()) == []


def test_workers_make_temporary_files_in_no_other_way() -> None:
    root = Path(scratch.__file__).parents[1]
    others = [path for path in root.rglob("*.py") if "tempfile" in path.read_text() and path != Path(scratch.__file__)]
    assert others == [], "what is made without runtime.scratch is left behind by a killed process"
