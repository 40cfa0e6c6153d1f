"""Rates are learned from the nearest finished jobs; what is far says nothing, and the error says how near they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.events import TrainingMeasured
from gnomon.resources import ClusterState, TrainedOn
from gnomon.specs import Gated, Mesh, TopK, TrainSpec
from gnomon_service.planning.costs import Prices, Room
from gnomon_service.planning.rates import (
    FAR,
    LEAST_ERROR,
    PRIOR_ERROR,
    Finished,
    HarvestSize,
    Rate,
    TrainingRates,
    finished_training,
    learned,
)
from gnomon_workers.sae.costs import TrainJob
from gnomon_workers.train.job import MeanRate
from tests.support.service_jobs import harvest_spec, stored


def job_of(**fields: Any) -> TrainJob:
    """A training of inputs of width 256."""
    given: dict[str, Any] = {"d_sae": 8192, "batch_size": 1024, "token_budget": 10**6, **fields}
    return TrainJob.of(TrainSpec(activations=stored(), **given), 256)


def ran(tokens_per_s: float, mesh: Mesh | None = None) -> TrainedOn:
    """What a training ran on."""
    return TrainedOn(mesh=mesh or Mesh(), device="cpu", d_in=256, tokens_per_s=tokens_per_s)


def test_without_jobs_the_rate_is_the_documented_one() -> None:
    assert learned(100.0, (1.0,), []) == Rate(tokens_per_s=100.0, error=PRIOR_ERROR, n_jobs=0)
    assert learned(100.0, (0.0,), [Finished(place=(FAR + 1,), ratio=9.0)]).n_jobs == 0


def test_the_same_job_again_takes_what_it_took() -> None:
    job = job_of()
    rate = TrainingRates({"cpu": [finished_training(job, ran(321.0))]}).of(job, Mesh())
    assert rate.tokens_per_s == pytest.approx(321) and rate.error == LEAST_ERROR


def test_a_near_job_is_scaled_by_its_work() -> None:
    rates = TrainingRates({"cpu": [finished_training(job_of(), ran(1000.0))]})
    twice = rates.of(job_of(d_sae=16_384), Mesh())
    assert 400 < twice.tokens_per_s < 700 and LEAST_ERROR < twice.error < 0.3
    other_kind = rates.of(job_of(activation=Gated()), Mesh())
    assert other_kind.error > twice.error and other_kind.tokens_per_s < 1000


def test_runs_that_disagree_make_the_error_larger() -> None:
    job = job_of()
    agreeing, differing = (
        TrainingRates({"cpu": [finished_training(job, ran(rate)) for rate in rates]}).of(job, Mesh())
        for rates in ((100.0, 100.0), (50.0, 200.0))
    )
    assert agreeing.tokens_per_s == pytest.approx(differing.tokens_per_s) == pytest.approx(100)
    assert differing.error > agreeing.error + 0.5


@given(
    distances=st.lists(st.floats(0, 20), min_size=1, max_size=12),
    ratio=st.floats(0.01, 100),
    modelled=st.floats(1, 1e6),
)
def test_jobs_that_agree_are_believed_and_the_error_is_bounded(
    distances: list[float], ratio: float, modelled: float
) -> None:
    found = learned(modelled, (0.0,), [Finished(place=(distance,), ratio=ratio) for distance in distances])
    assert LEAST_ERROR <= found.error <= PRIOR_ERROR
    if min(distances) <= FAR:
        assert math.isclose(found.tokens_per_s, modelled * ratio, rel_tol=1e-9)
        nearer = learned(modelled, (0.0,), [Finished(place=(min(distances) / 2,), ratio=ratio)])
        assert nearer.error <= found.error


def test_a_harvest_is_as_much_slower_as_its_model_is_larger() -> None:
    def size(n_parameters: int, n_workers: int = 1) -> HarvestSize:
        return HarvestSize(spec=harvest_spec(), n_parameters=n_parameters, n_workers=n_workers, device="cpu")

    assert size(10**8).modelled == pytest.approx(10 * size(10**9).modelled)
    assert size(10**8, 4).modelled == pytest.approx(4 * size(10**8).modelled)
    point = Finished(place=size(10**8).place, ratio=0.5)
    assert learned(size(10**8).modelled, size(10**8).place, [point]).tokens_per_s == size(10**8).modelled / 2


def test_the_mean_rate_counts_every_step_once() -> None:
    measured = MeanRate(n_tokens=100)
    for tokens, rate in ((200, 10.0), (200, 10.0), (300, 50.0)):  # two variants tell of the first hundred
        measured.add(TrainingMeasured(step=1, tokens=tokens, tokens_per_s=rate, peak_memory_bytes=tokens))
    assert measured.tokens_per_s == pytest.approx(200 / (10 + 2)) and measured.peak_memory_bytes == 300
    assert MeanRate().tokens_per_s is None


def test_hours_and_money_follow_from_the_rate() -> None:
    rate = Rate(tokens_per_s=1000.0, error=0.2, n_jobs=2)
    told = Prices(gpu_hour=3.0, currency="EUR").duration(rate, 7_200_000, 4, "gpu")
    assert (told.hours, told.device_hours, told.cost) == (2.0, 8.0, 24.0)
    assert Prices(gpu_hour=3.0).duration(rate, 10, 1, "cpu").cost is None
    assert Prices(cpu_hour=0.0).duration(rate, 10, 1, "cpu").cost == 0


def test_room_is_that_of_gpus_where_there_are_any() -> None:
    seen = {"seen_at": "2026-01-01T00:00:00Z", "n_cpus": 16}
    gpus, cpus = Room.of(ClusterState.read(seen | {"n_gpus": 2})), Room.of(ClusterState.read(seen))
    assert gpus is not None and (gpus.n_places, gpus.what, gpus.device) == (2, "GPUs", "gpu")
    assert cpus is not None and (cpus.n_places, cpus.what, cpus.device) == (16, "CPUs", "cpu")
    assert Room.of(ClusterState()) is None


def test_a_variant_more_is_a_step_more() -> None:
    one = job_of()
    two = job_of(variants=({"name": "a"}, {"name": "b", "k": 16}), activation=TopK(k=32))
    assert two.step_seconds(Mesh()) > 1.8 * one.step_seconds(Mesh())
