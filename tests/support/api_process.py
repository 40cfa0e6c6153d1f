"""The API as a process of its own, as `gnomon api` starts it, on a service with real inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx2
import psutil

from gnomon_service.db.engine import Database
from gnomon_service.tenancy.keys import SCOPES, Keys
from gnomon_workers.runtime.ports import free_port
from tests.support.service_api import write_inputs
from tests.support.waiting import LIMIT_S, wait_until


@dataclass(slots=True, kw_only=True)
class ApiProcess:
    """One that begins, ends or is killed, and may begin again at the same address; a context manager that ends it."""

    home: Path
    database_url: str
    port: int
    key: str
    """Of the project "default"; it may do everything."""
    _process: subprocess.Popen[bytes] | None = None

    @classmethod
    def on(cls, database_url: str, home: Path) -> Self:
        """One of a database, which gets its schema and a key; it has not begun."""
        write_inputs(home / "inputs")
        database = Database(database_url)
        database.migrate()
        key = Keys(database).create(project="default", name="test", scopes=SCOPES).key
        database.close()
        return cls(home=home, database_url=database_url, port=free_port(), key=key)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def inputs(self) -> Path:
        """The folder of its model and text."""
        return self.home / "inputs"

    @property
    def process(self) -> psutil.Process:
        """The one that runs."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(LIMIT_S)

    def begin(self) -> None:
        """Start it, and wait until it answers."""
        environment = os.environ | {
            "GNOMON_HOME": str(self.home),
            "GNOMON_DATABASE_URL": self.database_url,
            "GNOMON_STORAGE_ROOT": (self.home / "store").as_uri(),
            "GNOMON_INPUT_ROOTS": str(self.inputs),
            "GNOMON_PORT": str(self.port),
            "GNOMON_REQUESTS_PER_S": "100000",
        }
        with (self.home / "api.log").open("ab") as log:
            command = [sys.executable, "-m", "gnomon_service", "api"]
            self._process = subprocess.Popen(command, env=environment, stderr=log)
        wait_until(self._answers, "the API's first answer", every_s=0.02)

    def kill(self) -> None:
        """End it as nothing can be prepared for, at once; what it began must end by itself."""
        process = self.process
        process.suspend()  # to see what it has begun takes longer than a request
        begun = process.children(recursive=True)
        process.kill()
        assert self._process is not None
        self._process.wait(LIMIT_S)
        _, left = psutil.wait_procs(begun, timeout=LIMIT_S)
        assert not left, f"left behind: {left}"

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "api.log").read_text()[-2000:]
        try:
            return httpx2.get(f"{self.url}/healthz").is_success
        except httpx2.TransportError:
            return False
