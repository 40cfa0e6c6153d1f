"""From the last checkpoint to a published dictionary: weights, evaluation, provenance, manifest."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from gnomon.errors import Unavailable
from gnomon.events import Logged
from gnomon.metrics import DictionaryMetrics
from gnomon.specs import Evaluation
from gnomon_storage.activations import ActivationStore
from gnomon_storage.digests import combine
from gnomon_storage.layout import attempt_name
from gnomon_storage.location import Location
from gnomon_storage.manifest import Manifest
from gnomon_workers.checkpoints.format import Checkpoint
from gnomon_workers.dictionaries.folder import publish
from gnomon_workers.dictionaries.saelens import saelens_config, write_sparsity
from gnomon_workers.dictionaries.weights import WEIGHTS, write_weights
from gnomon_workers.evaluate.dictionaries import alignment_of_files
from gnomon_workers.evaluate.job import Measured, run_evaluation
from gnomon_workers.runtime.faults import own_fault
from gnomon_workers.runtime.reporting import Reporter
from gnomon_workers.runtime.scratch import scratch_folder
from gnomon_workers.sae.plan import TrainPlan
from gnomon_workers.train.run import Training, TrainRun

_LABEL_LENGTH: Final = 256
_NOT_HASHED: Final = {
    *("activations", "mesh", "log_every", "checkpoint_every", "profile_steps", "evaluation"),
    *("variants", "data_seed"),
}
_PACKAGES = ("gnomon", "torch", "ray", "transformers", "zarr", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a dictionary was made by and from."""

    run: TrainRun
    training: Training
    store: Manifest
    """Of the activation store."""


def export(
    run: TrainRun, training: Training, checkpoint: Checkpoint, reporter: Reporter, *, tokens_per_s: float | None
) -> dict[str, Any]:
    """Publish the dictionary of a finished training; returns its record.

    The weights are uploaded first and once, so that what is evaluated is what users will read; the manifest comes last.
    The weights are written, uploaded and looked at some features at a time: this process may have little memory.
    An evaluation that cannot be made leaves its metrics out, with the reason: what was trained is published anyway.
    """
    plan = training.plan
    origin = _Origin(run, training, ActivationStore.open(run.store).manifest)
    folder = training.dictionary.child(attempt_name(run.assignment.attempt))
    with scratch_folder() as local:
        facts = write_weights(local / WEIGHTS, plan, checkpoint, training.checkpoints)
        n_tokens = checkpoint.step * plan.spec.batch_size
        is_known = n_tokens >= plan.spec.dead_window
        metrics = DictionaryMetrics(dead_fraction=facts.n_dead / plan.d_sae if is_known else None)
        _write_config(local, origin, metrics)
        folder.upload(local)
        rates: dict[str, float | None] = {"train": tokens_per_s}
        evaluation = plan.spec.evaluation
        if evaluation is not None:
            measured = _measure(run, training, reporter, folder, evaluation)
            rates["evaluate"] = measured.tokens_per_s
            if measured.firing_frequency is not None:
                write_sparsity(local / "sparsity.safetensors", torch.from_numpy(measured.firing_frequency))
            metrics = metrics.also(measured.metrics)
        metrics = metrics.also(DictionaryMetrics(alignment=alignment_of_files(local), tokens_per_s=rates))
        reporter.phase("export", total=None, unit="files", variant=training.variant)
        _write_config(local, origin, metrics)
        _write_provenance(local, origin, checkpoint, metrics)
        return publish(folder, local, _record(plan, metrics), uploaded={WEIGHTS})


def _measure(
    run: TrainRun, training: Training, reporter: Reporter, folder: Location, evaluation: Evaluation
) -> Measured:
    """What an evaluation found; nothing but the reason where it failed by a fault that would come again."""
    try:
        return run_evaluation(run.assignment, reporter, folder, evaluation, variant=training.variant)
    except Exception as error:
        fault = own_fault(error)
        if fault is None or isinstance(fault, Unavailable):
            raise
        reporter.report(Logged(level="error", message=f"not evaluated ({fault.code}): {fault.message}"))
        why = f"the evaluation failed ({fault.code}): {fault.message}"
        return Measured(metrics=DictionaryMetrics(skipped=why), firing_frequency=None, tokens_per_s=None)


