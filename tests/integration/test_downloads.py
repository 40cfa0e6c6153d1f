"""Downloads over real connections that break: they go on, and what is not what was published is refused."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gnomon.async_client import AsyncClient
from gnomon.client import Client
from gnomon.errors import CorruptArtifact, Unavailable
from gnomon.loading import cache_folder, fetch
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import MANIFEST, publish
from tests.support.proxy import Proxy
from tests.support.service_api import Service, expect_problem, running_service
from tests.support.service_jobs import DICTIONARY_RECORD, stored, train_spec
from tests.support.serving import serving
from tests.support.waiting import wait_until

WEIGHTS = "sae_weights.safetensors"
FILES = {
    "cfg.json": b'{"d_in": 16}',
    WEIGHTS: np.random.default_rng(0).integers(0, 256, 9 << 20, dtype=np.uint8).tobytes(),
    "empty.json": b"",
}
N_BYTES = sum(map(len, FILES.values()))
PIECE = 3 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A dictionary on a service that is reached through a proxy."""

    service: Service
    proxy: Proxy
    dictionary_id: str
    folder: Path
    """Where its files lie on the server."""

    def client(self) -> Client:
        return Client(self.proxy.url, self.service.key, timeout_s=20.0)

    def download(self, out: Path) -> Path:
        with self.client() as client:
            return client.dictionary(self.dictionary_id).download(out)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with running_service(tmp_path / "home") as service, serving(service.app) as url, Proxy(url) as proxy:
        bench = service.bench
        bench.seal(store=7)
        bench.submit(train_spec(activations=stored(7)), store=7)
        held = bench.claim()
        assert held.dictionary_id is not None
        url = f"{service.settings.project_root}/default/dictionaries/{held.dictionary_id}/attempt-0001"
        local = tmp_path / "local"
        local.mkdir()
        for name, content in FILES.items():
            (local / name).write_bytes(content)
        record = publish(Location.open(url), local, DICTIONARY_RECORD)
        bench.leases.succeed(held.lease, {"records": [record]})
        folder = Path(url.removeprefix("file://"))
        yield Published(service=service, proxy=proxy, dictionary_id=held.dictionary_id, folder=folder)


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, also what is hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def begin_and_kill(published: Published, out: Path) -> Path:
    """A download by a process that is killed under way; returns what it leaves."""
    code = "import sys, gnomon; gnomon.Client(sys.argv[1], sys.argv[2]).dictionary(sys.argv[3]).download(sys.argv[4])"
    arguments = [published.proxy.url, published.service.key, published.dictionary_id, str(out)]
    with published.proxy.sticking(PIECE):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments])

        def partial() -> Path | None:
            assert process.poll() is None
            found = [path for path in out.glob(f".{WEIGHTS}.*.partial") if path.stat().st_size > PIECE // 2]
            return found[0] if found else None

        left = wait_until(partial, "half of a file")
        process.send_signal(signal.SIGKILL)
        process.wait()
    return left


# ---------------------------------------------------------------------------------------------- the service


def test_a_part_of_a_file_is_given_with_its_digest(published: Published) -> None:
    path = f"/v1/dictionaries/{published.dictionary_id}/files/{WEIGHTS}"
    content, client = FILES[WEIGHTS], published.service.client()
    tag = f'"{hashlib.blake2b(content, digest_size=32).hexdigest()}"'
    whole = client.get(path)
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, content, tag)
    assert whole.headers["accept-ranges"] == "bytes"

    start = 5 * 2**20 + 3  # across the server's own pieces
    part = client.get(path, headers={"Range": f"bytes={start}-", "If-Range": tag})
    assert (part.status_code, part.content, part.headers["etag"]) == (206, content[start:], tag)
    assert part.headers["content-range"] == f"bytes {start}-{len(content) - 1}/{len(content)}"
    assert part.headers["repr-digest"] == whole.headers["repr-digest"]

    anew = client.get(path, headers={"Range": "bytes=5-", "If-Range": '"other"'})
    assert (anew.status_code, anew.content) == (200, content)
    known = client.get(path, headers={"If-None-Match": tag})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", tag)
    beyond = client.get(path, headers={"Range": f"bytes={len(content)}-"})
    expect_problem(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(content)}"


