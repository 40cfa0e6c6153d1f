"""Locations: what is refused, and that nothing outside a root is reached."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gnomon.errors import InvalidRequest, NotFound, StoreUnavailable
from gnomon_storage.backends import mapped_errors
from gnomon_storage.location import Location, resolve_input

FORBIDDEN = [
    "/data/../etc/passwd", "/data/./x", "/data//x", "../x", "x", "~/x", "", "/data/%2e%2e/x", "/data/%2F..",
    "/data/%00", "//host/data/x",
    "file:///data/../../etc", "file://host/data", "file:/data/x", "file:x", "FILE:x", "simplecache::file:///data/x",
    "zip://x::/data/y", "http://169.254.169.254/latest", "https://example.org/x", "gopher://x", "ssh://h/x", "git://h/x",
    "reference://x", "memory://x", "local:///data/x", "//host/data/x", "\\\\host\\share", "/data\\..\\x", "/data/\x00x",
    "/data/x\n", "s3://", "s3:///x", "s3://UPPER/x", "s3://bucket/../x", "s3://b/x", "s3://user:pw@bucket/x",
    "s3://bucket/a//b", "s3a://bucket/x", "javascript:alert(1)", "/data/\x1b[31m", "/data/\ud800",
]  # fmt: skip


@pytest.mark.parametrize("url", FORBIDDEN)
def test_forbidden_forms_are_refused(url: str, tmp_path: Path) -> None:
    for opened in (Location.open, lambda text: resolve_input(text, [str(tmp_path)])):
        with pytest.raises(InvalidRequest) as caught:
            opened(url)
        assert caught.value.code == "location_not_allowed"


def test_a_name_too_long_to_exist_is_absent(tmp_path: Path) -> None:
    place = resolve_input(f"{tmp_path}/{'x' * 500}", [str(tmp_path)])
    assert not place.is_file()
    assert not place.exists()
    with pytest.raises(NotFound):
        place.read_bytes()


def test_schemes_can_be_narrowed() -> None:
    with pytest.raises(InvalidRequest, match="scheme 's3'"):
        Location.open("s3://bucket/x", schemes=("file",))


def test_plain_paths_and_urls_are_the_same_place(tmp_path: Path) -> None:
    assert Location.open(str(tmp_path)) == Location.open(f"file://{tmp_path}") == Location.open(f"{tmp_path}/")
    assert Location.open(str(tmp_path)).child("a", "b/c").url == f"file://{tmp_path}/a/b/c"
    assert Location.open("s3://bucket/p").child("x").url == "s3://bucket/p/x"
    assert Location.open("s3://bucket").child("x").url == "s3://bucket/x"
    assert Location.open("s3://bucket").child("x").name == "x"


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "root" / "file").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "folder").symlink_to(tmp_path)
    root = Location.open(str(tmp_path / "root"))
    for place in (root.child("file"), root.child("folder", "secret"), root.child("folder")):
        for use in (place.read_bytes, place.list, place.walk, place.delete, place.size, place.exists):
            with pytest.raises(InvalidRequest) as caught:
                use()
            assert caught.value.code == "location_not_allowed"
        with pytest.raises(InvalidRequest):
            place.write_bytes(b"x")
    assert root.walk() == {}
    root.delete()
    assert (tmp_path / "secret").read_text() == "s"


def test_input_must_lie_under_a_root_once_links_are_resolved(tmp_path: Path) -> None:
    root, outside = tmp_path / "in", tmp_path / "in-not"
    root.mkdir()
    outside.mkdir()
    (root / "x.txt").write_text("x")
    (outside / "y.txt").write_text("y")
    (root / "link").symlink_to(outside)
    (tmp_path / "way-in").symlink_to(root)
    assert resolve_input(str(root / "x.txt"), [str(root)]).read_bytes() == b"x"
    assert resolve_input(str(tmp_path / "way-in" / "x.txt"), [f"file://{root}"]).read_bytes() == b"x"
    assert resolve_input(str(root / "x.txt"), [str(tmp_path / "way-in")]).read_bytes() == b"x"
    for bad in (outside / "y.txt", root / "link" / "y.txt", Path("/etc/passwd"), outside / "absent"):
        with pytest.raises(InvalidRequest) as caught:
            resolve_input(str(bad), [str(root), "s3://bucket/in"])
        assert caught.value.code == "location_not_allowed"
        assert str(root) in caught.value.message


def test_input_on_an_object_store_must_lie_under_a_root() -> None:
    assert resolve_input("s3://bucket/in/x", ["s3://bucket/in"]).path == "in/x"
    assert resolve_input("s3://bucket/in/x", ["s3://bucket"]).path == "in/x"
    for bad in ("s3://bucket/in-not/x", "s3://other-bucket/in/x", "/in/x"):
        with pytest.raises(InvalidRequest):
            resolve_input(bad, ["s3://bucket/in"])
    with pytest.raises(InvalidRequest, match="none"):
        resolve_input("/x", [])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.open(str(tmp_path)).child("x")
    place.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable) as caught:
        place.write_bytes(b"new")
    assert caught.value.code == "store_full"
    with pytest.raises(StoreUnavailable):
        place.child("y").create_bytes(b"new")
    assert place.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_every_os_error_becomes_one_of_ours() -> None:
    codes = {errno.EDQUOT: "store_full", errno.EIO: "store_unavailable", errno.EROFS: "store_unavailable"}
    for number, code in codes.items():
        with pytest.raises(StoreUnavailable) as caught, mapped_errors("/x"):
            raise OSError(number, os.strerror(number))
        assert caught.value.code == code


@pytest.mark.parametrize(("said", "code"), [("NoSuchBucket", "no_bucket"), ("NoSuchUpload", "store_unavailable")])
def test_not_everything_that_an_object_store_does_not_find_is_an_absent_file(said: str, code: str) -> None:
    """A job would end with a file that is not there, where it should wait for its bucket, or put the file again."""
    with pytest.raises(StoreUnavailable) as caught, mapped_errors("bucket/x"):
        raise FileNotFoundError(f"Object at location x not found: 404 Not Found: <Error><Code>{said}</Code></Error>")
    assert caught.value.code == code
