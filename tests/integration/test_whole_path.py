"""The whole path on a live service, with a rank, the dispatcher and the API killed while a job trains."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import gnomon
from gnomon.client import Client
from gnomon.errors import Unavailable
from gnomon.events import TERMINAL_STATES
from gnomon.resources import Job
from gnomon.specs import (
    Adam,
    BatchTopK,
    EvaluateSpec,
    Evaluation,
    HarvestSpec,
    Mesh,
    ModelSource,
    TextSource,
    TrainSpec,
)
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.own_processes import own_pids
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long

N_STEPS = 1500
HOOK = "model.layers.2"


class Live:
    """A service on this machine, and a client of it."""

    def __init__(self, home: Path, service: Embedded, client: Client) -> None:
        self.home = home
        self.service = service
        self.client = client

    def harvest_spec(self) -> HarvestSpec:
        return HarvestSpec(
            model=ModelSource(source=str(self.home / "inputs/model"), dtype="float32"),
            text=(TextSource(url=str(self.home / "inputs/corpus.jsonl")),),
            hooks=(HOOK,),
            context_length=64,
            token_budget=20_000,
            segment_tokens=4096,
        )

    def train_spec(self) -> TrainSpec:
        return TrainSpec(
            activations=self.harvest_spec(),
            d_sae=512,
            activation=BatchTopK(k=16),
            optimizer=Adam(lr=3e-3),
            token_budget=256 * N_STEPS,
            batch_size=256,
            mesh=Mesh(features=2),
            checkpoint_every=200,
            log_every=5,
            evaluation=Evaluation(n_tokens=1000, n_ce_tokens=512),
        )

    def finish(self, job_id: str) -> Job:
        """The job once it has ended; the API may be away meanwhile."""

        def ended() -> Job | None:
            with contextlib.suppress(Unavailable):
                job = self.client.job(job_id).refresh()
                if job.state in TERMINAL_STATES:
                    return job
            return None

        return wait_until(ended, lambda: f"the end of {self.client.job(job_id)}", every_s=0.2)

    def when_training(self, job_id: str, *, after_step: int) -> None:
        """Wait until a step is reported, well before the end."""
        wait_until(
            lambda: max(self.losses(job_id), default=0) >= after_step,
            lambda: f"step {after_step} of {self.client.job(job_id)}",
        )
        step = max(self.losses(job_id))
        assert step < N_STEPS - 200, "the job is over before anything could be killed"

    def losses(self, job_id: str) -> dict[int, float]:
        """Loss by step; where a step was repeated, every attempt's must be the same."""
        found: dict[int, float] = {}
        for event in self.client.events(job_id, follow=False):
            if event.kind == "metrics":
                step, loss = event.data["step"], event.data["loss"]
                assert found.setdefault(step, loss) == loss, f"step {step} differs between attempts"
        return found

    def kill(self, words: str) -> int:
        """kill -9 one process of this service by words of its command line."""
        pid = own_pids(words)[0]
        os.kill(pid, signal.SIGKILL)
        return pid


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("home")
    (home / "inputs").mkdir()
    make_glassllm(home / "inputs/model")
    make_corpus(home / "inputs/corpus.jsonl")
    settings = load_settings(
        home=home, port=0, n_cpus=4, input_roots=(str(home / "inputs"),), lease_s=15.0, beat_s=1.0, retry_base_s=0.1
    )
    with Embedded(settings) as service, Client(service.url, service.key) as client:
        yield Live(home, service, client)


@pytest.fixture(scope="module")
def uninterrupted(live: Live) -> Job:
    """A job that nothing happened to."""
    job = live.finish(live.client.submit(live.train_spec()).id)
    assert job.state == "succeeded", job.error
    assert job.attempt == 1
    return job


def weights(live: Live, job: Job) -> dict[str, torch.Tensor]:
    """The published tensors of a job."""
    assert job.result is not None
    return dict(gnomon.load(job.result["dictionary_id"], client=live.client).state_dict())


