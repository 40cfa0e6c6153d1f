"""Short trainings on one activation store that differ in what the arms name, each measured on its held-out rows.

    python benchmarks/ablation.py STORE --steps 400 --batch-size 1024 --d-sae 2560 \
        --arm "normalize=centred" --arm "normalize=mean_squared_norm optimizer.b_dec_rate=0.3 alignment=none"

STORE is the folder of a sealed activation store. An arm is a list of fields of a train spec with their values. Every
arm is the product's own step, one after the other in one process; a line of JSON follows each, with

  fvu            of held-out rows: sum |x - x_hat|^2 over sum |x - mean|^2
  never_fired    share of features that fire on no held-out row
  not_fired      share of features that did not fire in the last epoch of training
  clipped        share of steps whose gradient was clipped
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnomon.specs import BatchTopK, Matryoshka, Mesh, StoredActivations, TrainSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.plan import make_joint_plan
from gnomon_workers.train.rank import make_step, n_first_samples
from gnomon_workers.train.run import hooks_of
from gnomon_workers.train.sources import JointReader
from gnomon_workers.train.step import TrainStep


def main() -> None:
    """Train and measure every arm."""
    options = _options()
    torch.set_num_threads(options.threads)
    store = ActivationStore.open(Location.open(options.store.resolve().as_uri()))
    for arm in options.arm:
        spec = make_spec(parse_arm(arm), options)
        started = time.process_time()
        step, measured = train_arm(spec, store)
        measured |= held_out(step, store)
        line = {"arm": arm, **{name: round(value, 4) for name, value in measured.items()}}
        print(json.dumps({**line, "cpu_s": round(time.process_time() - started)}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder of an activation store")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2560)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arm", action="append", required=True, help='e.g. "optimizer.lr=1e-3 alignment=none"')
    return parser.parse_args()


def parse_arm(arm: str) -> dict[str, Any]:
    """Fields of a spec, nested."""
    fields: dict[str, Any] = {}
    for assignment in arm.split():
        path, _, text = assignment.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, name = path.split(".")
        place = fields
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return fields


def make_spec(fields: Mapping[str, Any], options: argparse.Namespace) -> TrainSpec:
    """The spec of an arm."""
    return TrainSpec(
        activations=StoredActivations(id="act_" + "0" * 32),
        mesh=Mesh(),
        **{
            "d_sae": options.d_sae,
            "batch_size": options.batch_size,
            "token_budget": options.steps * options.batch_size,
            **fields,
        },
    )


def train_arm(spec: TrainSpec, store: ActivationStore) -> tuple[TrainStep, dict[str, float]]:
    """A step after the whole run, and what was seen on the way."""
    inputs, target = hooks_of(spec, store)
    plan = make_joint_plan(spec, inputs=inputs, target=target, mesh=Mesh())
    names = [hook.name for hook in plan.hooks]
    n_clipped = 0
    with JointReader(store, names, seed=plan.data_seed, batch_size=spec.batch_size) as reader:
        sample = reader.first_sample(n_first_samples(plan))
        step = make_step(plan, ProcessMesh.single(), sample, torch.device("cpu"))
        for number in range(spec.n_steps):
            result = step(number, torch.from_numpy(reader.batch(number, 0, spec.batch_size)))
            n_clipped += spec.optimizer.clip_norm is not None and result.grad_norm > spec.optimizer.clip_norm
    epoch = min(store.manifest.n_rows, spec.token_budget)
    return step, {
        "lr": plan.lr,
        "not_fired": float((step.n_tokens_since_fired >= epoch).float().mean()),
        "clipped": n_clipped / spec.n_steps,
    }


def held_out(step: TrainStep, store: ActivationStore) -> dict[str, float]:
    """What the dictionary does on held-out rows, as it would be exported."""
    plan, params = step.plan, step.parameters
    rows = torch.cat([_held_out_rows(store, hook.name) for hook in plan.hooks], dim=1)
    normalised = step._normalised(rows)
    inputs, targets = normalised[:, : plan.d_in], normalised[:, -plan.d_out :]
    residual, total, n_active = 0.0, (targets - targets.mean(0)).double().square().sum(), 0
    fired = torch.zeros(plan.d_sae, dtype=torch.bool)
    for part in range(0, len(rows), 1024):
        x, y = inputs[part : part + 1024], targets[part : part + 1024]
        acts = activations(step, x - params.b_dec if plan.target is None else x, rows[part : part + 1024])
        residual += float((acts @ params.W_dec + params.b_dec - y).double().square().sum())
        n_active += int((acts > 0).sum())
        fired |= (acts > 0).any(0)
    return {
        "fvu": residual / float(total),
        "l0": n_active / len(rows),
        "never_fired": 1 - float(fired.float().mean()),
    }


def activations(step: TrainStep, inputs: Tensor, rows: Tensor) -> Tensor:
    """Features (n, d_sae) at inference."""
    activation, params = step.plan.spec.activation, step.parameters
    if isinstance(activation, BatchTopK | Matryoshka):
        pre = inputs @ params.W_enc + params.b_enc
        return torch.where(pre > step.state["threshold"], pre, 0.0)
    picks = step.select(rows)
    dense = torch.zeros(len(rows), params.n_local)
    dense[picks.token_indices(), picks.features] = picks.values.float()
    return dense


def _held_out_rows(store: ActivationStore, name: str) -> Tensor:
    parts = [store.read_rows(name, segment, 0, segment.n_rows) for segment in store.manifest.split("held_out")]
    return torch.from_numpy(np.concatenate(parts))


if __name__ == "__main__":
    main()
