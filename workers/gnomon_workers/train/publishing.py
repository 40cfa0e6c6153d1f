"""From the last checkpoint to a published dictionary: weights, evaluation, provenance, manifest."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from gnomon.dictionary import load_folder
from gnomon_workers.checkpoints.format import Checkpoint
from gnomon_workers.dictionaries.folder import publish
from gnomon_workers.dictionaries.saelens import saelens_config, write_sparsity
from gnomon_workers.dictionaries.weights import WEIGHTS, write_weights
from gnomon_workers.evaluate.job import run_evaluation
from gnomon_workers.evaluate.metrics import alignment_metrics
from gnomon_workers.runtime.reporting import Reporter
from gnomon_workers.sae.plan import TrainPlan
from gnomon_workers.train.run import TrainRun

_LABEL_LENGTH: Final = 256
_NOT_HASHED: Final = {
    *("activations", "mesh", "log_every", "checkpoint_every", "profile_steps", "evaluation"),
    *("variants", "data_seed"),
}
_PACKAGES = ("gnomon", "torch", "ray", "transformers", "zarr", "numpy", "safetensors")


def export(run: TrainRun, reporter: Reporter, checkpoint: Checkpoint, *, tokens_per_s: float | None) -> dict[str, Any]:
    """Publish the dictionary of a finished training; returns its record.

    The weights are uploaded first, so that the evaluation reads what users will read; the manifest comes last.
    """
    folder = run.dictionary.child(f"attempt-{run.assignment.attempt:04d}")
    with tempfile.TemporaryDirectory(prefix="gnomon-export-") as temp:
        local = Path(temp)
        facts = write_weights(local / WEIGHTS, run.plan, checkpoint, run.checkpoints)
        metrics: dict[str, Any] = {"dead_fraction": facts.n_dead / run.plan.d_sae}
        _write_config(local, run, metrics)
        folder.upload(local)
        rates = {"train": tokens_per_s}
        evaluation = run.spec.evaluation
        if evaluation is not None:
            measured = run_evaluation(run.assignment, reporter, folder, evaluation, variant=run.variant)
            rates["evaluate"] = measured.tokens_per_s
            write_sparsity(local / "sparsity.safetensors", torch.from_numpy(measured.firing_frequency))
            metrics |= measured.metrics
        dictionary = load_folder(local)
        if not dictionary.cfg.is_transcoder:
            metrics["alignment"] = alignment_metrics(dictionary.magnitude_encoder(), dictionary.W_dec)
        metrics["tokens_per_s"] = rates
        reporter.phase("export", total=None, unit="files", variant=run.variant)
        _write_config(local, run, metrics)
        _write_provenance(local, run, checkpoint, metrics)
        return publish(folder, local, _record(run, metrics))


def _record(run: TrainRun, metrics: dict[str, Any]) -> dict[str, Any]:
    """The fields of resources.Dictionary that the job determines."""
    return {
        "hook_name": _hook_label(run.plan),
        "d_in": run.plan.d_in,
        "d_sae": run.plan.d_sae,
        "activation": run.plan.spec.activation.kind,
        "alignment": run.plan.spec.alignment,
        "metrics": metrics,
    }


def _hook_label(plan: TrainPlan) -> str:
    """The hook's name, or of several as many as fit into a column of the database."""
    label = " + ".join(hook.name for hook in plan.inputs)
    label = label if plan.target is None else f"{label} -> {plan.target.name}"
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 3]}..."


def _write_config(local: Path, run: TrainRun, metrics: dict[str, Any]) -> None:
    harvest = run.store.manifest.spec
    metadata = {
        "model_name": harvest["model"]["source"],
        "model_revision": harvest["model"].get("revision"),
        "dataset_path": harvest["text"][0]["url"],
        "context_size": harvest["context_length"],
        "prepend_bos": bool(harvest["packing"].get("bos", harvest["packing"].get("special_tokens", False))),
        "exclude_special_tokens": harvest["drop"]["special_tokens"],
        "l0": metrics.get("l0"),
        "num_dead_features": round(metrics["dead_fraction"] * run.plan.d_sae),
        "gnomon": {
            "version": version("gnomon"),
            "job_id": run.assignment.job_id,
            "dictionary_id": run.dictionary_id,
            "variant": run.variant or None,
            "store_id": run.assignment.store_id,
            "alignment": run.plan.spec.alignment,
            "seed": run.plan.spec.seed,
            "config_hash": config_hash(run),
        },
    }
    config = saelens_config(run.plan, metadata)
    (local / "cfg.json").write_text(json.dumps(config, indent=1))


def _write_provenance(local: Path, run: TrainRun, checkpoint: Checkpoint, metrics: dict[str, Any]) -> None:
    """runner_cfg.json: everything needed to make the dictionary again."""
    manifest = run.store.manifest
    provenance = {
        "job_id": run.assignment.job_id,
        "attempt": run.assignment.attempt,
        "variant": run.variant or None,
        "created_at": datetime.now(UTC).isoformat(),
        "config_hash": config_hash(run),
        "train": run.spec.model_dump(mode="json"),
        "harvest": manifest.spec,
        "store": {
            "id": manifest.store_id,
            "n_rows": manifest.n_rows,
            "n_held_out_rows": manifest.n_held_out_rows,
            "model": manifest.model,
            "tokenizer": manifest.tokenizer,
            "text": manifest.text,
            "versions": manifest.versions,
        },
        "resolved": {
            "d_in": run.plan.d_in,
            "d_sae": run.plan.d_sae,
            "lr": run.plan.lr,
            "n_steps": run.plan.spec.n_steps,
            "warmup_steps": run.plan.spec.warmup_steps,
            "mesh": {"dp": run.plan.mesh.dp, "features": run.plan.mesh.features},
            "d_out": run.plan.d_out,
            "input_scales": {hook.name: hook.scale for hook in run.plan.hooks},
            "seed": run.plan.spec.seed,
            "data_seed": run.plan.data_seed,
        },
        "checkpoint": {"step": checkpoint.step, "max_alignment_deviation": checkpoint.max_alignment_deviation},
        "metrics": metrics,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    (local / "runner_cfg.json").write_text(json.dumps(provenance, indent=1))


def config_hash(run: TrainRun) -> str:
    """SHA-256 of what determines the dictionary: the store and the spec, without the mesh and the reporting."""
    spec = run.spec.model_dump(mode="json", exclude=_NOT_HASHED)
    if run.plan.data_seed != run.plan.spec.seed:
        spec["data_seed"] = run.plan.data_seed
    text = json.dumps({"store_id": run.assignment.store_id, "spec": spec}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
