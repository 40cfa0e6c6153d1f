"""Named places at which a test makes a training rank die, stop or fail; in a service that nobody tests they do nothing.

    GNOMON_FAILPOINTS="checkpoint.before_manifest:kill; step.before@rank=3,hit=120:stop"

Each entry names a place, then optionally the rank it is meant for and the how-manieth passage, from 1, of that rank's
process; then what happens: `kill` (SIGKILL), `stop` (SIGSTOP), `hang` (this thread goes no further), or `raise` (the
object store fails). A gang hands the variable to its members, and a rank reads it once, when it is made.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, cast

from gnomon.errors import StoreUnavailable

VARIABLE: Final = "GNOMON_FAILPOINTS"
Action = Literal["kill", "stop", "hang", "raise"]
_ENTRY: Final = re.compile(r"^(?P<name>[a-z_.]+)(@(?P<where>[a-z0-9=,]+))?:(?P<action>kill|stop|hang|raise)$")


class Failpoint(StrEnum):
    """Every place there is, in the order in which a run comes by."""

    RUN_START = "run.start"
    """A rank has its task, and has not joined the mesh."""
    LOAD_CHECKPOINT = "checkpoint.load"
    """Between two tensors of a checkpoint that is being loaded."""
    STEP_BEFORE = "step.before"
    """The batch is read, and nothing of the step is done."""
    STEP_BEFORE_UPDATE = "step.before_update"
    """Gradients are there, and nothing has changed."""
    COPY_BEFORE = "checkpoint.before_copy"
    """A checkpoint is due, and the one before is done."""
    COPY_DURING = "checkpoint.during_copy"
    """Between two tensors that are copied out."""
    COPY_AFTER = "checkpoint.after_copy"
    """The state is copied, and training is about to go on."""
    UPLOAD_DURING = "checkpoint.during_upload"
    """While a shard is uploaded: at the latest when all of it is there."""
    UPLOAD_AFTER = "checkpoint.after_upload"
    """The shard is there, its receipt is not."""
    MANIFEST_BEFORE = "checkpoint.before_manifest"
    """Rank 0 has every receipt."""
    MANIFEST_AFTER = "checkpoint.after_manifest"
    """The checkpoint is committed, and older ones are still there."""
    DELETE_DURING = "checkpoint.during_delete"
    """Between an older checkpoint's manifest and the rest of it."""
    RUN_END = "run.end"
    """The rank's part of the last checkpoint is done (rank 0's: committed), and it has not said so."""


@dataclass(slots=True, kw_only=True)
class _Armed:
    point: Failpoint
    action: Action
    passages_left: int


_armed: list[_Armed] = []
"""What is to happen in this process."""


def arm(rank: int) -> None:
    """Take up what GNOMON_FAILPOINTS asks of this rank; raises ValueError where it is not understood."""
    _armed[:] = [entry for text in _entries() if (entry := _parse(text, rank)) is not None]


def environment() -> dict[str, str]:
    """The variable, where it is set, for the members of a gang: they may run on other machines."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def failpoint(point: Failpoint) -> None:
    """Come by a place: nothing happens unless it is armed."""
    if _armed and (action := _due(point)):
        _act(point, action)


@contextmanager
def failing_during(point: Failpoint) -> Iterator[None]:
    """Come by a place that lasts: what is armed happens from another thread, at the latest when the block ends."""
    action = _due(point) if _armed else None
    if action is None or action == "raise":
        yield
        if action is not None:
            _act(point, action)
        return
    thread = threading.Thread(target=_act, args=(point, action), daemon=True)
    thread.start()
    yield
    thread.join()


def _due(point: Failpoint) -> Action | None:
    for entry in _armed:
        if entry.point == point:
            entry.passages_left -= 1
            if entry.passages_left == 0:
                return entry.action
    return None


def _act(point: Failpoint, action: Action) -> None:
    if action == "raise":
        raise StoreUnavailable(f"failpoint {point}: the object store fails here, as {VARIABLE} asks")
    if action == "hang":
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


def _entries() -> list[str]:
    return [text.strip() for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]


def _parse(text: str, rank: int) -> _Armed | None:
    """One entry, or None where it is meant for another rank."""
    match = _ENTRY.match(text)
    if match is None:
        raise ValueError(f"{VARIABLE}: {text!r} is not name[@rank=R,hit=N]:kill|stop|hang|raise")
    where = dict(part.split("=", 1) for part in (match["where"] or "").split(",") if part)
    if unknown := set(where) - {"rank", "hit"}:
        raise ValueError(f"{VARIABLE}: {text!r} has {sorted(unknown)}; there are rank and hit")
    point = Failpoint(match["name"])
    if int(where.get("rank", rank)) != rank:
        return None
    return _Armed(point=point, action=cast("Action", match["action"]), passages_left=int(where.get("hit", "1")))
