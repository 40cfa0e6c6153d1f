"""The GPUs of this machine, as the driver's own tool lists them: it takes none of their memory."""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

_QUERY: Final = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")
_ANSWER_S: Final = 20.0


def least_gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU; None where there is none, or the tool does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        told = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=_ANSWER_S, check=True)  # noqa: S603 - the driver's
        return min(int(line) for line in told.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
