"""One suite for every backend: local files and a real S3 server behave alike."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from obstore.exceptions import GenericError

from gnomon.errors import CorruptArtifact, InvalidRequest, NotFound, StoreUnavailable
from gnomon_storage.activations import ActivationStore
from gnomon_storage.arrays import (
    chunk_key,
    make_array,
)
from gnomon_storage.location import Location
from gnomon_storage.rows import float32_from_bfloat16
from gnomon_storage.shuffle import BatchReader
from tests.support.activation_stores import make_counted_store
from tests.support.seaweed import environment, new_place, s3_server
from tests.support.stored_rows import bfloat16_from_float32, zarr_store_of


@pytest.fixture(scope="module")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running S3 server."""
    with s3_server(tmp_path_factory.mktemp("weed")) as values, environment(values):
        yield values


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place of each kind."""
    if request.param == "file":
        return Location.open((tmp_path / "root").as_uri())
    request.getfixturevalue("s3_environment")
    place = Location.open(new_place())
    place.child("first").write_bytes(b"")  # makes the bucket
    place.delete()
    return place


def test_bytes_come_back(root: Location) -> None:
    place = root.child("a", "b", "x.bin")
    place.write_bytes(b"0123456789")
    assert place.read_bytes() == b"0123456789"
    assert place.size() == 10
    assert Location.open(place.url).read_bytes() == b"0123456789"
    place.write_bytes(b"new")
    assert place.read_bytes() == b"new"


def test_ranges_end_where_the_file_ends(root: Location) -> None:
    place = root.child("x")
    place.write_bytes(b"0123456789")
    assert place.read_range(2, 5) == b"234"
    assert place.read_range(8, 100) == b"89"
    assert place.read_range(10, 20) == b""
    assert place.read_range(3, 3) == b""
    with pytest.raises(ValueError, match="range"):
        place.read_range(5, 2)


def test_streams_seek_and_read(root: Location) -> None:
    place = root.child("x")
    place.write_bytes(b"one\ntwo\n" + bytes(5_000_000) + b"end")
    with place.open_read() as stream:
        assert stream.readline() == b"one\n"
        assert stream.read(3) == b"two"
        assert stream.seek(-3, 2) == 5_000_008
        assert stream.read() == b"end"


def test_streams_read_like_any_file(root: Location) -> None:
    place = root.child("x")
    place.write_bytes(b"one\ntwo\nthree")
    with place.open_read() as stream:
        assert stream.readline(2) == b"on"
        assert list(stream) == [b"e\n", b"two\n", b"three"]
        assert stream.read(1) == b""
        assert stream.seek(4) == stream.tell() == 4
        assert stream.readinto(buffer := bytearray(20)) == 9  # type: ignore[attr-defined]
        assert buffer[:9] == b"two\nthree"
    assert stream.closed
    place.write_bytes(b"")
    with place.open_read() as stream:
        assert stream.read() == b""


def test_an_open_stream_fails_with_an_error_of_ours(root: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    place = root.child("x")
    place.write_bytes(bytes(10))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "input/output error") if root.local_path() else GenericError("connection reset")

    with place.open_read() as stream:
        monkeypatch.setattr(stream.raw._file, "readinto", broken, raising=False)  # type: ignore[attr-defined]
        with pytest.raises(StoreUnavailable):
            stream.read()


def test_a_folder_is_no_file_and_a_file_no_folder(root: Location) -> None:
    folder = root.child("a")
    folder.child("x").write_bytes(b"1")
    for read in (folder.read_bytes, folder.size, folder.etag, folder.open_read, lambda: folder.read_range(0, 1)):
        with pytest.raises(NotFound):
            read()
    assert folder.child("x").list() == []
    assert folder.child("x").walk() == {}
    assert not folder.child("x", "y").exists()
    assert not folder.child("x", "y").is_file()
    with pytest.raises(NotFound):
        folder.child("x", "y").read_bytes()


def test_a_tag_tells_one_content_from_another(root: Location) -> None:
    place = root.child("x")
    place.write_bytes(b"old")
    tag = place.etag()
    assert place.etag() == tag
    place.write_bytes(b"newer")
    assert place.etag() != tag
    place.delete()
    with pytest.raises(NotFound):
        place.etag()


def test_every_allowed_name_is_taken_literally(root: Location) -> None:
    names = ["-", "A", "_", "a", "a+b", "a.b..c", "a=1@2"]
    for name in names:
        root.child("n", name).write_bytes(name.encode())
    assert root.child("n").walk() == {name: len(name) for name in sorted(names)}
    assert all(root.child("n", name).read_bytes() == name.encode() for name in names)
    root.child("n", "a+b").delete()
    assert root.child("n").list() == sorted(set(names) - {"a+b"})


@pytest.mark.parametrize("name", ["a b", "a*", "[a]", "a?", "a#1", "ü", "a&b"])
def test_a_root_with_odd_characters_is_taken_literally(root: Location, name: str) -> None:
    odd, other = Location.open(f"{root.url}/{name}"), root.child("ab")
    other.child("x").write_bytes(b"other")
    odd.child("x").write_bytes(b"1")
    assert odd.child("y").create_bytes(b"22")
    assert odd.walk() == {"x": 1, "y": 2}
    assert odd.list() == ["x", "y"]
    write_array(odd, "z", np.arange(3, dtype=np.int32), 2)
    assert sorted(odd.child("z").walk()) == ["c/0", "c/1", "zarr.json"]
    np.testing.assert_array_equal(np.asarray(zarr.open_array(zarr_store_of(odd), path="z", mode="r")[:]), [0, 1, 2])
    odd.delete()
    assert root.walk() == {"ab/x": 5}


def test_a_whole_bucket_is_a_root(s3_environment: dict[str, str]) -> None:
    bucket = Location.open("s3://gnomon-test")
    bucket.child("top").write_bytes(b"1")
    assert bucket.child("top").url == "s3://gnomon-test/top"
    assert "top" in bucket.list()
    assert bucket.walk()["top"] == 1
    assert bucket.exists()
    assert not bucket.is_file()
    write_array(bucket, "z", np.arange(3, dtype=np.int32), 2)
    assert "z/c/1" in bucket.walk()
    bucket.child("z").delete()
    bucket.child("top").delete()
    assert not bucket.child("top").exists()


def test_absent_is_not_found(root: Location) -> None:
    place = root.child("nothing")
    for read in (place.read_bytes, place.size, place.read_json, place.open_read, lambda: place.read_range(0, 1)):
        with pytest.raises(NotFound):
            read()
    assert not place.exists()
    assert not place.is_file()
    assert place.list() == []
    assert place.walk() == {}
    place.delete()
    with pytest.raises(NotFound):
        place.download(Path("/nonexistent/never-written"))


def test_damaged_json_is_corrupt(root: Location) -> None:
    root.child("x.json").write_json({"b": [1, 2], "a": None})
    assert root.child("x.json").read_json() == {"a": None, "b": [1, 2]}
    root.child("x.json").write_bytes(b"{")
    with pytest.raises(CorruptArtifact):
        root.child("x.json").read_json()


def test_list_and_walk(root: Location) -> None:
    for name, size in {"a/x": 1, "a/y/z": 2, "ab/w": 3, "c": 4}.items():
        root.child(name).write_bytes(bytes(size))
    assert root.list() == ["a", "ab", "c"]
    assert root.child("a").list() == ["x", "y"]
    assert root.child("a").walk() == {"x": 1, "y/z": 2}
    assert root.walk() == {"a/x": 1, "a/y/z": 2, "ab/w": 3, "c": 4}
    assert root.child("a").exists()
    assert not root.child("a").is_file()


def test_delete_takes_the_folder_and_nothing_beside_it(root: Location) -> None:
    for name in ("a/x", "a/y/z", "ab/w"):
        root.child(name).write_bytes(b"1")
    root.child("a").delete()
    assert root.walk() == {"ab/w": 1}
    assert not root.child("a").exists()
    root.child("ab", "w").delete()
    assert root.walk() == {}


def test_folders_may_be_deleted_twice_at_once(root: Location) -> None:
    place = root.child("a")
    for number in range(100):
        place.child(f"{number % 10}", f"{number}").write_bytes(b"1")
    root.child("b").write_bytes(b"1")
    barrier, failures = threading.Barrier(4), list[Exception]()

    def delete() -> None:
        barrier.wait()
        try:
            place.delete()
        except StoreUnavailable as error:
            failures.append(error)

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert root.walk() == {"b": 1}
    assert not place.exists()


def test_upload_replaces_a_file(root: Location, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    place = root.child("x")
    place.write_bytes(b"old")
    place.upload(tmp_path / "source")
    assert place.read_bytes() == b"new"
    assert root.list() == ["x"]
    (tmp_path / "taken").write_bytes(b"longer than what comes")
    place.download(tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"new"


def test_upload_and_download_a_folder(root: Location, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.bin").write_bytes(bytes(6 << 20))
    (source / "deep" / "b").write_bytes(b"b")
    root.child("up").upload(source)
    assert root.child("up").walk() == {"a.bin": 6 << 20, "deep/b": 1}
    root.child("up").download(tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "b").read_bytes() == b"b"
    assert (tmp_path / "back" / "a.bin").stat().st_size == 6 << 20
    root.child("up", "deep", "b").download(tmp_path / "one" / "file")
    assert (tmp_path / "one" / "file").read_bytes() == b"b"


def test_create_refuses_a_taken_name(root: Location) -> None:
    place = root.child("x.json")
    assert place.create_json({"n": 1})
    assert not place.create_json({"n": 1})
    assert place.read_json() == {"n": 1}


def test_create_holds_for_large_files_and_once_the_name_is_free_again(root: Location) -> None:
    place, large = root.child("x"), bytes(20 << 20)
    assert place.create_bytes(large)
    assert not place.create_bytes(b"small")
    assert not place.create_bytes(large)
    assert place.size() == len(large)
    place.delete()
    assert place.create_bytes(b"small")
    assert place.read_bytes() == b"small"


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    root = Location.open(str(tmp_path))
    root.child("a", "x").write_bytes(b"1")
    (tmp_path / "a" / ".tmp-0123").write_bytes(b"half")
    assert root.child("a").list() == ["x"]
    assert root.walk() == {"a/x": 1}
    root.child("a").delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same_bytes", [False, True])
def test_exactly_one_racing_creator_wins(root: Location, same_bytes: bool) -> None:
    n_writers, n_rounds = 8, 5
    for number in range(n_rounds):
        place = root.child(f"round-{number}")
        barrier = threading.Barrier(n_writers)
        winners: list[int] = []

        def write(writer: int, place: Location = place, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if place.create_bytes(b"same" if same_bytes else b"writer %d" % writer):
                winners.append(writer)  # noqa: B023 - joined within the round

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(n_writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert place.read_bytes() == (b"same" if same_bytes else b"writer %d" % winners[0])
    assert len(root.list()) == n_rounds, "half-written files were left"


def write_array(root: Location, name: str, values: np.ndarray[Any, np.dtype[Any]], chunk_rows: int) -> None:
    """An array with its chunks."""
    make_array(root, name, shape=values.shape, chunk_rows=chunk_rows, dtype=values.dtype.name, attributes={})
    for chunk, start in enumerate(range(0, len(values), chunk_rows)):
        block = np.zeros((chunk_rows, *values.shape[1:]), values.dtype)
        block[: len(values) - start] = values[start : start + chunk_rows]
        root.child(name, chunk_key(chunk, values.ndim)).write_bytes(block.tobytes())


def test_zarr_itself_reads_the_arrays(root: Location) -> None:
    write_array(root, "acts/h.0", np.arange(15, dtype=np.uint16).reshape(5, 3), 2)
    group = zarr.open_group(zarr_store_of(root), mode="r")
    found = group["acts/h.0"]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(found[:], np.arange(15).reshape(5, 3))


def test_a_whole_activation_store(root: Location) -> None:
    store = make_counted_store(root.url, sizes=(300, 200), dtype="bfloat16")
    store.check_quick()
    assert list(store.damages()) == []
    with BatchReader(store, "layers.0", seed=0, batch_size=100) as batches:
        numbers = [int(row[0]) for step in range(5) for row in batches.batch(step, 0, 100)]
    # bfloat16 holds whole numbers exactly to 256 only
    expected = float32_from_bfloat16(bfloat16_from_float32(np.arange(500, dtype=np.float32)))
    assert sorted(numbers) == sorted(expected.astype(int).tolist())
    segment = store.manifest.split("segments")[1]
    root.child(segment.path, "acts/layers.1/c/0/0").delete()
    with pytest.raises(CorruptArtifact):
        store.check_quick()
    with pytest.raises(CorruptArtifact, match="is missing"):
        ActivationStore.open(root).read_rows("layers.1", segment, 0, 10)


def test_an_unreachable_object_store_is_unavailable(s3_environment: dict[str, str]) -> None:
    with environment({"AWS_SECRET_ACCESS_KEY": "wrong"}), pytest.raises(StoreUnavailable) as caught:
        Location.open("s3://another-bucket-entirely/x").child("y").write_bytes(b"1")
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.message


def test_a_missing_bucket_is_said_to_be_missing(s3_environment: dict[str, str]) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        Location.open("s3://no-such-bucket/x").walk()
    assert caught.value.code == "no_bucket"


def test_children_stay_below(root: Location) -> None:
    for name in ("..", "a/../b", "/etc", "a//b", ".", "", "a\\b", "a\x00", "%2e%2e", "x::y", "file:x", ".tmp-1", "ü"):
        with pytest.raises(InvalidRequest) as caught:
            root.child(name)
        assert caught.value.code == "location_not_allowed"
