"""How Ray tells that an actor is gone, and why, in words for people."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from gnomon_workers.runtime.reporting import WorkerLost

_LONGEST = 300


class lost_as_such:  # noqa: N801 - used as a function
    """A context manager that turns Ray's ways of losing a worker into WorkerLost."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RayActorError | WorkerCrashedError):
            raise WorkerLost(f"a worker died: {cause_of(error)}") from error
        if isinstance(error, RayTaskError):
            raise WorkerLost(f"a worker failed: {_lines(error)[-1]}") from error


def cause_of(death: BaseException) -> str:
    """Why an actor died, as one line of what Ray says: that its node did, its process, or an error as it was made."""
    first, *others = _lines(death)
    if isinstance(death, RayActorError) and death.actor_init_failed:
        return others[-1] if others else first
    # between the first line, which says of every actor that it died, and the cause stand its names
    return next((line for line in others if not line.startswith("\t")), first)[:_LONGEST]


def _lines(error: BaseException) -> list[str]:
    return [line for line in str(error).strip().split("\n") if line.strip()] or [type(error).__name__]
