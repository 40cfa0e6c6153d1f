"""Hub models over HTTP: pinned to a commit and described without their weights, or refused with a reason.

The hub itself cannot be reached from a test, so a small server on loopback speaks the part of its protocol that
huggingface_hub needs.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from gnomon.errors import InvalidRequest, Unavailable
from gnomon.specs import ModelSource
from gnomon_workers.models.catalog import describe_model
from tests.support.models import make_glassllm

COMMIT = "b" * 40


class Hub(BaseHTTPRequestHandler):
    """One model, org/name, with a branch main; and what the hub says of others."""

    folder: ClassVar[Path]
    served: ClassVar[list[tuple[str, int]]]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/org/(\w+)(?:/revision/(\w+))?", path):
            self._send_model(match[1], match[2] or "main")
        elif match := re.fullmatch(rf"/org/(\w+)/resolve/{COMMIT}/(.+)", path):
            self._send_file(match[1], match[2], with_body=with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _send_model(self, name: str, revision: str) -> None:
        if name == "gated":
            self._refuse(403, "GatedRepo")
        elif name not in ("name", "pickled"):
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            self._send(200, json.dumps({"id": f"org/{name}", "sha": COMMIT, "siblings": []}).encode())

    def _send_file(self, model: str, name: str, *, with_body: bool) -> None:
        path = self.folder / name
        if not path.is_file() or (model == "pickled" and name.endswith(".safetensors")):
            self._refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        if match := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = data[int(match[1]) : int(match[2]) + 1]
        if with_body:
            self.served.append((name, len(data)))
        self._send(206 if match else 200, data, with_body=with_body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"ETag": '"e"', "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The hub, and an empty cache."""
    Hub.folder, Hub.served = make_glassllm(tmp_path / "model"), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_is_pinned_and_described_without_its_weights(hub: type[Hub], revision: str | None) -> None:
    found = describe_model(ModelSource(source="org/name", revision=revision), [])
    assert (found.kind, found.revision, found.fingerprint()) == ("hub", COMMIT, COMMIT)
    assert (found.n_layers, found.n_parameters) == (4, 852_608)
    assert found.hooks["model.layers.3"] == 128
    n_weights = (hub.folder / "model.safetensors").stat().st_size
    assert 0 < sum(n_bytes for name, n_bytes in hub.served if name == "model.safetensors") < n_weights / 10


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("org/absent", None, "the hub has no model 'org/absent'"),
        ("org/name", "nothere", "the hub has no revision 'nothere'"),
        ("org/gated", None, "is gated"),
        ("org/pickled", None, "has no safetensors"),
        ("a--b/c", None, "is not the name of a model"),
    ],
)
def test_models_that_cannot_be_had_are_refused(hub: type[Hub], source: str, revision: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        describe_model(ModelSource(source=source, revision=revision), [])
    assert caught.value.code == "unknown_model"
    assert says in caught.value.message


def test_a_hub_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, and a name that nobody knows: neither is an OSError to the hub's client."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for endpoint in (f"http://127.0.0.1:{closed.getsockname()[1]}", "http://hub.invalid"):
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
            with pytest.raises(Unavailable, match="the hub does not answer") as error:
                describe_model(ModelSource(source="nobody/nothing"), ())
            assert error.value.code == "hub_unreachable"
