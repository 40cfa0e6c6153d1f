"""Child processes of `gnomon up`: started, started again when they die, and swept away without a rest."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from gnomon_service.local.log_files import last_bytes, rotate

logger = logging.getLogger(__name__)

MARKER = "GNOMON_UP_ID"
"""Environment variable that every process of one `gnomon up` inherits."""
_LONGEST_PAUSE_S = 10.0
_HEALTHY_S = 20.0
_HOPELESS = 4


@dataclass(slots=True, kw_only=True)
class Child:
    """One process that should always run."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    """Where its output goes; appended to, and rotated (see `log_files`)."""
    needs: Child | None = None
    """When that one has died and was started again, this one is hung up on (SIGHUP), and started again too."""
    grace_s: float = 10.0
    """Time it has to end after SIGTERM."""
    _process: subprocess.Popen[bytes] | None = field(default=None)
    _started_at: float = 0.0
    _n_failures: int = 0

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id, once it was started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C in the terminal does not reach it."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                self.argv,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    @property
    def is_hopeless(self) -> bool:
        """Whether it has died soon after its start, time and again."""
        return self._n_failures >= _HOPELESS

    def pause_s(self) -> float:
        """How long to wait before it is started again: longer each time that it does not live long."""
        lived_s = time.monotonic() - self._started_at
        self._n_failures = 0 if lived_s > _HEALTHY_S else self._n_failures + 1
        return min(_LONGEST_PAUSE_S, 0.1 * 2.0**self._n_failures)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the process: a signal, and SIGKILL after the grace."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            logger.warning("child did not end in time; killed", extra={"child": self.name})
            self._process.kill()
            self._process.wait()

    def last_lines(self, n_bytes: int = 2000) -> str:
        """The end of its log."""
        return last_bytes(self.log, n_bytes).decode("utf-8", "replace")


class ChildProcesses:
    """Keeps children running until it is stopped."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def add(self, child: Child) -> None:
        """Start a child and keep it running."""
        child.start()
        self._children = [*self._children, child]
        if not self._thread.is_alive():
            self._thread.start()

    def hopeless(self) -> Child | None:
        """A child that does not stay up, if there is one."""
        return next((child for child in self._children if child.is_hopeless), None)

    def stop(self) -> None:
        """End all children, the last one started first."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        for child in reversed(self._children):
            child.stop()

    def _watch(self) -> None:
        while not self._stopped.wait(0.2):
            for child in self._children:
                self._rotate(child)
                if not child.is_alive and not self._stopped.is_set():
                    self._revive(child)

    def _rotate(self, child: Child) -> None:
        try:
            rotate(child.log)
        except OSError as error:  # a full disk, say: children must be watched all the same
            logger.warning("log not rotated", extra={"child": child.name, "reason": str(error)})

    def _revive(self, child: Child) -> None:
        pause_s = child.pause_s()
        logger.warning("child died; started again", extra={"child": child.name, "pause_s": pause_s})
        if self._stopped.wait(pause_s):
            return
        child.start()
        for other in self._children:
            if other.needs is child and other.is_alive:
                other.stop(signal.SIGHUP)  # and revived in the next round


def sweep(marker: str, folder: Path | None, *, grace_s: float = 3.0) -> int:
    """End every process of one `gnomon up`; returns how many were found.

    A process is known by the marker in its environment, or by a file that it holds open below `folder`: some of
    Ray's processes write over their environment to change their title.
    """
    n_found = 0
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        found = find_processes(marker, folder)
        if not found:
            break
        n_found += len(found)
        _signal_all(found, signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=grace_s)
        _signal_all(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=grace_s)
    return n_found


def find_processes(marker: str, folder: Path | None) -> list[psutil.Process]:
    """Living processes of one `gnomon up`, except the one that asks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _belongs(process, marker, folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or another user's
    return found


def _belongs(process: psutil.Process, marker: str, folder: Path | None) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    if process.environ().get(MARKER) == marker:
        return True
    return folder is not None and any(Path(file.path).is_relative_to(folder) for file in process.open_files())


def _signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def wait_for_address(address: str, stop: threading.Event) -> bool:
    """Wait until something listens at host:port; False if `stop` was set before."""
    host, _, port = address.rpartition(":")
    while not accepts_connections(host.strip("[]"), int(port)):
        if stop.wait(0.5):
            return False
    return True


def accepts_connections(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True
