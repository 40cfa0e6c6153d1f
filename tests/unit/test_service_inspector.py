"""Foreign bytes are read by processes of their own: what takes long, much or for ever harms no other request."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gnomon.errors import CorruptArtifact, GnomonError, InvalidRequest, Unavailable
from gnomon.specs import HarvestSpec
from gnomon_service.planning.inspector import MOST_INQUIRIES, NICENESS, Inspector
from gnomon_storage import digests, known_digests
from gnomon_storage.activations import ActivationStore
from gnomon_workers.harvest import inspection
from gnomon_workers.harvest.inspection import inspect_harvest
from tests.support.service_api import write_inputs
from tests.support.stores import make_store
from tests.support.waiting import wait_until


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    write_inputs(folder)
    return folder


@pytest.fixture
def inspector() -> Iterator[Inspector]:
    made = Inspector(answer_s=600)
    yield made
    made.close()


def write_endless(path: Path) -> None:
    """A text of a few bytes and a terabyte of zeros, which take no room and many minutes to read."""
    path.write_text('{"text": "hello"}\n')
    os.truncate(path, 1 << 40)


def harvest(inputs: Path, text: str = "text.txt", hook: str = "model.layers.1") -> HarvestSpec:
    return HarvestSpec.model_validate(
        {
            "kind": "harvest", "model": {"source": str(inputs / "model")}, "text": [{"url": str(inputs / text)}],
            "hooks": [hook], "context_length": 32, "token_budget": 1024,
        }
    )  # fmt: skip


def test_it_sees_what_a_look_in_this_process_sees(inputs: Path, inspector: Inspector) -> None:
    roots = (str(inputs),)
    assert inspector.harvest(harvest(inputs), roots) == inspect_harvest(harvest(inputs), roots)
    with pytest.raises(InvalidRequest, match=r"model\.layers\.1") as caught:
        inspector.harvest(harvest(inputs, hook="model.layer.1"), roots)
    assert caught.value.code == "unknown_hook"
    assert "model.layers.1" in caught.value.detail["nearest"]


def test_a_damaged_store_is_told_as_it_is(tmp_path: Path, inspector: Inspector) -> None:
    place = make_store(tmp_path).location
    inspector.check_store(place.url)
    folder = place.local_path()
    assert folder is not None
    next(path for path in sorted(folder.rglob("c/*")) if path.is_file()).unlink()
    with pytest.raises(CorruptArtifact):
        ActivationStore.open(place).check_quick()
    with pytest.raises(CorruptArtifact, match="harvest it again"):
        inspector.check_store(place.url)


def test_a_look_that_takes_long_goes_on_and_is_joined(inputs: Path, tmp_path: Path) -> None:
    write_endless(inputs / "slow.jsonl")
    slow = Inspector(answer_s=0.5)
    spec, roots = harvest(inputs, "slow.jsonl"), (str(inputs),)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="send the same request again") as caught:
                slow.harvest(spec, roots)
            assert caught.value.code == "still_reading"
        assert len(slow._inquiries) == 1
        with pytest.raises(InvalidRequest):  # others are answered meanwhile
            wait_for_answer(slow, harvest(inputs, hook="nothing"), roots)
    finally:
        slow.close()
    wait_until(lambda: not slow._inquiries, "the end")


def wait_for_answer(inspector: Inspector, spec: HarvestSpec, roots: tuple[str, ...]) -> None:
    while True:
        try:
            inspector.harvest(spec, roots)
        except Unavailable:
            continue
        return


def test_a_look_that_no_one_asks_for_is_given_up(inputs: Path) -> None:
    write_endless(inputs / "never.jsonl")
    impatient = Inspector(answer_s=0.1, abandoned_s=0.1)
    with pytest.raises(Unavailable):
        impatient.harvest(harvest(inputs, "never.jsonl"), (str(inputs),))
    wait_until(lambda: not impatient._inquiries, "the end")
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "inspector"], "the threads")
    impatient.close()


def test_too_many_looks_are_refused(inputs: Path) -> None:
    write_endless(inputs / "never.jsonl")
    crowded = Inspector(answer_s=0.0)
    for number in range(MOST_INQUIRIES):
        spec = harvest(inputs, "never.jsonl").model_copy(update={"token_budget": 1024 + number})
        with pytest.raises(Unavailable, match="same look"):
            crowded.harvest(spec, (str(inputs),))
    with pytest.raises(Unavailable) as caught:
        crowded.harvest(harvest(inputs), (str(inputs),))
    assert caught.value.code == "busy"
    crowded.close()
    wait_until(lambda: not crowded._inquiries, "the end")


def test_a_process_that_dies_refuses_the_request_and_no_other(inputs: Path) -> None:
    write_endless(inputs / "never.jsonl")
    inspector = Inspector(answer_s=60)
    died: list[InvalidRequest] = []

    def ask() -> None:
        try:
            inspector.harvest(harvest(inputs, "never.jsonl"), (str(inputs),))
        except InvalidRequest as error:
            died.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: len(children_reading()) == 1, "a busy child")
    os.kill(children_reading()[0], 9)
    asking.join(60)
    assert [error.code for error in died] == ["unreadable_input"]
    assert inspector.harvest(harvest(inputs), (str(inputs),)).hooks == {"model.layers.1": 16}
    inspector.close()


def test_a_fault_of_the_service_is_not_blamed_on_the_request(inspector: Inspector) -> None:
    with pytest.raises(GnomonError, match="its log says why") as caught:
        inspector._ask({"nothing": "that is known"})
    assert (caught.value.status, caught.value.code) == (500, "internal")


def test_too_much_memory_is_told_as_such(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(inspection, "inspect_harvest", grow)
    question = {"harvest": harvest(inputs).model_dump(mode="json"), "input_roots": [str(inputs)]}
    assert inspection.answer(question)["problem"]["code"] == "unreadable_input"


def children() -> list[psutil.Process]:
    """Inspections of this process."""
    return [each for each in psutil.Process().children() if "gnomon_workers.harvest.inspection" in each.cmdline()]


def children_reading() -> list[int]:
    """Those that are busy."""
    return [each.pid for each in children() if each.io_counters().read_chars > 1 << 28]


def test_processes_come_after_everything_else_from_their_first_import_on(inputs: Path, inspector: Inspector) -> None:
    asking = threading.Thread(target=inspector.harvest, args=(harvest(inputs), (str(inputs),)))
    asking.start()
    (child,) = wait_until(children, "a process", every_s=0.005)
    wait_until(lambda: child.nice() == NICENESS, "its priority", every_s=0.005)
    used = child.cpu_times()
    asking.join()
    assert used.user + used.system < 0.5, "it has imported all there is"


def test_the_digest_of_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    data = bytes(known_digests.LEAST_BYTES)
    path.write_bytes(data)

    def digest() -> str:
        digests._remembered.cache_clear()  # as in another process
        return digests.path_digest(path)

    wanted = hashlib.sha256(data).hexdigest()
    assert digest() == wanted
    assert not known_digests.folder().exists(), "a file that was changed just now may change within the same tick"
    wait_until(lambda: digest() == wanted and known_digests.folder().exists(), "a settled file")
    (kept,) = known_digests.folder().iterdir()
    kept.write_text("0" * 64)
    assert digest() == "0" * 64, "it was read again"
    times = path.stat()
    path.write_bytes(data[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() == hashlib.sha256(data[:-1] + b"x").hexdigest(), "the time that can be set back was believed"


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(known_digests.LEAST_BYTES))
    time.sleep(2.1)
    status = path.stat()
    path.touch()
    known_digests.remember(path, status, "0" * 64)
    assert known_digests.recall(path, status) is None
