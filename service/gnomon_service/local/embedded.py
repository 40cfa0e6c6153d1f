"""Everything on one machine: Ray, dispatcher and API as children of this process, on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import httpx2

from gnomon.errors import Conflict, Unauthenticated, Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.local.processes import MARKER, Child, ChildProcesses, accepts_connections, sweep
from gnomon_service.local.ray_head import HOST, LocalRay, without_ray
from gnomon_service.settings import Settings
from gnomon_service.storage_root import check_within, make_storage_root
from gnomon_service.tenancy.keys import DEFAULT_PROJECT, SCOPES, Keys
from gnomon_workers.runtime.ports import free_port

CLIENT_FILE = "client.json"
"""In the home folder: where the API is and a key for it, for the SDK and the CLI."""
_STATE_FILE = "up.json"
_LOCK_FILE = "up.lock"
_START_S = 300.0
_STORAGE_S = 20.0
"""Longest wait for a first word of the object store: a wrong address or key shows by then."""


class Embedded:
    """The whole service, from entering the context until leaving it.

    `url` and `key` open it. Leaving ends every process that entering began, Ray's included; jobs that still run
    go on when a service is started again in the same home. Entering raises Conflict where one is running there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = ""
        self.key = ""
        self._supervisor = ChildProcesses()
        self._marker = uuid.uuid4().hex
        self._ray: LocalRay | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.settings.make_folders()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.settings.home))
            stack.enter_context(_terminating())
            self._sweep_leftovers()
            stack.callback(self._stop)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # ------------------------------------------------------------------------------------------ start

    def _start(self) -> None:
        make_storage_root(self.settings)
        check_within(self.settings, _STORAGE_S)
        port = self._choose_port()
        self.url = f"http://{_reachable(self.settings.host)}:{port}"
        environment = without_ray(os.environ) | self._settings_environment(port) | {MARKER: self._marker}
        if self.settings.ray_address is None:
            self._ray = LocalRay.create()
        self._write_state()
        self.key = self._prepare_database()
        api = self._add("api", [sys.executable, "-m", "gnomon_service", "api"], environment)
        head = self._start_ray(environment)
        if self._ray is not None:
            environment |= self._ray.environment() | {"GNOMON_RAY_ADDRESS": self._ray.address}
        else:
            environment |= {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        argv = [sys.executable, "-m", "gnomon_service", "dispatcher"]
        if self._ray is not None:
            argv.append("--requeue")  # this Ray ends with us
        dispatcher = self._add("dispatcher", argv, environment, needs=head)
        self._wait_until(lambda: self._dispatcher_state() is not None, api)
        self._wait_until(lambda: self._dispatcher_state() == "ok", dispatcher)

    def _start_ray(self, environment: dict[str, str]) -> Child | None:
        """Start the head, where there is one to start; the dispatcher waits for it by itself."""
        if self._ray is None:
            return None
        return self._add("ray", self._ray.argv(self.settings), environment | self._ray.head_environment())

    def _add(self, name: str, argv: list[str], environment: dict[str, str], *, needs: Child | None = None) -> Child:
        log = self.settings.home / "logs" / f"{name}.log"
        child = Child(name=name, argv=argv, environment=dict(environment), log=log, needs=needs)
        self._supervisor.add(child)
        return child

    def _choose_port(self) -> int:
        host, port = self.settings.host, self.settings.port
        if port == 0:
            return free_port(host)
        if accepts_connections(_reachable(host), port):
            raise Conflict(
                f"port {port} is in use on {host}; choose another with --port or GNOMON_PORT", code="port_in_use"
            )
        return port

    def _settings_environment(self, port: int) -> dict[str, str]:
        """The settings as the children read them."""
        values = self.settings.model_copy(update={"port": port}).model_dump(mode="json")
        return {
            f"GNOMON_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
            if value is not None
        }

    def _prepare_database(self) -> str:
        """The key in the home folder, made anew where there is none or the database does not know it."""
        path = self.settings.home / CLIENT_FILE
        database = Database(self.settings.database_url)
        try:
            database.migrate()
            Observations(database).forget_dispatcher()
            keys = Keys(database)
            key = _read_key(path)
            try:
                keys.authenticate(key)
            except Unauthenticated:
                key = keys.create(project=DEFAULT_PROJECT, name="gnomon up", scopes=SCOPES).key
        finally:
            database.close()
        assert key is not None
        _write_private(path, {"url": self.url, "key": key})
        return key

    def _dispatcher_state(self) -> str | None:
        """What the API says of the dispatcher; None while the API is not ready itself."""
        try:
            answer = httpx2.get(f"{self.url}/readyz", timeout=2.0)
        except httpx2.TransportError:
            return None
        return str(answer.json()["dispatcher"]) if answer.status_code == 200 else None

    def _wait_until(self, is_done: Callable[[], bool], child: Child) -> None:
        deadline = time.monotonic() + _START_S
        while not is_done():
            failing = self._supervisor.hopeless()
            if failing is not None:
                raise Unavailable(
                    f"{failing.name} ends soon after every start; {failing.log} ends: {failing.last_lines()}",
                    code="start_failed",
                )
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{child.name} did not start within {_START_S:g} s; {child.log} ends: {child.last_lines()}",
                    code="start_failed",
                )
            time.sleep(0.1)

    # ------------------------------------------------------------------------------------------ stop

    def _stop(self) -> None:
        with _undisturbed():
            self._supervisor.stop()
            sweep(self._marker, None if self._ray is None else self._ray.folder)
            if self._ray is not None:
                shutil.rmtree(self._ray.folder, ignore_errors=True)
            (self.settings.home / _STATE_FILE).unlink(missing_ok=True)

    def _write_state(self) -> None:
        state = {"marker": self._marker, "ray_folder": None if self._ray is None else str(self._ray.folder)}
        _write_private(self.settings.home / _STATE_FILE, state)

    def _sweep_leftovers(self) -> None:
        """End what a service that was killed left behind; its jobs go on in this one."""
        try:
            state = json.loads((self.settings.home / _STATE_FILE).read_bytes())
            marker, folder = str(state["marker"]), state["ray_folder"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        ray_folder = Path(folder) if isinstance(folder, str) and Path(folder).name.startswith("gnomon-") else None
        sweep(marker, ray_folder)
        if ray_folder is not None:
            shutil.rmtree(ray_folder, ignore_errors=True)


def _reachable(host: str) -> str:
    return HOST if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - compared, not bound


def _read_key(path: Path) -> str | None:
    try:
        key = json.loads(path.read_bytes())["key"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def _write_private(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that only its owner can read, whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    partial.replace(path)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the home folder; the lock ends with the process, however it ends. Raises Conflict."""
    with (home / _LOCK_FILE).open("w") as file:
        _take(file, home)
        yield


def _take(file: IO[str], home: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(
            f"a service is running in {home} already; use it, stop it, or choose another home with GNOMON_HOME",
            code="already_running",
        ) from None


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM unwind this process like Ctrl-C; it would otherwise end without stopping the children."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore further signals to stop while stopping: a second Ctrl-C would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
