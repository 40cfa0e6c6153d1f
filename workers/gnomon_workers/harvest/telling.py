"""What a harvest tells of its text and its rows beside its progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from gnomon.events import Logged
from gnomon.specs import HarvestSpec, StoredDtype
from gnomon_storage.manifest import HookInfo, SegmentCommit
from gnomon_workers.harvest.text import N_TOLD, Tally
from gnomon_workers.runtime.reporting import Reporter

FELT: Final = 0.01
"""Share of a hook's variance from which on a dictionary is the worse for what rounding has taken."""


def warn_of_bad_documents(tally: Tally, reporter: Reporter) -> int:
    """Say how many were passed over so far, if any, and where the first are; returns how many."""
    if tally.n_bad:
        message = f"{tally.n_bad} bad documents are passed over: {'; '.join(tally.first_bad)}"
        reporter.report(Logged(level="warning", message=message + ("; ..." if tally.n_bad > N_TOLD else "")))
    return tally.n_bad


def warn_of_short_text(spec: HarvestSpec, commits: Iterable[SegmentCommit], reporter: Reporter) -> None:
    """Say so where the text ended although another context of it would have been within the budget."""
    n_tokens, n_rows, n_held_out = 0, 0, 0
    for commit in commits:
        n_tokens += commit.n_tokens
        n_rows += commit.n_rows if commit.split == "segments" else 0
        n_held_out += commit.n_rows if commit.split == "held_out" else 0
    if n_tokens + spec.context_length > spec.token_budget:
        return
    message = (
        f"the text ended after {n_tokens} of token_budget={spec.token_budget} tokens: the store has {n_rows} rows, and "
        f"{n_held_out} held out; a training that needs more rows repeats them"
    )
    reporter.report(Logged(level="warning", message=message))


def tell_rounding(dtype: StoredDtype, hooks: Mapping[str, HookInfo], reporter: Reporter) -> None:
    """Say what storing the rows has cost: of int8 always, and a warning where dictionaries will feel it."""
    wider = "bfloat16" if dtype == "int8" else "float32"
    for name, hook in hooks.items():
        lost = hook.rounding_error or 0.0
        message = f"stored as {dtype}, {name} has lost {lost:.2%} of its variance"
        if lost >= FELT:
            advice = f"{message}, which no dictionary can explain; harvest it as {wider}"
            reporter.report(Logged(level="warning", message=advice))
        elif dtype == "int8":
            reporter.report(Logged(message=message))
