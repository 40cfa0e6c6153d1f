"""A real S3 server on loopback: SeaweedFS, started once for the tests that need object storage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ACCESS_KEY = "gnomon-test"
SECRET_KEY = "gnomon-test-secret"
START_S = 60.0


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server whose data lies in folder; yields the environment that reaches it."""
    config = folder / "s3.json"
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = _free_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-volume.max=50", "-filer",
        f"-filer.port={filer}", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={config}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
    ]  # fmt: skip
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            endpoint = f"http://127.0.0.1:{s3}"
            _wait_until_up(server, endpoint)
            yield {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            }
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=10)
            server.kill()
            server.wait()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def new_place() -> str:
    """A place of its own in the one bucket, which the server makes at the first write.

    One bucket, because SeaweedFS sets several volumes aside for each and has only so many.
    """
    return f"s3://gnomon-test/{uuid.uuid4().hex[:12]}/store"


def _free_ports(n_ports: int) -> list[int]:
    """Ports that are free now, and free again at +10,000, where SeaweedFS puts its gRPC servers."""
    ports: list[int] = []
    while len(ports) < n_ports:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port > 55_000 or port in ports:
                continue
            with suppress(OSError):
                high.bind(("127.0.0.1", port + 10_000))
                ports.append(port)
    return ports


def _wait_until_up(server: subprocess.Popen[bytes], endpoint: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"weed ended with {server.returncode}; see its log")
        try:
            urllib.request.urlopen(endpoint, timeout=1)
        except urllib.error.HTTPError as answer:
            answer.close()
            return  # it answers, if only with 403
        except OSError:
            time.sleep(0.1)
            continue
        return
    raise TimeoutError(f"the S3 server did not answer within {START_S} s")
