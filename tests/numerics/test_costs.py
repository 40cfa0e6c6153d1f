"""What a training is said to cost is what it takes: tensors, files, and devices that are worth having."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnomon.errors import InvalidRequest
from gnomon.specs import (
    Activation,
    AuxK,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    Mesh,
    PAnneal,
    ReLU,
    StoredActivations,
    TopK,
    TrainSpec,
)
from gnomon_storage import shuffle
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.weights import write_weights
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae import memory
from gnomon_workers.sae.costs import (
    TrainJob,
    check_fits,
    checkpoint_bytes,
    choose_mesh,
    dictionary_bytes,
    meshes_that_pay,
    n_ranks,
    pay,
    smallest_that_holds,
)
from gnomon_workers.sae.memory import Rows, kept_bytes, rank_memory, touched_rows
from gnomon_workers.sae.optimizer import AdamState, owned_rows
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.sae.plan import TrainPlan
from gnomon_workers.sae.speeds import sent_bytes
from gnomon_workers.sae.variants import dense, make_variant
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.state import state_tensors
from gnomon_workers.train.step import TrainStep
from tests.support.steps import STORE, data, plan_of, step_of

ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(k=8),
    "auxk": TopK(k=8, aux=AuxK(k=4)),
    "batchtopk": BatchTopK(k=8),
    "matryoshka": Matryoshka(k=8),
    "relu": ReLU(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
    "p_anneal": PAnneal(),
}
ROWS = Rows(n_rows=4096)


def n_bytes(*tensors: torch.Tensor) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def made(plan: TrainPlan, *, shard: int = 0, replica: int = 0) -> tuple[int, int]:
    """Bytes of the parameters and of the moments that one rank of a plan makes."""
    n_local = plan.d_sae // plan.mesh.features
    parameters = make_parameters(
        seed=0,
        d_in=plan.d_in,
        start=shard * n_local,
        stop=(shard + 1) * n_local,
        b_dec=torch.zeros(plan.d_out),
        tied=plan.spec.alignment == "tied",
        vectors=make_variant(plan.spec.activation, plan.setting).initial_vectors(),
    )
    own = owned_rows(n_local, replica, plan.mesh.dp) if plan.spec.shard_optimizer else range(n_local)
    state = AdamState.create(parameters, betas=(0.9, 0.9), eps=1e-8, own=own)
    moments = [*state.first.values(), *state.second.values()]
    return n_bytes(*parameters.tensors().values()), n_bytes(*moments)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(features=4), Mesh(dp=2, features=2)])
def test_weights_and_moments_are_the_tensors_that_a_rank_makes(name: str, mesh: Mesh) -> None:
    plan = plan_of(mesh=mesh, activation=ACTIVATIONS[name])
    weights, moments = made(plan)
    ages = 8 * plan.d_sae // mesh.features
    kept = kept_bytes(plan.shape)
    assert (kept["weights"], kept["moments"]) == (weights, moments + ages)


@pytest.mark.parametrize("fields", [{"alignment": "tied"}, {"alignment": "none"}, {"shard_optimizer": True}])
def test_tied_and_shared_state_is_counted_as_it_is_made(fields: dict[str, Any]) -> None:
    plan = plan_of(mesh=Mesh(dp=4, features=2), **fields)
    weights, moments = made(plan)
    kept = kept_bytes(plan.shape)
    assert (kept["weights"], kept["moments"] - 8 * plan.d_sae // 2) == (weights, moments)


def after_steps(**fields: Any) -> TrainStep:
    """A step that was made twice."""
    plan = plan_of(d_sae=512, batch_size=64, token_budget=6400, **fields)
    step = step_of(plan)
    for number in range(2):
        step(number, data(64, seed=number))
    return step


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_a_step_keeps_is_what_it_is_said_to_keep(name: str) -> None:
    step = after_steps(activation=ACTIVATIONS[name])
    kept = kept_bytes(step.plan.shape)
    encoder: Any = step._encoder
    update: Any = step._weights
    state = [*state_tensors(step).values()]
    assert kept["weights"] + kept["moments"] == n_bytes(*state)
    assert kept["pre_activations"] == n_bytes(encoder._hidden_pre)
    if len(update._decoder):  # steps through matrices keep none of their gradients
        assert kept["gradients"] == pytest.approx(n_bytes(update._decoder, update._encoder), rel=0.2)


def test_a_rounded_encoder_is_half_as_wide_and_has_a_copy_of_its_weights() -> None:
    step = after_steps(encoder_dtype="bfloat16")
    kept, whole = kept_bytes(step.plan.shape), kept_bytes(after_steps().plan.shape)
    encoder: Any = step._encoder
    assert n_bytes(encoder._hidden_pre) == whole["pre_activations"] / 2
    assert kept["pre_activations"] == n_bytes(encoder._hidden_pre, encoder._copy)


def test_constants_that_are_said_twice_are_equal() -> None:
    """What costs are told by is written without torch and storage, and beside what it is of."""
    assert memory.BUFFER_BYTES == shuffle.BUFFER_BYTES
    assert {"cpu": dense.BLOCK_BYTES["cpu"], "gpu": dense.BLOCK_BYTES["cuda"]} == memory.BLOCK_BYTES
    shares = dense.DENSE_SHARE[torch.float32], dense.DENSE_SHARE[torch.bfloat16]
    assert shares == (memory.DENSE_SHARE, memory.DENSE_SHARE / 2)


def test_few_picks_touch_few_features() -> None:
    few = plan_of(d_sae=4096, batch_size=32, activation=TopK(k=2)).shape
    many = plan_of(d_sae=4096, batch_size=4096, token_budget=4096 * 10, activation=TopK(k=64)).shape
    assert touched_rows(few) < 100 and touched_rows(many) == 4096


def test_variants_add_what_they_keep_and_share_what_passes() -> None:
    shape = plan_of(d_sae=4096).shape
    few_rows = replace(ROWS, n_rows=100)  # the steps take more than the beginning
    one, three = (rank_memory([shape] * n, "cpu", few_rows, [str(i) for i in range(n)]) for n in (1, 3))
    assert one.phase == three.phase == "step"
    assert three.parts["weights"] == 3 * one.parts["weights"]
    assert three.parts["batch"] == one.parts["batch"] and three.parts["loader"] == one.parts["loader"]
    assert three.n_bytes == sum(three.parts.values()) > three.state_bytes == 3 * one.state_bytes


def test_while_a_dictionary_is_initialised_those_before_it_are_there_and_their_state_counts_as_ever() -> None:
    shape = plan_of(d_sae=512).shape
    one, three = (rank_memory([shape] * n, "cpu", ROWS, [str(i) for i in range(n)]) for n in (1, 3))
    assert (one.phase, three.phase, three.variant) == ("initialise", "initialise", "2")
    assert (one.parts["weights"], three.parts["moments"]) == (0, 2 * kept_bytes(shape)["moments"])
    assert one.state_bytes == kept_bytes(shape)["weights"] + kept_bytes(shape)["moments"]
    assert three.state_bytes == 3 * one.state_bytes


def test_rows_beyond_two_buffers_take_no_more() -> None:
    shape = plan_of(d_in=256).shape
    small, large, larger = (rank_memory([shape], "cpu", Rows(n_rows=n)).parts["loader"] for n in (1000, 10**7, 10**9))
    assert small < large == larger


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_checkpoint_and_a_dictionary_take_what_they_are_said_to(name: str, tmp_path: Path) -> None:
    plan = plan_of(d_in=64, d_sae=1024, activation=ACTIVATIONS[name])
    step = step_of(plan, ProcessMesh.single())
    folder = Location.open(f"file://{tmp_path}/checkpoints")
    saved = save_checkpoint(folder, step, number=1, attempt=1)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert checkpoint_bytes(plan.shape) == pytest.approx(on_disk, rel=0.02)
    write_weights(tmp_path / "weights", plan, saved, folder)
    without = plan.spec.model_copy(update={"evaluation": None})
    shape = plan_of(d_in=64, d_sae=1024, activation=ACTIVATIONS[name], evaluation=None).shape
    assert shape.spec.evaluation is without.evaluation
    assert dictionary_bytes(shape) == pytest.approx((tmp_path / "weights").stat().st_size, rel=0.02)


# ---------------------------------------------------------------------------------------------- meshes


def spec_of(**fields: Any) -> TrainSpec:
    """A train spec with a mesh of "auto"."""
    given: dict[str, Any] = {"d_sae": 16_384, "batch_size": 2048, "token_budget": 2048 * 1000, **fields}
    return TrainSpec(activations=STORE, **given)


def test_two_shards_pay_where_they_were_measured_to() -> None:
    """docs/performance.md: two shards take .62 of the time of one, two replicas .81, four of either share two cores."""
    job = TrainJob.of(spec_of(), 512)
    one, shards, replicas = (job.step_seconds(mesh) for mesh in (Mesh(), Mesh(features=2), Mesh(dp=2)))
    assert shards / one == pytest.approx(0.62, abs=0.08)
    assert replicas / one == pytest.approx(0.75, abs=0.1)
    assert choose_mesh(spec_of(), 512, 2, None) == Mesh(features=2)


def test_a_small_dictionary_is_not_spread() -> None:
    small = spec_of(d_sae=64, batch_size=64, token_budget=6400)
    assert choose_mesh(small, 16, 64, None) == Mesh()
    assert pay(TrainJob.of(small, 16), 64, None).why == "on more ranks none is faster"


def test_of_very_many_meshes_sizes_are_left_out_and_the_ends_kept() -> None:
    job = TrainJob.of(spec_of(d_sae=720_720, batch_size=55_440, token_budget=10**7), 64)
    meshes = job.meshes(512)
    assert 100 < len(meshes) <= 300
    assert meshes[0] == Mesh() and n_ranks(meshes[-1]) > 500 and meshes == sorted(meshes, key=n_ranks)
    assert len(job.meshes(64)) == sum(
        55_440 % dp == 0 == 720_720 % features for dp in range(1, 65) for features in range(1, 64 // dp + 1)
    )


def test_a_mesh_that_is_given_is_taken() -> None:
    assert choose_mesh(spec_of(mesh=Mesh(dp=4, features=8)), 512, 1, 1.0) == Mesh(dp=4, features=8)


def test_memory_asks_for_shards_that_time_does_not() -> None:
    job = TrainJob.of(spec_of(d_sae=64, batch_size=64, token_budget=6400), 16)
    large = TrainJob.of(spec_of(d_sae=2**20, batch_size=64, token_budget=6400), 1024)
    room = large.memory(Mesh(features=4)).n_bytes + 1.0
    assert pay(large, 8, room).mesh.features >= 4 > pay(job, 8, room).mesh.features
    assert "enough memory" in pay(large, 8, room).why


@pytest.mark.parametrize("memory_bytes", [None, 2 * 2**30, 4 * 2**30])
def test_meshes_that_pay_on_ever_fewer_devices_all_have_the_memory(memory_bytes: float | None) -> None:
    job = TrainJob.of(spec_of(d_sae=2**17, batch_size=4096, token_budget=4096 * 1000), 1024)
    found = list(meshes_that_pay(job, 8, memory_bytes))
    sizes = [n_ranks(mesh) for mesh in found]
    assert found[0] == pay(job, 8, memory_bytes).mesh
    assert sizes == sorted(set(sizes), reverse=True)
    if memory_bytes is None:
        assert sizes[-1] == 1
    else:
        assert all(job.memory(mesh).n_bytes <= memory_bytes for mesh in found)
        smaller = [mesh for mesh in job.meshes(8) if n_ranks(mesh) < sizes[-1]]
        assert smaller and all(job.memory(mesh).n_bytes > memory_bytes for mesh in smaller)


def test_the_smallest_mesh_that_holds_a_dictionary_may_be_larger_than_the_cluster() -> None:
    job = TrainJob.of(spec_of(d_sae=2**20, batch_size=8, token_budget=8000), 4096)
    assert smallest_that_holds(job, 8 * 2**30) == Mesh(features=16)
    assert job.memory(Mesh(features=16)).state_bytes <= 8 * 2**30 < job.memory(Mesh(features=8)).state_bytes
    with pytest.raises(InvalidRequest, match="alone need"):
        smallest_that_holds(job, 1000.0)


def test_a_cluster_may_have_more_devices_than_an_axis_has_ranks() -> None:
    job = TrainJob.of(spec_of(d_sae=2**20, batch_size=2**13, token_budget=2**20), 64)
    assert max(max(mesh.dp, mesh.features) for mesh in job.meshes(5000)) == 1024


def test_what_can_never_fit_is_refused_with_the_term() -> None:
    job = TrainJob.of(spec_of(d_sae=2**20, batch_size=8, token_budget=8000), 4096)
    with pytest.raises(
        InvalidRequest, match="W_enc, W_dec and their moments alone need 12 GiB a rank on 1 x 8"
    ) as caught:
        pay(job, 8, 8 * 2**30)
    assert (caught.value.code, caught.value.detail["term"]) == ("does_not_fit", "state")
    check_fits(job, Mesh(features=8), None)
    check_fits(job, Mesh(features=8), 13 * 2**30)


sizes = st.integers(1, 12).map(lambda power: 2**power)
jobs = st.builds(
    lambda d_in, d_sae, batch, k, activation: TrainJob.of(
        TrainSpec(
            activations=StoredActivations(id="act_" + "0" * 32),
            d_sae=max(d_sae, 32),
            batch_size=batch,
            token_budget=batch * 100,
            activation=activation if activation.kind != "topk" else TopK(k=min(k, max(d_sae, 32))),
        ),
        d_in,
    ),
    d_in=st.integers(8, 512),
    d_sae=st.integers(32, 50_000),
    batch=st.integers(1, 4096),
    k=sizes,
    activation=st.sampled_from([TopK(k=1), ReLU(), Gated(), JumpReLU(), BatchTopK(k=4)]),
)


@given(job=jobs, n_devices=st.integers(1, 24), gib=st.one_of(st.none(), st.floats(0.01, 16)))
def test_a_chosen_mesh_divides_fits_and_is_worth_its_devices(job: TrainJob, n_devices: int, gib: float | None) -> None:
    memory_bytes = None if gib is None else gib * 2**30
    try:
        mesh = pay(job, n_devices, memory_bytes).mesh
    except InvalidRequest as error:
        assert error.code == "does_not_fit"
        assert memory_bytes is not None
        assert all(job.memory(mesh).state_bytes > memory_bytes for mesh in job.meshes(n_devices))
        return
    assert n_ranks(mesh) <= n_devices
    assert job.spec.batch_size % mesh.dp == 0 and job.d_sae % mesh.features == 0
    fitting = [m for m in job.meshes(n_devices) if memory_bytes is None or job.memory(m).n_bytes <= memory_bytes]
    if fitting:
        assert mesh in fitting
        least = min(map(n_ranks, fitting))
        base_s = min(job.step_seconds(m) for m in fitting if n_ranks(m) == least)
        assert base_s * least / (job.step_seconds(mesh) * n_ranks(mesh)) >= 0.7 - 1e-9


@given(job=jobs, n_devices=st.integers(1, 16))
def test_more_devices_never_make_the_chosen_mesh_slower(job: TrainJob, n_devices: int) -> None:
    fewer, more = (job.step_seconds(pay(job, n, None).mesh) for n in (n_devices, n_devices + 1))
    assert more <= fewer


@given(job=jobs)
def test_one_rank_sends_nothing_and_shards_divide_the_state(job: TrainJob) -> None:
    (one,) = job.shapes(Mesh())
    assert sent_bytes(one) == 0
    (two,) = job.shapes(Mesh(features=2))
    assert sent_bytes(two) > 0
    assert kept_bytes(two)["moments"] <= kept_bytes(one)["moments"] * 0.6 + 32 * (job.d_in + 64)
