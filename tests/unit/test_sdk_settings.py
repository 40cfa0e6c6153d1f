"""The SDK finds its service, and never shows or sends a key where it should not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnomon._settings import resolve_settings
from gnomon.client import Client
from gnomon.errors import InvalidRequest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and no settings from outside."""
    for name in ("GNOMON_URL", "GNOMON_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    return tmp_path


def store(home: Path, content: object) -> None:
    """Write client.json."""
    (home / "client.json").write_text(json.dumps(content))


def test_without_any_setting_the_message_says_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match=r"GNOMON_URL.*gnomon up") as caught:
        Client()
    assert caught.value.code == "not_configured"


def test_file_then_environment_then_argument(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(home, {"url": "http://a:1", "key": "gnm_a"})
    assert (resolve_settings().url, resolve_settings().key) == ("http://a:1", "gnm_a")
    monkeypatch.setenv("GNOMON_URL", "http://b:2/")
    monkeypatch.setenv("GNOMON_API_KEY", "gnm_b")
    assert (resolve_settings().url, resolve_settings().key) == ("http://b:2", "gnm_b")
    settings = resolve_settings("https://c", "gnm_c")
    assert (settings.url, settings.key) == ("https://c", "gnm_c")


def test_stored_key_is_never_used_for_another_server(home: Path) -> None:
    store(home, {"url": "http://a:1", "key": "gnm_a"})
    assert resolve_settings("http://a:1/").key == "gnm_a"
    assert resolve_settings("http://evil:1").key is None


def test_key_is_not_shown() -> None:
    assert "gnm_secret" not in repr(resolve_settings("http://a:1", "gnm_secret"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "file:///etc/passwd"])
def test_url_of_something_else_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_settings(url)
    assert caught.value.code == "bad_url"


@pytest.mark.parametrize("key", ["gnm_a\nX-Evil: 1", "gnm a", "gnm_é"])
def test_key_that_cannot_be_a_header_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="copy it again"):
        resolve_settings("http://a:1", key)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_damaged_file_is_named(home: Path, content: str) -> None:
    (home / "client.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"client\.json"):
        resolve_settings()


@pytest.mark.parametrize(
    ("url", "is_loopback"),
    [("http://localhost:1", True), ("http://[::1]:1", True), ("http://10.0.0.1", False)],
)
def test_loopback_is_recognised(url: str, is_loopback: bool) -> None:
    assert resolve_settings(url, "k").is_loopback is is_loopback
