"""Evaluation as a supervisor runs it: a gang of workers, their sums added up and divided once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gnomon.errors import NotFound
from gnomon.events import Logged
from gnomon.metrics import DictionaryMetrics
from gnomon.resources import EvaluateResult
from gnomon.specs import EvaluateSpec, Evaluation
from gnomon_storage.activations import ActivationStore
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import published
from gnomon_workers.evaluate.dictionaries import alignment_of, read_config
from gnomon_workers.evaluate.metrics import CoreSums, PatchSums, total
from gnomon_workers.evaluate.patching import Hooks
from gnomon_workers.evaluate.worker import EvaluateTask, EvaluateWorker
from gnomon_workers.runtime.crew import Crew
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.gang import Gang
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.runtime.reporting import Reporter

_FEW_ROWS: Final = 3.0
"""Median of single activations' FVU over that of all, from which on a few of them carry the variance."""
N_CORES: Final = 4
"""Workers at most where there is no GPU: beyond that, loading the model costs more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an evaluation found."""

    metrics: DictionaryMetrics
    firing_frequency: np.ndarray[tuple[int], np.dtype[np.float64]] | None
    """(d_sae,) on held-out activations; None where there are none."""
    tokens_per_s: float | None


def run_evaluate(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
    """An evaluate job: measure a published dictionary on the held-out text of its own store."""
    spec = EvaluateSpec.read(assignment.spec)
    place = ProjectLayout.open(assignment.storage_root).dictionary(spec.dictionary)
    record = published(place)
    if record is None:
        raise NotFound(f"no published dictionary {spec.dictionary!r} at {place.url}", code="dictionary_not_found")
    folder = Location.open(record["location"])
    measured = run_evaluation(assignment, reporter, folder, spec.evaluation)
    rates: dict[str, float | None] = {"evaluate": measured.tokens_per_s}
    metrics = measured.metrics.also(DictionaryMetrics(alignment=alignment_of(folder), tokens_per_s=rates))
    return EvaluateResult(dictionary_id=spec.dictionary, metrics=metrics).model_dump(mode="json")


def run_evaluation(
    assignment: Assignment, reporter: Reporter, folder: Location, evaluation: Evaluation, *, variant: str = ""
) -> Measured:
    """Measure the dictionary in a folder on the held-out part of the assignment's store.

    Reports name the variant, where the dictionary is one of several that the job makes.
    """
    store = ActivationStore.open(ProjectLayout.open(assignment.storage_root).store(assignment.store_id))
    has_logits = store.manifest.model.get("kind_of_model", "causal") == "causal"
    config = read_config(folder)
    task = EvaluateTask(
        store=store.location.url,
        dictionary=folder.url,
        hooks=Hooks(read=config.hooks_read, written=config.hooks_written),
        evaluation=evaluation,
        has_logits=has_logits,
        input_roots=assignment.input_roots,
        n_workers=len(assignment.places) or _n_workers(),
    )
    n_tokens = _n_tokens(store, evaluation, has_logits=has_logits)
    reporter.phase("evaluate", total=n_tokens, unit="tokens", variant=variant)
    tell_of_short_store(store, evaluation, reporter, has_logits=has_logits)
    began = time.monotonic()
    core, patch = _gather(task, assignment.places, reporter, began)
    reporter.progress(n_tokens)
    metrics = DictionaryMetrics(skipped="the store has no held-out row: its text is shorter than two contexts")
    if core is not None:
        metrics = core.result(k=config.k, hooks=config.hooks)
        warn_of_few_rows(metrics, reporter)
    return Measured(
        metrics=metrics.also(_ce_metrics(patch, evaluation, has_logits=has_logits)),
        firing_frequency=None if core is None else core.firing_frequency.cpu().numpy(),
        tokens_per_s=n_tokens / (time.monotonic() - began),
    )


def tell_of_short_store(
    store: ActivationStore, evaluation: Evaluation, reporter: Reporter, *, has_logits: bool
) -> None:
    """Say how much is used where the store holds out less than the evaluation would take."""
    n_rows = store.manifest.n_held_out_rows
    short = [f"{n_rows} of n_tokens={evaluation.n_tokens} activations"] if n_rows < evaluation.n_tokens else []
    n_text = _held_out_text(store)
    if evaluation.ce and has_logits and n_text < evaluation.n_ce_tokens:
        short.append(f"{n_text} of n_ce_tokens={evaluation.n_ce_tokens} tokens of text")
    if short:
        reporter.report(Logged(message=f"evaluated on {' and '.join(short)}: the store holds out no more"))


def warn_of_few_rows(metrics: DictionaryMetrics, reporter: Reporter) -> None:
    """Say so where the FVU is that of a few activations."""
    if metrics.row_fvu is None or metrics.fvu is None or metrics.row_fvu.median < _FEW_ROWS * metrics.fvu:
        return
    message = (
        f"a few activations carry most of the variance: FVU is {metrics.fvu:.3g}, and that of the median activation "
        f"{metrics.row_fvu.median:.3g}; they may be attention sinks, which the harvest's drop policy and BOS leave out"
    )
    reporter.report(Logged(level="warning", message=message))


def _n_workers() -> int:
    """Workers where nothing was said of devices: by a dispatcher of a release that did not."""
    devices = Devices.of_cluster()
    return devices.n_members if devices.use_gpu else min(N_CORES, devices.n_members)


def _gather(
    task: EvaluateTask, places: tuple[str, ...], reporter: Reporter, began: float
) -> tuple[CoreSums | None, PatchSums | None]:
    with Gang.start(EvaluateWorker, task.n_workers, reporter, places=places, apart=True) as gang:
        done = 0

        def tick() -> None:
            nonlocal done
            reporter.check()  # what is measured is measured again: there is nothing to save
            done = max(done, sum(int(beat) for beat in gang.last_beats))  # less where a lost share is begun again
            reporter.progress(done, rate=done / max(time.monotonic() - began, 1e-9))

        crew = Crew(gang, reporter)
        parts = crew.share_out(lambda member: member.run.remote(task), tick, every_s=0.5)
    return total([core for core, _ in parts]), total([patch for _, patch in parts])


def _ce_metrics(patch: PatchSums | None, evaluation: Evaluation, *, has_logits: bool) -> DictionaryMetrics:
    if patch is not None and patch.n_predictions:
        return patch.result()
    if not evaluation.ce:
        why = "not asked for"
    elif not has_logits:
        why = "the model has no logits"
    else:
        why = "no held-out text" if patch is None else "no held-out context has a second token to predict"
    return DictionaryMetrics(ce_skipped=why)


def _n_tokens(store: ActivationStore, evaluation: Evaluation, *, has_logits: bool) -> int:
    n_core = min(evaluation.n_tokens, store.manifest.n_held_out_rows)
    if not (evaluation.ce and has_logits):
        return n_core
    length = store.manifest.context_length
    return n_core + min(_held_out_text(store), length * -(-evaluation.n_ce_tokens // length))


def _held_out_text(store: ActivationStore) -> int:
    """Tokens of the held-out contexts, dropped ones and padding included."""
    return store.manifest.context_length * sum(each.n_contexts for each in store.manifest.split("held_out"))
