"""Ports for servers that start a moment later."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST: Final = 20_000
"""Above the ports that Ray gives its workers."""
N_TRIES: Final = 200


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now, and that no outgoing connection will take before its server starts.

    The system hands out ports of its ephemeral range for outgoing connections, and on a busy machine soon again the
    one that it has just named here: the server could then never start there. So it is one below that range, where
    the range leaves any.
    """
    end = _first_ephemeral()
    for _ in range(N_TRIES if end > FIRST else 0):
        port = random.SystemRandom().randrange(FIRST, end)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except OSError:
        return 32_768
