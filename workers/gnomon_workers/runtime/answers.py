"""What a member of a gang answers: its work done, or refused for a reason that is the job's own.

A refusal is returned rather than raised. What an actor raises comes out of Ray as a failed task, which says of a worker
that it was lost: the attempt would be run again, and fail again, where the job itself is at fault (see `faults`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from gnomon.errors import GnomonError, from_problem
from gnomon_workers.runtime.faults import own_fault

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Done(Generic[T_co]):
    """Work that was done, and what it gave."""

    value: T_co


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Work that was not done, for a reason that would be there again on another machine."""

    status: int
    code: str
    message: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Facts beside the message."""

    @classmethod
    def of(cls, error: GnomonError) -> Refused:
        """The refusal that an error stands for."""
        return cls(status=error.status, code=error.code, message=error.message, detail=error.detail)

    def error(self) -> GnomonError:
        """The error itself."""
        return from_problem(self.status, {**self.detail, "code": self.code, "detail": self.message})


def answers(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], Done[T] | Refused]:
    """Make a method of a gang's member answer Done with what it returns, or Refused where an error is the job's own."""

    @wraps(method)
    def answering(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Done[T] | Refused:
        try:
            return Done(method(self, *args, **kwargs))
        except Exception as error:
            fault = own_fault(error)
            if fault is None:
                raise
            return Refused.of(fault)

    return answering


def value_of(answer: Done[T] | Refused) -> T:
    """What was done; raises the error of a refusal."""
    if isinstance(answer, Refused):
        raise answer.error()
    return answer.value
