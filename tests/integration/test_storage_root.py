"""What `gnomon up` says of an object store that it cannot use: at once, and before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gnomon.errors import StoreUnavailable
from gnomon_service import storage_root
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import Settings, load_settings
from gnomon_service.storage_root import check_within, is_full, make_storage_root
from tests.support.proxy import Proxy
from tests.support.seaweed import environment, new_place, s3_server


@pytest.fixture(scope="module")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("weed")) as values:
        yield values


@contextmanager
def settings_with(s3: dict[str, str], home: Path, **changes: str) -> Iterator[Settings]:
    root = new_place()
    with environment(s3 | changes):
        yield load_settings(home=home, storage_root=root, port=0)


def test_a_wrong_secret_is_named_before_anything_starts(s3_environment: dict[str, str], tmp_path: Path) -> None:
    with (
        settings_with(s3_environment, tmp_path, AWS_SECRET_ACCESS_KEY="wrong") as settings,
        pytest.raises(StoreUnavailable, match="AWS_SECRET_ACCESS_KEY") as caught,
        Embedded(settings),
    ):
        pass
    assert caught.value.code == "store_refused"
    assert not list((tmp_path / "logs").iterdir()), "a process was started"


def test_a_store_that_hangs_is_given_up_in_time(s3_environment: dict[str, str], tmp_path: Path) -> None:
    with Proxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:  # noqa: SIM117 - the proxy's address is needed
        with settings_with(s3_environment, tmp_path, AWS_ENDPOINT_URL=proxy.url) as settings, proxy.hanging():
            with pytest.raises(StoreUnavailable, match=r"has not answered for 0\.5 s; check GNOMON_STORAGE_ROOT"):
                check_within(settings, 0.5)
    with settings_with(s3_environment, tmp_path) as settings:
        check_within(settings, 600)


def test_a_full_disk_does_not_keep_a_service_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting what fills it takes a service."""
    monkeypatch.setattr(storage_root, "LEAST_FREE_BYTES", 1 << 62)
    settings = load_settings(home=tmp_path)
    make_storage_root(settings)
    assert is_full(settings)
    check_within(settings, 600)
