"""Downloaded dictionaries are whole or absent, and stay in their folder."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

import gnomon
from gnomon import errors
from gnomon.loading import cache_folder
from tests.support.dictionary_folders import D_SAE, make_folder
from tests.support.sdk_server import DICTIONARY_ID, Cut, Script, answer, client_of, dictionary


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def published(tmp_path: Path) -> dict[str, bytes]:
    """Files of a small dictionary."""
    folder = make_folder(tmp_path / "published", "topk")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def serving(files: dict[str, bytes]) -> Script:
    """A server that has these files, in the order a client asks for them."""
    names = sorted(files, key=lambda name: (name == "cfg.json", name))
    sizes = {name: len(content) for name, content in files.items()}
    return Script(answer(dictionary(files=sizes)), *[httpx2.Response(200, content=files[name]) for name in names])


def test_download_writes_all_files_and_the_config_last(tmp_path: Path, published: dict[str, bytes]) -> None:
    script = serving(published)
    folder = client_of(script).dictionary(DICTIONARY_ID).download(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published
    assert script.requests[-1].url.path.endswith("/files/cfg.json")


def test_short_file_is_an_error_and_leaves_nothing_that_loads(tmp_path: Path, published: dict[str, bytes]) -> None:
    script = serving(published)
    script._answers[1] = httpx2.Response(200, content=published["sae_weights.safetensors"][:-1])
    with pytest.raises(errors.CorruptArtifact, match="download again"):
        client_of(script).dictionary(DICTIONARY_ID).download(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_lost_connection_leaves_no_partial_file(tmp_path: Path, published: dict[str, bytes]) -> None:
    script = serving(published)
    script._answers[1] = httpx2.Response(200, stream=Cut(b"half", error=httpx2.ReadError("reset")))
    with pytest.raises(errors.Unavailable):
        client_of(script).dictionary(DICTIONARY_ID).download(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", ".bashrc", "a/b", "a\\b", "", "a\nb", "x" * 200])
def test_file_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    script = Script(answer(dictionary(files={name: 1})))
    with pytest.raises(errors.GnomonError, match="refused"):
        client_of(script).dictionary(DICTIONARY_ID).download(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_load_by_id_downloads_once(cache: Path, published: dict[str, bytes]) -> None:
    script = serving(published)
    with client_of(script) as client:
        assert gnomon.load(DICTIONARY_ID, client=client).cfg.d_sae == D_SAE
        assert gnomon.load(DICTIONARY_ID, client=client).cfg.d_sae == D_SAE
    assert script.is_over
    assert [path.name for path in cache.iterdir()] == [DICTIONARY_ID]


def test_failed_download_leaves_the_cache_empty(cache: Path, published: dict[str, bytes]) -> None:
    script = serving(published)
    script._answers[2] = httpx2.Response(200, content=b"{}")
    with pytest.raises(errors.CorruptArtifact):
        gnomon.load(DICTIONARY_ID, client=client_of(script))
    assert list(cache.iterdir()) == []
