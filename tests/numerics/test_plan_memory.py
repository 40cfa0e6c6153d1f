"""The memory that a process takes for steps is what plans say, in a process of its own for each activation."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from gnomon_workers.sae.memory import Rows, kept_bytes, passing_bytes
from tests.support.steps import data, plan_of, step_of

SIZES: dict[str, Any] = {"d_in": 256, "d_sae": 16_384, "batch_size": 1024, "token_budget": 1024 * 100}
ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(k=32),
    "batchtopk": BatchTopK(k=32),
    "matryoshka": Matryoshka(k=32),
    "relu": ReLU(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
}


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def grow(name: str, pipe: Connection) -> None:
    """Make two steps of a dictionary, and say by how much the process grew at most."""
    torch.set_num_threads(1)
    small = step_of(plan_of(activation=ACTIVATIONS[name], d_sae=1024))
    small(0, data(32))  # what the libraries take for their first step is the process's
    x = torch.randn(SIZES["batch_size"], SIZES["d_in"])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    step = step_of(plan_of(activation=ACTIVATIONS[name], encoder_dtype="float32", **SIZES))
    for number in range(2):
        step(number, x)
    pipe.send(resident("VmHWM") - before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_steps_take_what_is_planned(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=grow, args=(name, theirs))
    process.start()
    theirs.close()
    grown = ours.recv()
    process.join()
    process.close()
    ours.close()
    shape = plan_of(activation=ACTIVATIONS[name], encoder_dtype="float32", **SIZES).shape
    phases = passing_bytes(shape, "cpu", Rows(n_rows=1))
    passing = phases["step" if "step" in phases else "dense"]
    planned = sum(kept_bytes(shape).values()) + sum(passing.values())
    assert planned == pytest.approx(grown, rel=0.2)
