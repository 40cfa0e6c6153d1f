"""Whose fault an error is."""

from __future__ import annotations

import errno
import socket
from types import SimpleNamespace
from typing import Any

import obstore.exceptions
import pytest
import ray.exceptions
import torch

from gnomon.errors import InvalidRequest, StoreUnavailable, Unavailable
from gnomon_workers.runtime.faults import own_fault
from gnomon_workers.runtime.reporting import Ended, Reporter
from gnomon_workers.train import publishing


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "bad sector"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("late"),
        socket.gaierror(-2, "no name"),
        MemoryError(),
        EOFError(),
        ray.exceptions.RayActorError(),
        ray.exceptions.ObjectLostError("0" * 56, None, ""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_is_not_the_jobs_own(error: Exception) -> None:
    assert own_fault(error) is None


@pytest.mark.parametrize("kind", Ended.__subclasses__(), ids=lambda kind: kind.__name__)
def test_the_end_of_an_attempt_is_no_fault_and_nothing_goes_on_after_it(
    kind: type[Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that was asked to leave while it was evaluated must not publish itself without its metrics."""
    assert own_fault(kind()) is None

    def end(*_: Any, **__: Any) -> None:
        raise kind

    monkeypatch.setattr(publishing, "run_evaluation", end)
    anything: Any = SimpleNamespace(assignment=None, variant="")
    reporter = Reporter()
    with pytest.raises(kind):
        publishing._measure(anything, anything, reporter, anything, anything)
    assert reporter.after(0) == ()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), "internal"),
        (KeyError("x"), "internal"),
        (RuntimeError("shapes"), "internal"),
        (OSError("config.json is not readable"), "internal"),
        (ImportError("no package"), "internal"),
        (torch.OutOfMemoryError("device is full"), "out_of_memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_would_come_again_is_the_jobs_own(error: Exception, code: str) -> None:
    try:
        raise error
    except Exception as caught:
        fault = own_fault(caught)
    assert fault is not None
    assert (fault.code, fault.retryable) == (code, False)
    assert f"{type(error).__name__}: " in fault.message
    assert "test_faults.py" in fault.message
    assert str(fault.detail["trace"]).startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "no space", "/data/x"), "store_full"),
        (OSError(errno.EDQUOT, "over quota"), "store_full"),
        (obstore.exceptions.GenericError("connection refused"), "store_unavailable"),
        (obstore.exceptions.PermissionDeniedError("403"), "store_refused"),
        (StoreUnavailable("away"), "store_unavailable"),
    ],
    ids=str,
)
def test_what_a_store_does_is_waited_for_wherever_it_was_met(error: Exception, code: str) -> None:
    fault = own_fault(error)
    assert isinstance(fault, Unavailable)
    assert (fault.code, fault.retryable) == (code, True)


def test_errors_with_a_code_stay_what_they_are() -> None:
    refused, away = InvalidRequest("no", code="bad_text"), StoreUnavailable("away")
    assert own_fault(refused) is refused
    assert own_fault(away) is away


def test_a_collective_that_fails_may_have_lost_a_peer(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("peers") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    try:
        assert own_fault(RuntimeError("Connection closed by peer")) is None
        assert own_fault(ValueError("x")) is not None
    finally:
        torch.distributed.destroy_process_group()
