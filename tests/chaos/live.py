"""A whole service on this machine, and jobs that it does for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gnomon
from gnomon import Client, Mesh, ModelSource, TextSource, TopK, TrainSpec
from gnomon.errors import Unavailable
from gnomon.resources import TERMINAL_STATES, Job
from gnomon.specs import Adam, Evaluation, HarvestSpec
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import Settings, load_settings
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.waiting import wait_until

BATCH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to."""

    losses: dict[int, float]
    """By step."""
    weights: dict[str, bytes]
    """By name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A service, and a client of it."""

    settings: Settings
    client: Client
    key: str
    inputs: Path

    def submit(self, *, n_steps: int, every: int, n_tokens: int = 8192) -> str:
        """Ask for a training with its harvest, a segment for each 1024 tokens, and a checkpoint every few steps."""
        harvest = HarvestSpec(
            model=ModelSource(source=str(self.inputs / "model"), dtype="float32"),
            text=(TextSource(url=str(self.inputs / "corpus.jsonl")),), hooks=("model.layers.1",), context_length=64,
            token_budget=n_tokens, segment_tokens=1024,
        )  # fmt: skip
        spec = TrainSpec(
            activations=harvest, d_sae=256, activation=TopK(k=8), optimizer=Adam(lr=3e-3), batch_size=BATCH,
            token_budget=BATCH * n_steps, mesh=Mesh(features=2), log_every=1, checkpoint_every=every,
            evaluation=Evaluation(n_tokens=400, n_ce_tokens=256),
        )  # fmt: skip
        return self.client.submit(spec).id

    def job(self, job_id: str) -> Job:
        """As it is now."""
        return self.client.job(job_id).job

    def finish(self, job_id: str) -> Job:
        """A job once it has ended, which it must well."""

        def ended() -> Job | None:
            with suppress(Unavailable):
                job = self.job(job_id)
                return job if job.state in TERMINAL_STATES else None
            return None

        job = wait_until(ended, lambda: f"the end of {self.job(job_id)}", every_s=0.2)
        assert job.state == "succeeded", job.error
        return job

    def told(self, job_id: str, kind: str) -> list[dict[str, Any]]:
        """Data of a job's events of a kind."""
        return [dict(event.data) for event in self.client.events(job_id) if event.kind == kind]

    def n_waits(self, *job_ids: str) -> int:
        """How often jobs said that they wait for a store."""
        said = [data["message"] for job_id in job_ids for data in self.told(job_id, "log")]
        return sum(message.startswith("waiting (store_") for message in said)

    def trained(self, job: Job) -> Trained:
        """What a job came to; of a step that was made again, all losses must agree."""
        losses: dict[int, float] = {}
        for data in self.told(job.id, "metrics"):
            assert losses.setdefault(data["step"], data["loss"]) == data["loss"], data["step"]
        assert job.result is not None
        tensors = gnomon.load(job.result["dictionary_id"], client=self.client).state_dict()
        return Trained(losses=losses, weights={name: tensor.numpy().tobytes() for name, tensor in tensors.items()})

    def forget_harvest(self) -> None:
        """Have the store of activations deleted, as a user does, so that the next job harvests anew."""
        for each in self.client.activations():
            if each.state == "sealed":
                self.client.delete_activations(each.id)
        wait_until(lambda: all(each.state == "deleted" for each in self.client.activations()), "the stores to go")


@contextmanager
def live_service(home: Path, **settings: Any) -> Iterator[Live]:
    """A service with settings of its own, gone afterwards."""
    inputs = home / "inputs"
    inputs.mkdir(parents=True)
    make_glassllm(inputs / "model")
    make_corpus(inputs / "corpus.jsonl")
    values = load_settings(home=home, port=0, n_cpus=3, input_roots=(str(inputs),), **settings)
    with Embedded(values) as service, Client(service.url, service.key) as client:
        yield Live(settings=values, client=client, key=service.key, inputs=inputs)
