"""A Ray head for one machine, reachable from this machine only and only with its token."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from gnomon_service.local.gpus import least_gpu_memory_bytes
from gnomon_service.settings import Settings
from gnomon_workers.attempts.gpu_memory import LABEL
from gnomon_workers.runtime.ports import free_port

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """How to start the head, and how to reach it."""

    folder: Path
    """A private folder, for Ray's own and temporary files.

    Short, because the paths of Ray's sockets may have 107 bytes at most.
    """
    port: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @classmethod
    def create(cls) -> LocalRay:
        """A head with a new folder, port and token."""
        folder = Path(tempfile.mkdtemp(prefix="gnomon-", dir=_short_folder()))
        (folder / "tmp").mkdir()
        return cls(folder=folder)

    @property
    def sessions(self) -> Path:
        """Ray's folder, which it opens to every user of the machine; what lies around it keeps them out."""
        return self.folder / "r"

    @property
    def address(self) -> str:
        """Where its drivers connect."""
        return f"{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """What the head and its drivers have in common."""
        return {
            # Anyone who reaches a Ray head runs code as its user; on a shared machine that is every user.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # Ray turns 127.0.0.1 into the address of this host in its network unless it is told that there are
            # no other nodes.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": str(self.sessions),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def head_environment(self) -> dict[str, str]:
        """What only the head needs: no drain of half a minute at the end, and ports that are free here.

        Workers keep temporary files in Ray's folder, so that what a killed one leaves behind goes with the folder.
        """
        return self.environment() | {
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "DASHBOARD_METRIC_PORT": str(free_port()),
        }

    def argv(self, settings: Settings) -> list[str]:
        """The command that runs the head in the foreground."""
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        argv += [f"--node-ip-address={HOST}", f"--port={self.port}", f"--temp-dir={self.sessions}"]
        argv += ["--include-dashboard=false", "--disable-usage-stats"]
        argv.append(f"--dashboard-agent-listen-port={free_port()}")
        if find_spec("grpc") is not None:
            # With grpc at hand Ray serves its client protocol too, on a fixed port; without, it refuses the option.
            argv.append(f"--ray-client-server-port={free_port()}")
        argv += [f"--object-store-memory={settings.object_store_bytes}"]
        gpu_bytes = least_gpu_memory_bytes()
        if gpu_bytes is not None:
            argv.append(f"--labels={LABEL}={gpu_bytes}")
        if settings.n_cpus is not None:
            argv.append(f"--num-cpus={settings.n_cpus}")
        return argv


def without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without Ray's variables: those of another cluster would mix with ours."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 22 else "/tmp"  # noqa: S108 - mkdtemp makes it private
