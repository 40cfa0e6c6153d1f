"""Activation stores: what is written comes back, and every damage is seen."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from gnomon.errors import CorruptArtifact, NotFound
from gnomon_storage import activations, writing
from gnomon_storage.activations import ActivationStore
from gnomon_storage.digests import digest_of
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit
from gnomon_storage.rows import decode, float32_from_bfloat16
from gnomon_storage.writing import leftovers, load_commit
from tests.support.activation_stores import HOOKS, known_rows, make_counted_store, seal_store, write_segment
from tests.support.stored_rows import as_stored, bfloat16_from_float32, zarr_store_of


def files_of(folder: Path) -> list[Path]:
    """Every file of a store."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_rows_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writing.CHUNK_BYTES, "file", 1)  # chunks of 256 rows
    make_counted_store(tmp_path)
    store = ActivationStore.open(Location.open(str(tmp_path)))
    store.check_quick()
    assert list(store.damages()) == []
    first = 0
    for segment in store.manifest.split("segments"):
        assert segment.chunk_rows == 256
        for hook_name, d_in in HOOKS.items():
            rows = store.read_rows(hook_name, segment, 0, segment.n_rows)
            np.testing.assert_array_equal(rows, known_rows(first, segment.n_rows, d_in))
            np.testing.assert_array_equal(store.read_rows(hook_name, segment, 200, 290), rows[200:290])
        first += segment.n_rows
    with pytest.raises(IndexError):
        store.read_rows("layers.0", store.manifest.segments[0], 0, 701)


def test_manifest_counts_and_means(tmp_path: Path) -> None:
    manifest = make_counted_store(tmp_path).manifest
    assert (manifest.n_rows, manifest.n_held_out_rows) == (1513, 60)
    rows = np.concatenate([known_rows(0, 700, 8), known_rows(700, 513, 8), known_rows(1213, 300, 8)]).astype(float)
    np.testing.assert_allclose(manifest.hooks["layers.0"].mean, rows.mean(0), rtol=1e-12)
    assert manifest.hooks["layers.0"].mean_squared_norm == pytest.approx((rows**2).sum(1).mean(), rel=1e-12)
    assert manifest.n_bytes == sum(
        path.stat().st_size for path in files_of(tmp_path) if ".zarr" in str(path.relative_to(tmp_path))
    )


def test_index_columns_name_each_row(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path)
    segment = store.manifest.split("held_out")[0]
    contexts = store.contexts(segment)
    context_ids, positions = store.column(segment, "context_ids"), store.column(segment, "positions")
    assert contexts.shape == (20, 4)
    np.testing.assert_array_equal(store.column(segment, "tokens"), contexts[context_ids, positions])


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path, sizes=(300,), dtype="bfloat16")
    segment = store.manifest.segments[0]
    assert store.read_raw("layers.0", segment, 0, 300).dtype == np.uint16
    rows = known_rows(0, 300, 8)
    np.testing.assert_allclose(store.read_rows("layers.0", segment, 0, 300), rows, rtol=2**-8)


def test_int8_is_stored_with_a_scale_for_each_row(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path, sizes=(300,), dtype="int8")
    segment = store.manifest.segments[0]
    raw = store.read_raw("layers.0", segment, 0, 300)
    assert (raw.dtype.name, raw.shape) == ("uint8", (300, 12))
    rows, given = store.read_rows("layers.0", segment, 0, 300), known_rows(0, 300, 8)
    steps = np.abs(given).max(1, keepdims=True) / 127
    assert np.all(np.abs(rows - given) <= 0.501 * steps)
    np.testing.assert_array_equal(store.read_rows("layers.0", segment, 17, 99), rows[17:99])
    np.testing.assert_allclose(store.manifest.hooks["layers.0"].mean, rows.astype(float).mean(0), rtol=1e-9)
    opened = zarr.open_group(zarr_store_of(store.location.child(segment.path)), mode="r")
    array = opened["acts/layers.0"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:]), raw)
    assert array.attrs["dtype"] == "int8"


def test_rows_of_zeros_and_of_the_smallest_numbers_are_stored_as_int8() -> None:
    rows = np.array([[0.0, 0.0], [1e-45, 0.0], [-3e38, 1e30]], np.float32)
    decoded = decode(as_stored(rows, "int8"), "int8")
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded, rows, rtol=1e-6, atol=3e38 / 250)
    np.testing.assert_array_equal(decoded[0], [0.0, 0.0])


