"""`gnomon up` as its own process: it starts everything, survives what dies, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from gnomon.errors import Unavailable
from gnomon_service.local.embedded import Embedded
from gnomon_service.local.processes import find_processes, sweep
from gnomon_service.local.ray_head import LocalRay
from gnomon_service.settings import load_settings
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.long


class Up:
    """One `gnomon up` in a home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process = self.spawn()
        try:
            wait_until(lambda: "stops everything" in self.output(), self.output)
        except BaseException:
            self.process.terminate()
            self.process.wait()
            raise
        state = json.loads((home / "up.json").read_text())
        self.marker, self.ray_folder = state["marker"], Path(state["ray_folder"])
        client = json.loads((home / "client.json").read_text())
        self.url, self.key = client["url"], client["key"]

    def spawn(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "gnomon_service", "up", "--home", str(self.home), "--port", "0", "--cpus", "1"]
        with (self.home / "up.log").open("ab") as log:
            return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_as_in_a_terminal)

    def output(self) -> str:
        return (self.home / "up.log").read_text()

    def get(self, path: str) -> httpx2.Response | None:
        try:
            return httpx2.get(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=LIMIT_S)
        except httpx2.TransportError:
            return None

    def child(self, name: str) -> psutil.Process:
        return next(
            process
            for process in find_processes(self.marker, None)
            if process.cmdline()[1:4] == ["-m", "gnomon_service", name]
        )

    def processes(self) -> list[psutil.Process]:
        return find_processes(self.marker, self.ray_folder)


def _as_in_a_terminal() -> None:
    """Let Ctrl-C reach the process also where the tests themselves run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    started = Up(tmp_path)
    yield started
    started.process.kill()
    started.process.wait()
    sweep(started.marker, started.ray_folder)


def test_no_other_user_of_the_machine_reaches_rays_files(up: Up) -> None:
    """Ray opens its folder to everyone: logs to read, and files to replace."""
    assert list(up.ray_folder.glob("r/session_*/logs"))
    assert stat.S_IMODE(up.ray_folder.stat().st_mode) == 0o700


def test_up_revives_its_children_and_stops_without_a_rest(up: Up) -> None:
    assert (up.home / "client.json").stat().st_mode & 0o777 == 0o600
    answer = up.get("/v1/cluster")
    assert answer is not None
    assert answer.json()["n_cpus"] == 1
    refused = subprocess.run([*up.process.args], capture_output=True, text=True)  # type: ignore[misc]
    assert (refused.returncode, "already_running" in refused.stderr) == (1, True)
    for name, number in (("api", signal.SIGKILL), ("dispatcher", signal.SIGTERM)):
        old = up.child(name)
        old.send_signal(number)
        wait_until(lambda old=old: not old.is_running() or old.status() == "zombie", up.output)  # type: ignore[misc]
    wait_until(lambda: (answer := up.get("/readyz")) is not None and answer.json()["dispatcher"] == "ok", up.output)
    assert "SIGTERM received" not in (up.home / "logs/dispatcher.log").read_text(), "it ended in Ray's handler"
    assert not find_listeners_beyond_loopback(up)
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait() == 128 + signal.SIGTERM
    assert up.processes() == []
    assert not up.ray_folder.exists()


def test_up_sweeps_what_a_killed_one_left_and_keeps_key_and_database(up: Up) -> None:
    up.process.kill()
    up.process.wait()
    left = up.processes()
    assert len(left) >= 4, "nothing was left: the test shows nothing"
    (up.home / "up.log").write_text("")
    again = Up(up.home)
    try:
        assert up.processes() == []
        assert not up.ray_folder.exists()
        assert again.key == up.key
        answer = again.get("/v1/jobs")
        assert answer is not None
        assert answer.status_code == 200
    finally:
        again.process.send_signal(signal.SIGINT)
        again.process.wait()
    assert again.process.returncode == 0
    said = (up.home / "up.log").read_text()
    assert -1 < said.find("Stopping: running jobs are queued again") < said.find("Stopped")
    assert again.processes() == []


def find_listeners_beyond_loopback(up: Up) -> list[str]:
    """Sockets of this service that other machines could reach."""
    return [
        f"{process.name()} {connection.laddr}"
        for process in up.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and "127.0.0.1" not in connection.laddr.ip
    ]


def test_a_child_that_cannot_start_is_named_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own end, and with nothing left running; silence until the last moment would say less."""
    monkeypatch.setattr(
        LocalRay, "argv", lambda *_: [sys.executable, "-c", "print('no port for me'); raise SystemExit(3)"]
    )
    with pytest.raises(Unavailable, match=r"(?s)ray ends soon after every start.*no port for me") as error:
        Embedded(load_settings(home=tmp_path, port=0)).__enter__()
    assert error.value.code == "start_failed"
    assert not (tmp_path / "up.json").exists()