# ---------------------------------------------------------------------------------------------- the SDK


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_connection_that_breaks_again_and_again_costs_no_byte_twice(
    published: Published, tmp_path: Path, kind: str
) -> None:
    async def awaited() -> Path:
        async with AsyncClient(published.proxy.url, published.service.key) as client:
            return await (await client.dictionary(published.dictionary_id)).download(tmp_path / "out")

    with published.proxy.cutting(PIECE):
        folder = published.download(tmp_path / "out") if kind == "blocking" else asyncio.run(awaited())
    assert content_of(folder) == FILES
    # what was under way when a connection was cut is lost
    assert published.proxy.n_bytes_back < N_BYTES + N_BYTES // 4


def test_a_killed_download_is_gone_on_with_by_the_next(published: Published, tmp_path: Path) -> None:
    left = begin_and_kill(published, tmp_path / "out")
    had = left.stat().st_size
    before = published.proxy.n_bytes_back
    assert content_of(published.download(tmp_path / "out")) == FILES
    assert published.proxy.n_bytes_back - before < N_BYTES - had + (64 << 10)


def test_a_download_that_is_given_up_is_gone_on_with_and_files_that_are_there_stay(
    published: Published, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with published.client() as client:
        dictionary = client.dictionary(published.dictionary_id)
        with published.proxy.away(), pytest.raises(Unavailable):
            dictionary.download(out)
        assert content_of(out) == {}
        dictionary.download(out)
        before = published.proxy.n_bytes_back
        (out / "cfg.json").write_bytes(b'{"d_in": 17}')  # of the same length
        dictionary.download(out)
    assert content_of(out) == FILES
    assert published.proxy.n_bytes_back - before < 64 << 10


def test_a_file_of_which_a_byte_is_damaged_is_refused_and_not_kept(published: Published, tmp_path: Path) -> None:
    damaged = bytearray(FILES[WEIGHTS])
    damaged[6 << 20] ^= 1
    (published.folder / WEIGHTS).write_bytes(damaged)
    with published.proxy.cutting(PIECE), pytest.raises(CorruptArtifact, match=f"{WEIGHTS}.*is not what was published"):
        published.download(tmp_path / "out")
    assert content_of(tmp_path / "out") == {"empty.json": b""}


def test_what_was_damaged_between_two_downloads_is_refused_and_then_fetched_anew(
    published: Published, tmp_path: Path
) -> None:
    left = begin_and_kill(published, tmp_path / "out")
    damaged = bytearray(left.read_bytes())
    damaged[1000] ^= 1
    left.write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match="download again"):
        published.download(tmp_path / "out")
    assert content_of(published.download(tmp_path / "out")) == FILES


def test_a_file_that_was_replaced_meanwhile_begins_anew(published: Published, tmp_path: Path) -> None:
    begin_and_kill(published, tmp_path / "out")
    other = FILES[WEIGHTS][::-1]
    manifest = Location.open(str(published.folder)).child(MANIFEST)
    (published.folder / WEIGHTS).write_bytes(other)
    fields = manifest.read_json()
    fields["blake2b"][WEIGHTS] = hashlib.blake2b(other, digest_size=32).hexdigest()
    manifest.write_json(fields)
    assert content_of(published.download(tmp_path / "out")) == {**FILES, WEIGHTS: other}


def test_a_dictionary_without_digests_is_checked_by_its_sizes(published: Published, tmp_path: Path) -> None:
    (published.folder / MANIFEST).unlink()
    assert content_of(published.download(tmp_path / "out")) == FILES


# ---------------------------------------------------------------------------------------------- the cache


def test_of_several_that_load_at_once_one_downloads(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))

    def load(_: int) -> Path:
        with published.client() as client:
            return fetch(published.dictionary_id, client)

    with ThreadPoolExecutor(max_workers=4) as pool:
        folders = set(pool.map(load, range(4)))
    assert folders == {cache_folder() / published.dictionary_id}
    assert content_of(folders.pop()) == FILES
    assert [path.name for path in cache_folder().iterdir()] == [published.dictionary_id]
    assert published.proxy.n_bytes_back < N_BYTES + (64 << 10)


def test_the_cache_goes_on_with_what_a_killed_process_left(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    begin_and_kill(published, cache_folder() / f".{published.dictionary_id}.part")
    before = published.proxy.n_bytes_back
    with published.client() as client:
        assert content_of(fetch(published.dictionary_id, client)) == FILES
    assert published.proxy.n_bytes_back - before < N_BYTES - PIECE // 2
    assert [path.name for path in cache_folder().iterdir()] == [published.dictionary_id]
