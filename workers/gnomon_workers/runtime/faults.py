"""Whose fault an error is: the job's own, which every attempt would meet again, or a machine's or a service's.

A store that is away or full is waited for by the attempt itself: such an error is `Unavailable`. Only what says that a
machine, a connection or a peer went is taken for a loss, after which the job runs again. All else (a model that cannot
be run, text that a tokenizer rejects, a mistake in this code) would end the next attempt in the same way: it ends the
job at once, with the place where it happened.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Final

from gnomon.errors import GnomonError
from gnomon_storage.backends import store_failure
from gnomon_workers.runtime.reporting import Ended

_TRACE_CHARACTERS: Final = 8_000
"""Of the end of a trace, which says why."""


def own_fault(error: Exception) -> GnomonError | None:
    """The error that ends the job, with code, place and trace, or Unavailable, after which it waits and goes on.

    None where another attempt may succeed.
    """
    if isinstance(error, GnomonError):
        return error
    failure = store_failure(error)
    if failure is not None:
        return failure
    if isinstance(error, Ended) or _may_pass(error):
        return None
    code = "out_of_memory" if _is_device_memory(error) else "internal"
    return GnomonError(f"{summary(error)} (at {place(error)})", code=code, trace=trace(error))


def summary(error: BaseException) -> str:
    """Type and message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:500]}" if message else type(error).__name__


def place(error: BaseException) -> str:
    """File, line and function where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"


def trace(error: BaseException) -> str:
    """The end of the trace."""
    return "".join(traceback.format_exception(error))[-_TRACE_CHARACTERS:]


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (MemoryError, TimeoutError, ConnectionError, EOFError)):
        return True
    if isinstance(error, OSError):
        return error.errno is not None  # the system's; libraries raise bare ones for what they cannot read
    if type(error).__module__.startswith("ray."):
        return True
    # A collective whose peer died says so in the words of its backend.
    return isinstance(error, RuntimeError) and not _is_device_memory(error) and _has_peers()


def _has_peers() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _is_device_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"