def test_what_rounding_took_is_a_share_of_the_variance(tmp_path: Path) -> None:
    """Of the training rows of all segments; unknown where one of them did not measure it."""
    rows = known_rows(0, 500, 8) + 100.0
    location, index = Location.open(str(tmp_path)), np.zeros(250, np.int32)

    def write(number: int, squared_errors: dict[str, float] | None) -> SegmentCommit:
        writer = writing.SegmentWriter(
            location, split="segments", index=number, attempt=1, hooks={"h": 8}, dtype="float32",
            contexts=np.zeros((1, 4), np.int32), tokens=index, positions=index, context_ids=index, n_tokens=4,
        )  # fmt: skip
        writer.append({"h": rows[250 * number :][:250]}, squared_errors)
        return writer.commit()

    commits = [write(0, {"h": 3.0}), write(1, {"h": 5.0})]
    variance = ((rows.astype(float) - rows.astype(float).mean(0)) ** 2).sum()
    assert writing.summarise(commits)["h"].rounding_error == pytest.approx(8.0 / variance, rel=1e-6)
    location.delete()
    assert writing.summarise([write(0, {"h": 3.0}), write(1, None)])["h"].rounding_error is None


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 3e38, np.inf, -np.inf, 0.0], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, -2.5, 3e38, np.inf, -np.inf, 0.0])
    np.testing.assert_allclose(float32_from_bfloat16(bfloat16_from_float32(values)), expected, rtol=4e-3)
    assert np.isnan(float32_from_bfloat16(bfloat16_from_float32(np.array([np.nan], np.float32))))[0]
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[~np.isnan(float32_from_bfloat16(bits))]
    np.testing.assert_array_equal(bfloat16_from_float32(float32_from_bfloat16(bits)), bits)


