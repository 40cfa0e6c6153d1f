"""A real S3 server on loopback: SeaweedFS, started once for the tests that need object storage."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from gnomon_storage.location import _backend_for

ACCESS_KEY = "gnomon-test"
SECRET_KEY = "gnomon-test-secret"
START_S = 300.0
N_STARTS = 3


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server whose data lies in folder; yields the environment that reaches it."""
    config = folder / "s3.json"
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    with (folder / "weed.log").open("w+b") as log:
        server, endpoint = _started(folder, config, log)
        try:
            yield {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            }
            died = server.poll()
            assert died is None, f"weed ended by itself with {died}:\n{_tail(log)}"
        finally:
            _stop(server)


def _started(folder: Path, config: Path, log: BinaryIO) -> tuple[subprocess.Popen[bytes], str]:
    """A server that has stored an object, and its endpoint; tries again where another process took a port first."""
    for _ in range(N_STARTS):
        master, volume, filer, s3 = _free_ports(4)
        command = [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-volume.max=50", "-filer",
            f"-filer.port={filer}", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={config}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
        ]  # fmt: skip
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        endpoint = f"http://127.0.0.1:{s3}"
        if _serves(server, endpoint):
            return server, endpoint
        _stop(server)
    raise RuntimeError(f"weed did not start in {N_STARTS} attempts:\n{_tail(log)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(timeout=10)
    server.kill()
    server.wait()


def _tail(log: BinaryIO) -> str:
    log.seek(max(0, log.seek(0, 2) - 4000))
    return log.read().decode(errors="replace")


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while, and forget the connections that were made under others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        _backend_for.cache_clear()
        yield
    _backend_for.cache_clear()


def new_place() -> str:
    """A place of its own in the one bucket, which the server makes at the first write.

    One bucket, because SeaweedFS sets several volumes aside for each and has only so many.
    """
    return f"s3://gnomon-test/{uuid.uuid4().hex[:12]}/store"


def _free_ports(n_ports: int) -> list[int]:
    """Ports that are free now, and free again at +10,000, where SeaweedFS puts its gRPC servers.

    Below 32,768, where systems begin to hand out ports for outgoing connections: one of those, be it SeaweedFS' own,
    would else take a port between here and its use.
    """
    ports: list[int] = []
    while len(ports) < n_ports:
        port = random.SystemRandom().randrange(12_000, 22_000)
        with socket.socket() as low, socket.socket() as high, suppress(OSError):
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            if port not in ports:
                ports.append(port)
    return ports


def _serves(server: subprocess.Popen[bytes], endpoint: str) -> bool:
    """Wait until an object was stored; False where the server ended or START_S went by."""
    store = S3Store(
        "gnomon-test",
        endpoint=endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(BaseError):
            store.put("started", b"")
            return True
        time.sleep(0.2)
    return False
