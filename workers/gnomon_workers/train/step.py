"""One training step: encode, the variant's sparse terms, exchange, weight gradients, alignment, Adam, retraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gnomon.errors import GnomonError
from gnomon_workers.kernels.choice import choose_kernels
from gnomon_workers.kernels.dense import dense_gradients
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.runtime.failpoints import Failpoint, failpoint
from gnomon_workers.sae.alignment import alignment_scores, check_pole
from gnomon_workers.sae.encoder import Encoder, PreActivations, choose_encoder_dtype
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.optimizer import AdamState, learning_rate, owned_rows, share_rows
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.plan import Normalisation, TrainPlan
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.sparse import FeatureSegments, Picks, segment_sums, sort_by_feature
from gnomon_workers.sae.variants import Batch, make_variant
from gnomon_workers.sae.variants.dense import DenseGradient
from gnomon_workers.train.exchange import exchange, fired_anywhere, reduce_dense, start_inputs


class NonFinite(GnomonError):
    """The loss or a gradient is no longer a number."""

    default_code = "non_finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step leaves for the metrics: of the whole batch and equal on every rank, where nothing else is said."""

    loss: float
    """Mean over tokens of |x - x_hat|^2, in units of normalised inputs; without penalties."""
    objective: float
    """What was minimised: the loss with all penalties, by their coefficients."""
    parts: dict[str, float]
    """Parts of the objective that the variant has, by name: "aux_loss", "penalty"."""
    grad_norm: float
    lr: float
    targets: Tensor
    """(tokens, d_out) x - b_dec of this replica's tokens."""
    n_active: int
    """Active (token, feature) pairs of this rank."""