def test_an_unsealed_store_is_not_found(tmp_path: Path) -> None:
    write_segment(Location.open(str(tmp_path)), "segments", 0, first=0, n_rows=10)
    with pytest.raises(NotFound) as caught:
        ActivationStore.open(Location.open(str(tmp_path)))
    assert caught.value.code == "store_not_sealed"


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_every_damaged_file_is_detected(tmp_path: Path, damage: str) -> None:
    make_counted_store(tmp_path / "whole", sizes=(600, 300))
    n_damaged = 0
    for path in files_of(tmp_path / "whole"):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        target = copy / path.relative_to(tmp_path / "whole")
        data = bytearray(target.read_bytes())
        if damage == "delete":
            target.unlink()
        elif damage == "truncate":
            target.write_bytes(data[:-1])
        else:
            data[len(data) // 2] ^= 1
            target.write_bytes(data)
        with pytest.raises((CorruptArtifact, NotFound)):
            store = ActivationStore.open(Location.open(str(copy)))
            if damage != "flip":
                store.check_quick()
            for error in store.damages():
                raise error
        shutil.rmtree(copy)
        n_damaged += 1
    assert n_damaged > 30


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_quick_check_sees_lost_bytes(tmp_path: Path, damage: str) -> None:
    store = make_counted_store(tmp_path, sizes=(600,))
    chunk = next(path for path in files_of(tmp_path) if "segments" in str(path) and "layers.1/c" in str(path))
    if damage == "delete":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(CorruptArtifact, match=r"layers\.1"):
        store.check_quick()
    with pytest.raises(CorruptArtifact):
        store.read_rows("layers.1", store.manifest.segments[0], 0, 600)


def test_swapped_segments_are_detected(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path, sizes=(300, 300))
    one, two = (tmp_path / segment.path for segment in store.manifest.split("segments"))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    assert len(list(store.damages())) > 0


def test_swapped_commits_are_detected(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path, sizes=(300, 300))
    one, two = tmp_path / "segments" / "part-00000.json", tmp_path / "segments" / "part-00001.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CorruptArtifact):
        store.check_quick()


def test_an_edited_manifest_is_detected(tmp_path: Path) -> None:
    make_counted_store(tmp_path, sizes=(300,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["n_rows"] = 299
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifact, match="changed"):
        ActivationStore.open(Location.open(str(tmp_path)))


def test_every_damage_is_told_and_not_the_first_alone(tmp_path: Path) -> None:
    store = make_counted_store(tmp_path, sizes=(300, 300, 300))
    chunks = [path for path in files_of(tmp_path) if "layers.1/c" in str(path) and "segments" in str(path)]
    chunks[0].write_bytes(bytes(chunks[0].stat().st_size))
    chunks[1].unlink()
    (tmp_path / "segments/part-00002.json").write_text("{}")
    told = [error.message for error in store.damages()]
    assert len(told) == 3
    for message, words in zip(told, ("other bytes", "is missing", "not the commit that was sealed"), strict=True):
        assert words in message


def test_the_first_attempt_to_commit_wins(tmp_path: Path) -> None:
    location = Location.open(str(tmp_path))
    first = write_segment(location, "segments", 0, first=0, n_rows=20, attempt=1)
    second = write_segment(location, "segments", 0, first=0, n_rows=20, attempt=2)
    assert second == first == load_commit(location, "segments", 0)
    assert location.child("segments").list() == ["part-00000.a0001.zarr", "part-00000.json"]


def test_sealing_twice_returns_the_first_seal(tmp_path: Path) -> None:
    location = Location.open(str(tmp_path))
    commits = [write_segment(location, "segments", 0, first=0, n_rows=20)]
    first = seal_store(location, commits)
    assert seal_store(location, [*commits, write_segment(location, "segments", 1, first=20, n_rows=5)]).manifest == (
        first.manifest
    )


def test_leftovers_of_lost_attempts_are_removed(tmp_path: Path) -> None:
    location = Location.open(str(tmp_path))
    commits = [write_segment(location, "segments", 0, first=0, n_rows=20, attempt=2)]
    location.child("segments/part-00000.a0001.zarr/zarr.json").write_bytes(b"{}")
    location.child("held_out/part-00000.a0002.zarr/zarr.json").write_bytes(b"{}")
    for place in leftovers(location, {commit.path for commit in commits}):
        place.delete()
    assert list(seal_store(location, commits).damages()) == []
    assert location.child("segments").list() == ["part-00000.a0002.zarr", "part-00000.json"]
    assert location.child("held_out").list() == []


def test_a_segment_without_rows(tmp_path: Path) -> None:
    location = Location.open(str(tmp_path))
    commits = [write_segment(location, "segments", index, first=0, n_rows=n) for index, n in enumerate((0, 5))]
    store = seal_store(location, commits)
    assert list(store.damages()) == []
    assert store.read_rows("layers.0", store.manifest.segments[0], 0, 0).shape == (0, 8)


def test_too_few_rows_are_not_committed(tmp_path: Path) -> None:
    index = np.zeros(5, np.int32)
    writer = writing.SegmentWriter(
        Location.open(str(tmp_path)), split="segments", index=0, attempt=1, hooks={"h": 2}, dtype="float32",
        contexts=np.zeros((1, 5), np.int32), tokens=index, positions=index, context_ids=index, n_tokens=5,
    )  # fmt: skip
    writer.append({"h": np.zeros((4, 2), np.float32)})
    with pytest.raises(ValueError, match="4 rows were written of 5"):
        writer.commit()


def test_every_damaged_file_that_is_read_is_detected_by_its_reader(tmp_path: Path) -> None:
    """Missing, short, long, or other bytes: before a row of it is given out, whoever reads and whatever was read."""
    make_counted_store(tmp_path / "whole", sizes=(600, 300))
    n_damaged = n_whole = 0
    n_files = len(files_of(tmp_path / "whole"))
    for number, path in enumerate(files_of(tmp_path / "whole") * 4):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        target = copy / path.relative_to(tmp_path / "whole")
        data = bytearray(target.read_bytes())
        data[number * 7919 % len(data)] ^= 1 << number % 8
        damaged = [None, bytes(data[:-1]), target.read_bytes() + b"x", bytes(data)][number // n_files]
        if damaged is None:
            target.unlink()
        else:
            target.write_bytes(damaged)
        if target.name == "zarr.json":
            n_whole += read_all(copy)  # what nobody reads harms nobody; `damages` finds it
        else:
            with pytest.raises((CorruptArtifact, NotFound)):
                read_all(copy)
            n_damaged += 1
        shutil.rmtree(copy)
    assert n_damaged > 80
    assert n_whole > 20


def read_all(folder: Path) -> bool:
    """Read every row and column of a store."""
    store = ActivationStore.open(Location.open(str(folder)))
    for segment in store.manifest.segments:
        for hook_name in HOOKS:
            store.read_rows(hook_name, segment, 0, segment.n_rows)
        for column in ("tokens", "positions", "context_ids"):
            store.column(segment, column)
        store.contexts(segment)
    return True


def test_a_file_is_compared_once_and_by_whoever_reads_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_counted_store(tmp_path)
    store = ActivationStore.open(Location.open(str(tmp_path)))
    n_compared = Counter[int]()

    def counted(data: bytes) -> str:
        n_compared[len(data)] += 1
        return digest_of(data)

    monkeypatch.setattr(activations, "digest_of", counted)
    segment = store.manifest.split("segments")[0]
    for _ in range(3):
        store.read_rows("layers.0", segment, 0, segment.n_rows)
    assert sorted(n_compared.values()) == [1, 1], "the commit, and the one chunk"


def test_a_store_of_many_segments_holds_the_digests_of_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MOST_SEGMENTS", 2)
    make_counted_store(tmp_path)
    store = ActivationStore.open(Location.open(str(tmp_path)))
    segments = store.manifest.split("segments")

    def read(number: int) -> None:
        segment = segments[number % len(segments)]
        rows = store.read_rows("layers.0", segment, 0, segment.n_rows)
        first = sum(before.n_rows for before in segments[: number % len(segments)])
        np.testing.assert_array_equal(rows, known_rows(first, segment.n_rows, 8))

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(read, range(60)))
    assert len(segments) > 2 >= len(store._files._wanted)
    for segment in (segments[0], segments[1], segments[0], segments[2]):
        store.read_rows("layers.0", segment, 0, 1)
    assert list(store._files._wanted) == [segments[0].path, segments[2].path], "those used last"