def _record(plan: TrainPlan, metrics: DictionaryMetrics) -> dict[str, Any]:
    """The fields of resources.DictionaryRecord that the job determines."""
    return {
        "hook_name": _hook_label(plan),
        "d_in": plan.d_in,
        "d_sae": plan.d_sae,
        "activation": plan.spec.activation.kind,
        "alignment": plan.spec.alignment,
        "metrics": metrics.model_dump(mode="json"),
    }


def _hook_label(plan: TrainPlan) -> str:
    """The hook's name, or of several as many as fit into a column of the database."""
    label = " + ".join(hook.name for hook in plan.inputs)
    label = label if plan.target is None else f"{label} -> {plan.target.name}"
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 3]}..."


def _public_name(source: str) -> str | None:
    """A model's name for others; None of a path, which means nothing elsewhere (provenance has it)."""
    return None if source.startswith(("/", "file:")) else source


def _write_config(local: Path, origin: _Origin, metrics: DictionaryMetrics) -> None:
    plan, harvest = origin.training.plan, origin.store.spec
    metadata = {
        "model_name": _public_name(harvest["model"]["source"]),
        "model_revision": harvest["model"].get("revision"),
        "dataset_path": harvest["text"][0]["url"],
        "context_size": harvest["context_length"],
        "prepend_bos": origin.store.packing.get("begins_with_bos"),
        "exclude_special_tokens": harvest["drop"]["special_tokens"],
        "l0": metrics.l0,
        "num_dead_features": None if metrics.dead_fraction is None else round(metrics.dead_fraction * plan.d_sae),
        "gnomon": {
            "version": version("gnomon"),
            "job_id": origin.run.assignment.job_id,
            "dictionary_id": origin.training.dictionary_id,
            "variant": origin.training.variant or None,
            "store_id": origin.run.assignment.store_id,
            "alignment": plan.spec.alignment,
            "seed": plan.spec.seed,
            "config_hash": config_hash(origin.run.assignment.store_id, plan),
        },
    }
    config = saelens_config(plan, metadata)
    (local / "cfg.json").write_text(json.dumps(config, indent=1))


def _write_provenance(local: Path, origin: _Origin, checkpoint: Checkpoint, metrics: DictionaryMetrics) -> None:
    """runner_cfg.json: everything needed to make the dictionary again."""
    plan, store = origin.training.plan, origin.store
    provenance = {
        "job_id": origin.run.assignment.job_id,
        "attempt": origin.run.assignment.attempt,
        "variant": origin.training.variant or None,
        "created_at": datetime.now(UTC).isoformat(),
        "config_hash": config_hash(origin.run.assignment.store_id, plan),
        "train": plan.spec.model_dump(mode="json"),
        "harvest": store.spec,
        "store": {
            "id": store.store_id,
            "n_rows": store.n_rows,
            "n_held_out_rows": store.n_held_out_rows,
            "model": store.model,
            "tokenizer": store.tokenizer,
            "text": store.text,
            "versions": store.versions,
        },
        "resolved": {
            "d_in": plan.d_in,
            "d_sae": plan.d_sae,
            "lr": plan.lr,
            "betas": [plan.spec.beta1, plan.spec.beta2],
            "dead_after_tokens": plan.spec.dead_window,
            "n_steps": plan.spec.n_steps,
            "warmup_steps": plan.spec.warmup_steps,
            "mesh": {"dp": plan.mesh.dp, "features": plan.mesh.features},
            "d_out": plan.d_out,
            "input_scales": {hook.name: hook.scale for hook in plan.hooks},
            "seed": plan.spec.seed,
            "data_seed": plan.data_seed,
        },
        "checkpoint": {"step": checkpoint.step, "max_alignment_deviation": checkpoint.max_alignment_deviation},
        "metrics": metrics.model_dump(mode="json"),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    (local / "runner_cfg.json").write_text(json.dumps(provenance, indent=1))


def config_hash(store_id: str, plan: TrainPlan) -> str:
    """SHA-256 of what determines the dictionary: the store and the spec, without the mesh and the reporting."""
    spec = plan.spec.model_dump(mode="json", exclude=_NOT_HASHED)
    if plan.data_seed != plan.spec.seed:
        spec["data_seed"] = plan.data_seed
    return combine({"store_id": store_id, "spec": spec})