class TrainStep:
    """Parameters, optimizer state and counters of one rank, and the step that moves them."""

    def __init__(self, plan: TrainPlan, parameters: Parameters, mesh: ProcessMesh) -> None:
        self.plan = plan
        self.parameters = parameters
        self.mesh = mesh
        mesh.clock.on_gpu = parameters.W_dec.is_cuda
        self.variant = make_variant(plan.spec.activation, plan.setting)
        self.optimizer = AdamState.create(
            parameters,
            betas=(plan.spec.beta1, plan.spec.beta2),
            eps=plan.spec.optimizer.eps,
            rates=plan.bias_rates,
            own=self._own_rows(),
        )
        self.n_tokens_since_fired = torch.zeros(parameters.n_local, dtype=torch.int64, device=parameters.W_dec.device)
        self.state = self.variant.initial_state()
        """Running numbers of the variant, kept in checkpoints; in float64, for they average thousands."""
        self._normalised = Normalisation.of(plan.hooks, parameters.b_dec)
        device = parameters.W_dec.device
        n_products = plan.spec.batch_size * plan.d_in * plan.d_sae
        choose = partial(choose_encoder_dtype, n_products=n_products, device=device, mesh=mesh)
        self._dense_dtype = choose(plan.spec.encoder_dtype)
        self._encoder = Encoder(choose(plan.encoder_dtype))
        self._kernels = choose_kernels(plan.spec.kernels, device)
        self._exchanges_batch = mesh.dp == 1 or plan.shape.exchanges_batch
        self._weights = self._kernels.weight_update(parameters, self.optimizer, plan.spec.alignment)

    def __call__(self, step: int, x: Tensor) -> StepResult:
        """Train on this replica's (tokens, d_in) share of batch number `step` (from 0).

        A transcoder's rows are (tokens, d_in + d_out): the target follows the input. Raises NonFinite on every rank
        at the same step, before anything has changed.
        """
        encoder_inputs, targets = self._inputs_and_targets(x)
        clock = self.mesh.clock
        # before anything waits, so that the inputs travel beside the encoder's product; all ranks begin collectives in
        # one order, or they would wait for each other for ever
        all_inputs = start_inputs(encoder_inputs, self.mesh) if self._exchanges_batch else None
        with clock.section("sparse"):
            terms = self.variant.terms(self._batch(step, encoder_inputs, targets))
            if isinstance(terms.gradient, DenseGradient):
                gradients, fired = self._from_matrices(terms.gradient, all_inputs)
            else:
                gradients, fired = self._from_picks(terms.gradient, all_inputs)
        with clock.section("optimizer"):
            self._share_b_dec(gradients)
            sums, grad_norm = self._totals(terms.sums, gradients)
        loss, objective = sums.pop("loss"), sums.pop("objective")
        self._check_finite(step, loss, grad_norm)
        failpoint(Failpoint.STEP_BEFORE_UPDATE)
        with clock.section("optimizer"):
            lr = self._update(step, gradients, grad_norm)
            self._count(fired)
        # after all that can raise: weights of one step beside the running numbers of the next would be saved as one
        self.state = terms.state
        return StepResult(
            loss=loss,
            objective=objective,
            parts=sums,
            grad_norm=grad_norm,
            lr=lr,
            targets=targets,
            n_active=terms.n_active,
        )

    def select(self, x: Tensor) -> Picks:
        """The active features of this rank for inputs as a step gets them, without changing anything."""
        return self.variant.select(self._batch(0, *self._inputs_and_targets(x)))

    def _inputs_and_targets(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is encoded and what is to be decoded; the same tensor, but for a transcoder."""
        rows = self._normalised(x)
        if self.plan.target is None:
            # in place, for `rows` is this step's own: x may be a buffer of the reader
            inputs = rows.sub_(self.parameters.b_dec)
            return inputs, inputs
        # b_dec belongs to the target's space, so the encoder sees the input as it is
        d_in = self.plan.d_in
        return rows[:, :d_in].contiguous(), rows[:, d_in:] - self.parameters.b_dec

    def _batch(self, step: int, encoder_inputs: Tensor, targets: Tensor) -> Batch:
        return Batch(
            step=step,
            pre=PreActivations(self._encoder, encoder_inputs, self.parameters, self.mesh.clock),
            encoder_inputs=encoder_inputs,
            targets=targets,
            parameters=self.parameters,
            kernels=self._kernels,
            mesh=self.mesh,
            n_tokens_since_fired=self.n_tokens_since_fired,
            state=self.state,
            dense_dtype=self._dense_dtype,
        )

    def _from_picks(
        self, local: SparseGradient, all_inputs: Callable[[], Tensor] | None
    ) -> tuple[RowGradients, Tensor]:
        """Gradients over all replicas and the features that fired, from picks."""
        sparse = exchange(local, all_inputs, self.mesh) if all_inputs is not None else local
        # by feature, and within one by token: the order of every sum over picks, whatever mesh the picks came from
        segments = sort_by_feature(sparse.features, sparse.tokens)
        gradients = self._gradients(sparse, segments)
        fired = sparse.fired(segments.touched)
        if all_inputs is not None:
            return gradients, fired
        n_local = self.parameters.n_local
        return reduce_dense(gradients, n_local, self.mesh), fired_anywhere(fired, n_local, self.mesh)

    def _from_matrices(
        self, dense: DenseGradient, all_inputs: Callable[[], Tensor] | None
    ) -> tuple[RowGradients, Tensor]:
        """The same from matrices; replicas then have less to send than the tokens and their picks: the sums."""
        if all_inputs is not None and self.mesh.dp > 1:
            all_inputs()  # they are on their way
        gradients = dense_gradients(dense, self.parameters, self.plan.spec.alignment, self.variant)
        fired = dense.fired.nonzero().squeeze(1)
        if self.mesh.dp == 1:
            return gradients, fired
        n_local = self.parameters.n_local
        return reduce_dense(gradients, n_local, self.mesh), fired_anywhere(fired, n_local, self.mesh)

    def _gradients(self, sparse: SparseGradient, segments: FeatureSegments) -> RowGradients:
        """Of the picks given, b_dec's without what pulls it through the encoder."""
        given = {"b_enc": sparse.gradients, **sparse.vector_gradients}
        vectors = {name: torch.zeros_like(self.parameters.b_enc) for name in given}
        for name, gradients in given.items():
            vectors[name][segments.touched] = segment_sums(segments, gradients)
        projections = self.variant.projection_gradients(vectors, self.parameters)
        vectors["b_dec"] = sparse.b_dec_gradient()
        return self._weights.gradients(sparse, segments, vectors, projections)

    def _totals(self, sums: dict[str, Tensor], gradients: RowGradients) -> tuple[dict[str, float], float]:
        """The variant's sums over replicas, and the global norm of the gradients.

        b_dec is on every shard: each adds its share, so that a fault on any one reaches all. A GPU is waited for once,
        for all of these numbers: while the host waits it queues nothing.
        """
        total = self.mesh.all_reduce(torch.stack(list(sums.values())), "dp")
        squares = gradients.square_sums()
        squares["b_dec"] = squares["b_dec"] / self.mesh.features
        # squares travel and the root is taken once: every rank clips by the same bits
        square = self.mesh.all_reduce(torch.stack(list(squares.values())).sum(), "features")
        *numbers, grad_norm = torch.cat([total, square.sqrt()[None]]).tolist()
        return dict(zip(sums, numbers, strict=True)), grad_norm

    def _share_b_dec(self, gradients: RowGradients) -> None:
        """Make dL/d(b_dec) the same on every shard.

        The reconstruction's part is so already. x - b_dec enters the encoder: every unit of dL/d(projection) pulls
        b_dec against its encoder row, of which each shard has its own.
        """
        if self.plan.target is None:  # a transcoder's encoder does not see b_dec
            gradients.vectors["b_dec"] -= self.mesh.all_reduce(gradients.through_encoder, "features")

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """The norm sums over shards, and over replicas through the exchange: all ranks stop together."""
        if not math.isfinite(grad_norm):
            raise NonFinite(
                f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}; the weights are those of the "
                "step before. Lower optimizer.lr, or check the activations for infinities"
            )

    def _update(self, step: int, gradients: RowGradients, grad_norm: float) -> float:
        plan = self.plan
        lr = learning_rate(
            step,
            peak=plan.lr,
            n_steps=plan.spec.n_steps,
            warmup_steps=plan.spec.warmup_steps,
            decay_fraction=plan.spec.schedule.decay_fraction,
        )
        clip = plan.spec.optimizer.clip_norm
        clip_scale = min(1.0, clip / grad_norm) if clip is not None and grad_norm > 0 else 1.0
        # where replicas share the work an update sees only its own rows
        copy = self._encoder.copy_of(self.parameters.W_enc_rows) if not plan.spec.shard_optimizer else None
        smallest = self._weights.apply(gradients, lr=lr, clip_scale=clip_scale, encoder_copy=copy)
        self._encoder.keep(copy is not None)
        if plan.spec.shard_optimizer:
            share_rows(self.parameters, self.mesh)
        if smallest is not None:
            # all shards must stop together: one that stopped alone would look like a lost worker
            check_pole(float(torch.stack(self.mesh.all_gather(smallest, "world")).min()))
        return lr

    def replaced(self) -> None:
        """Say that the parameters were overwritten from outside, by a checkpoint's."""
        self._encoder.keep(False)

    def _own_rows(self) -> range:
        """Features whose rows this replica moves."""
        n_local = self.parameters.n_local
        if not self.plan.spec.shard_optimizer:
            return range(n_local)
        return owned_rows(n_local, self.mesh.replica, self.mesh.dp)

    def _count(self, fired: Tensor) -> None:
        self.n_tokens_since_fired += self.plan.spec.batch_size
        self.n_tokens_since_fired[fired] = 0

    def alignment_scores(self) -> Tensor | None:
        """<w, d> of this shard's features, (n_local,); None for a transcoder, whose score is undefined."""
        if self.plan.target is not None:
            return None
        return alignment_scores(self.parameters.W_enc_rows, self.parameters.W_dec)
