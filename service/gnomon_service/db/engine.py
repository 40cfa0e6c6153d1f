"""Connections and transactions, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Float, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from gnomon.errors import GnomonError, Unavailable

_CURSORS = "gnomon_cursors"
"""Where a connection keeps the cursors of a transaction."""
_STATEMENT_TIMEOUT_MS = 60_000
"""Of PostgreSQL, but for migrations."""
_STANDSTILL_S = 10.0


class database_now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock in seconds since 1970; leases know no other, so hosts' clocks may differ."""

    type = Float()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _now_on_sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _now_on_postgresql(*_: Any, **__: Any) -> str:
    # Not now(): that is when the transaction began, which may have waited for a lock since.
    return "(extract(epoch from clock_timestamp())::double precision)"


class Database:
    """One database by URL; safe to use from several threads."""

    def __init__(self, url: str, *, busy_timeout_s: float = 10.0, standstill_s: float = _STANDSTILL_S) -> None:
        """busy_timeout_s: how long a writer waits for another one on SQLite.

        standstill_s: PostgreSQL ends a transaction whose process has asked nothing for so long.
        """
        self._engine = _make_engine(url, busy_timeout_s, standstill_s)

    @property
    def url(self) -> str:
        """Where it is, with its password."""
        return self._engine.url.render_as_string(hide_password=False)

    @property
    def dialect(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; commits at the end. Raises Unavailable if there is no answer."""
        with _mapped_errors(), self._engine.begin() as connection, _left_clean(connection):
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and waits for no writer. Raises Unavailable like write()."""
        with _mapped_errors(), self._engine.connect() as connection, _left_clean(connection):
            yield connection.execution_options(gnomon_read_only=True)

    def migrate(self) -> None:
        """Bring the schema up to date; processes that start together wait for each other.

        Raises Conflict, code "database_newer", if a later release made the schema; Unavailable, code "database_in_use",
        if another process holds the database all the while.
        """
        from gnomon_service.db.upgrading import upgrade  # what brings alembic, which nothing else needs

        upgrade(self)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def upsert(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Give a row values, and make it where it is not there: also where another makes it in the same moment."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = make(table).values({**key, **values})
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=dict(values)))


@contextmanager
def _left_clean(connection: Connection) -> Iterator[None]:
    """Close every cursor, whatever is raised, before the connection goes back to its pool.

    One that is half read (an error's traceback may hold it for ever) keeps SQLite in the snapshot in which it began:
    every later write of the connection fails. After an error of unknown kind the connection is not used again.
    """
    try:
        yield
    except (GnomonError, DBAPIError):
        _close_cursors(connection)
        raise
    except BaseException:
        _close_cursors(connection)
        connection.invalidate()
        raise
    _close_cursors(connection)


def _remember_cursor(connection: Connection, cursor: Any, *_: Any) -> None:
    connection.info.setdefault(_CURSORS, []).append(cursor)


def _close_cursors(connection: Connection) -> None:
    if connection.invalidated:
        return  # its cursors went with it
    for cursor in connection.info.pop(_CURSORS, ()):
        cursor.close()


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise Unavailable("the database does not answer; try again shortly", code="database_unavailable") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("the connection to the database broke; try again", code="database_unavailable") from error
        raise


def _make_engine(url: str, busy_timeout_s: float, standstill_s: float) -> Engine:
    engine = _connect(url, busy_timeout_s, standstill_s)
    event.listen(engine, "before_cursor_execute", _remember_cursor)
    return engine


def _connect(url: str, busy_timeout_s: float, standstill_s: float) -> Engine:
    parsed = make_url(url)
    if parsed.drivername.startswith("postgresql"):
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=20,
            connect_args={"connect_timeout": 5, "options": _limits(standstill_s)},
        )
        event.listen(engine, "do_executemany", _one_by_one)
        return engine
    engine = create_engine(parsed, connect_args={"timeout": busy_timeout_s}, pool_size=10, max_overflow=20)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _limits(standstill_s: float) -> str:
    """A statement that hangs would hold its thread, and a process that stands still in a transaction its locks: those
    that every other dispatcher waits for.
    """
    limits = {
        "statement_timeout": _STATEMENT_TIMEOUT_MS,
        "idle_in_transaction_session_timeout": round(standstill_s * 1000),
    }
    return " ".join(f"-c {name}={value}" for name, value in limits.items())


def _one_by_one(cursor: Any, statement: str, parameters: Sequence[Any], _: Any) -> bool:
    """Execute a statement for many rows, each with an answer of its own.

    The driver would send them all and ask for one answer at the end. PostgreSQL counts no time in between, neither as a
    statement's nor as standing still: a process that is stopped there would keep its locks for as long as it is.
    """
    for each in parameters:
        cursor.execute(statement, each)
    return True


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions late, and commit behind our back
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the write lock first: a transaction that reads, then writes can never fail in between.
    read_only = connection.get_execution_options().get("gnomon_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