def assert_same_run(live: Live, job: Job, uninterrupted: Job) -> None:
    """Succeeded, with the losses and the weights of the uninterrupted run, bit for bit."""
    assert job.state == "succeeded", job.error
    assert live.losses(job.id) == live.losses(uninterrupted.id)
    ours, theirs = weights(live, job), weights(live, uninterrupted)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_job_leaves_a_good_dictionary_with_its_provenance(live: Live, uninterrupted: Job) -> None:
    assert uninterrupted.result is not None
    metrics: dict[str, Any] = uninterrupted.result["metrics"]
    assert metrics["fvu"] < 0.5 and 8 <= metrics["l0"] <= 32
    assert metrics["ce_loss_score"] > 0.8
    assert metrics["alignment"]["max_deviation"] <= 1e-5
    assert metrics["tokens_per_s"]["train"] > 0 and metrics["tokens_per_s"]["evaluate"] > 0
    dictionary = gnomon.load(uninterrupted.result["dictionary_id"], client=live.client)
    assert dictionary.cfg.metadata["hf_hook_name"] == HOOK
    assert dictionary.cfg.metadata["l0"] == metrics["l0"]
    listed = [item for item in live.client.dictionaries() if item.id == uninterrupted.result["dictionary_id"]]
    assert listed[0].metrics.fvu == metrics["fvu"]
    checkpoints = [e.data for e in live.client.events(uninterrupted.id, follow=False) if e.kind == "checkpoint"]
    assert len(checkpoints) == 8
    assert all(c["max_alignment_deviation"] <= 1e-5 for c in checkpoints)


def test_a_killed_rank_costs_an_attempt_and_no_bit(live: Live, uninterrupted: Job) -> None:
    job_id = live.client.submit(live.train_spec()).id
    live.when_training(job_id, after_step=300)
    live.kill("TrainRank")
    job = live.finish(job_id)
    assert job.attempt == 2
    assert_same_run(live, job, uninterrupted)


def test_a_killed_dispatcher_comes_back_and_adopts_the_gang(live: Live, uninterrupted: Job) -> None:
    job_id = live.client.submit(live.train_spec()).id
    live.when_training(job_id, after_step=300)
    pid = live.kill("gnomon_service dispatcher")
    job = live.finish(job_id)
    assert job.attempt == 1, "the gang was not adopted"
    assert not psutil.pid_exists(pid)
    assert_same_run(live, job, uninterrupted)


def test_a_killed_api_comes_back_and_the_job_never_noticed(live: Live, uninterrupted: Job) -> None:
    job_id = live.client.submit(live.train_spec()).id
    live.when_training(job_id, after_step=300)
    live.kill("gnomon_service api")
    job = live.finish(job_id)
    assert job.attempt == 1
    assert_same_run(live, job, uninterrupted)


def test_the_same_harvest_is_made_once(live: Live, uninterrupted: Job) -> None:
    """Every job above named its harvest inline; one harvest was queued for all, and one more gives nothing new."""
    harvests = [job for job in live.client.jobs() if job.kind == "harvest"]
    assert len(harvests) == 1
    job = live.finish(live.client.submit(live.harvest_spec()).id)
    assert job.state == "succeeded" and job.result is not None
    assert job.result["n_tokens"] == 0
    assert len(list(live.client.activations())) == 1


def test_an_evaluate_job_measures_what_the_train_job_measured(live: Live, uninterrupted: Job) -> None:
    assert uninterrupted.result is not None
    spec = EvaluateSpec(
        dictionary=uninterrupted.result["dictionary_id"], evaluation=Evaluation(n_tokens=1000, n_ce_tokens=512)
    )
    job = live.finish(live.client.submit(spec).id)
    assert job.state == "succeeded" and job.result is not None, job.error
    for name in ("fvu", "l0", "ce_loss_score", "kl_score"):
        assert job.result["metrics"][name] == pytest.approx(uninterrupted.result["metrics"][name], rel=1e-6)
