"""One training step: candidates, exact selection, sparse decode, sparse gradients, alignment, Adam, retraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.errors import GnomonError
from gnomon.specs import BatchTopK
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.parallel.select import BatchTopKSelector, global_topk
from gnomon_workers.sae.alignment import RULES, check_pole, row_dot
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.sparse import (
    Picks,
    activation_gradients,
    decode,
    row_gradients,
    segment_sums,
    sort_by_feature,
)
from gnomon_workers.train.exchange import SparseGradient, exchange, local_gradient
from gnomon_workers.train.optimizer import AdamState, learning_rate
from gnomon_workers.train.plan import TrainPlan


class NonFinite(GnomonError):
    """The loss or a gradient is no longer a number."""

    default_code = "non_finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step leaves for the metrics; sums over the whole batch, equal on every rank."""

    loss: float
    """Mean over tokens of |x - x_hat|^2, in units of normalised inputs; without the auxiliary term."""
    aux_loss: float
    grad_norm: float
    lr: float
    inputs: Tensor
    """(batch, d_in) x - b_dec of the whole batch."""
    n_active: int
    """Picks of this rank."""


class TrainStep:
    """Parameters, optimizer state and counters of one rank, and the step that moves them."""

    def __init__(self, plan: TrainPlan, parameters: Parameters, mesh: ProcessMesh) -> None:
        self.plan = plan
        self.parameters = parameters
        self.mesh = mesh
        self.optimizer = AdamState.create(plan.optimizer, parameters)
        self.n_tokens_since_fired = torch.zeros(parameters.n_local, dtype=torch.int64, device=parameters.W_dec.device)
        self.threshold = 0.0
        """Running mean of the smallest kept activation (BatchTopK); in float64, for it averages thousands."""
        self._selector = BatchTopKSelector()
        self._hidden_pre = torch.empty(0)

    def __call__(self, step: int, x: Tensor) -> StepResult:
        """Train on this replica's (tokens, d_in) share of batch number `step` (from 0).

        Raises NonFinite on every rank at the same step, before anything has changed.
        """
        plan, params = self.plan, self.parameters
        encoder_inputs = x * plan.scale - params.b_dec
        hidden_pre = self._encode(encoder_inputs)
        picks, cut = self._select(hidden_pre)
        reconstruction = self.mesh.all_reduce(decode(picks, params.W_dec), "features")
        residual = reconstruction - encoder_inputs  # x_hat - x: b_dec cancels
        sparse = self._gradient_of(picks, encoder_inputs, residual * (2 / plan.batch_size))
        grad_b_dec = sparse.residual_gradients.sum(0)
        self._zero_grads()
        fired = self._add_weight_gradients(sparse)
        aux_loss = self._add_auxiliary(hidden_pre, encoder_inputs, residual) if plan.aux is not None else 0.0
        grad_norm = self._finish_gradients(grad_b_dec)
        loss = _sum_of_squares(sparse.residual_gradients) * plan.batch_size / 4
        self._check_finite(step, loss, grad_norm)
        lr = self._update(step, grad_norm)
        self._count(step, fired, cut)
        return StepResult(
            loss=loss,
            aux_loss=aux_loss,
            grad_norm=float(grad_norm),
            lr=lr,
            inputs=sparse.encoder_inputs,
            n_active=len(picks.features),
        )

    def select(self, x: Tensor) -> Picks:
        """The picks of this rank for (tokens, d_in) inputs, without changing anything."""
        hidden_pre = self._encode(x * self.plan.scale - self.parameters.b_dec)
        return self._select(hidden_pre)[0]

    def _encode(self, encoder_inputs: Tensor) -> Tensor:
        shape = (len(encoder_inputs), self.parameters.n_local)
        if self._hidden_pre.shape != shape:
            self._hidden_pre = encoder_inputs.new_empty(shape)
        return torch.addmm(self.parameters.b_enc, encoder_inputs, self.parameters.W_enc_rows.t(), out=self._hidden_pre)

    def _select(self, hidden_pre: Tensor) -> tuple[Picks, float]:
        activation = self.plan.activation
        if isinstance(activation, BatchTopK):
            return self._selector.select(hidden_pre, activation.k * self.plan.batch_size, self.mesh)
        return global_topk(hidden_pre, activation.k, self.mesh), 0.0

    def _gradient_of(self, picks: Picks, encoder_inputs: Tensor, residual_gradients: Tensor) -> SparseGradient:
        gradients = activation_gradients(picks, residual_gradients, self.parameters.W_dec)
        return exchange(local_gradient(picks, gradients, encoder_inputs, residual_gradients), self.mesh)

    def _zero_grads(self) -> None:
        for grad in self.optimizer.grads.values():
            grad.zero_()

    def _add_weight_gradients(self, sparse: SparseGradient) -> Tensor:
        """Add the gradients of one reconstruction; returns the features that take part in it."""
        grads = self.optimizer.grads
        segments = sort_by_feature(sparse.features, sparse.tokens)
        decoder_rows = row_gradients(segments, sparse.values, sparse.residual_gradients)
        encoder_rows = row_gradients(segments, sparse.gradients, sparse.encoder_inputs)
        grads["W_dec"].index_add_(0, segments.touched, decoder_rows)
        # a tied dictionary has one matrix, whose gradient is the sum of both
        grads.get("W_enc_rows", grads["W_dec"]).index_add_(0, segments.touched, encoder_rows)
        grads["b_enc"].index_add_(0, segments.touched, segment_sums(segments, sparse.gradients))
        return segments.touched

    def _add_auxiliary(self, hidden_pre: Tensor, encoder_inputs: Tensor, residual: Tensor) -> float:
        """AuxK: dead features reconstruct the residual, without b_dec; its gradient reaches the encoder too."""
        aux = self.plan.aux
        assert aux is not None
        is_dead = self.n_tokens_since_fired >= self.plan.dead_after_tokens
        if not int(self.mesh.all_reduce(is_dead.sum(), "features")):
            return 0.0
        masked = hidden_pre.masked_fill(~is_dead, -torch.inf)
        picks = _finite(global_topk(masked, self.plan.k_aux, self.mesh, relu=False))
        target = -residual
        mean = self.mesh.all_reduce(target.sum(0), "dp") / self.plan.batch_size
        total = self.mesh.all_reduce(_sum_of_squares_tensor(target - mean), "dp")
        error = self.mesh.all_reduce(decode(picks, self.parameters.W_dec), "features") - target
        coefficient = aux.coefficient / total.clamp_min(torch.finfo(torch.float64).tiny)
        gradient = error * (2 * coefficient).to(error.dtype)
        self._add_weight_gradients(self._gradient_of(picks, encoder_inputs, gradient))
        return float(coefficient * self.mesh.all_reduce(_sum_of_squares_tensor(error), "dp"))

    def _finish_gradients(self, grad_b_dec: Tensor) -> Tensor:
        """Turn plain gradients into those of the aligned parameters; returns their global norm, a scalar."""
        grads, params = self.optimizer.grads, self.parameters
        # x - b_dec enters the encoder: every unit of dL/d(pre) pulls b_dec against its encoder row
        through_encoder = self.mesh.all_reduce(grads["b_enc"] @ params.W_enc_rows, "features")
        grads["b_dec"].copy_(grad_b_dec - through_encoder)
        if params.is_tied:
            RULES["none"].project(grads["W_dec"], grads["W_dec"], params.W_dec, params.W_dec)
        else:
            RULES[self.plan.alignment].project(grads["W_enc_rows"], grads["W_dec"], params.W_enc_rows, params.W_dec)
        # b_dec is on every shard: each adds its share, so that a fault on any one reaches all
        share = {name: 1 / self.mesh.features if name == "b_dec" else 1.0 for name in grads}
        total = torch.stack([share[name] * _sum_of_squares_tensor(grad) for name, grad in grads.items()]).sum()
        return self.mesh.all_reduce(total, "features").sqrt()

    def _check_finite(self, step: int, loss: float, grad_norm: Tensor) -> None:
        """The norm sums over shards, and over replicas through the exchange: all ranks stop together."""
        if not torch.isfinite(grad_norm):
            raise NonFinite(
                f"step {step}: loss {loss:.6g}, gradient norm {float(grad_norm):.6g}; the weights are those of the "
                "step before. Lower optimizer.lr, or check the activations for infinities"
            )

    def _update(self, step: int, grad_norm: Tensor) -> float:
        plan = self.plan
        lr = learning_rate(
            step,
            peak=plan.lr,
            n_steps=plan.n_steps,
            warmup_steps=plan.warmup_steps,
            decay_fraction=plan.decay_fraction,
        )
        clip = plan.optimizer.clip_norm
        scale = (clip / grad_norm).clamp(max=1.0) if clip is not None else torch.ones_like(grad_norm)
        self.optimizer.step(lr, scale)
        smallest = RULES[plan.alignment].retract(self.parameters.W_enc_rows, self.parameters.W_dec)
        if smallest is not None:
            # all shards must stop together: one that stopped alone would look like a lost worker
            check_pole(float(torch.stack(self.mesh.all_gather(smallest, "features")).min()))
        return lr

    def _count(self, step: int, fired: Tensor, cut: float) -> None:
        self.n_tokens_since_fired += self.plan.batch_size
        self.n_tokens_since_fired[fired] = 0
        if isinstance(self.plan.activation, BatchTopK):
            beta = threshold_decay(step, self.plan.activation.threshold_beta)
            self.threshold = beta * self.threshold + (1 - beta) * cut

    def alignment_scores(self) -> Tensor:
        """<w, d> of this shard's features, (n_local,)."""
        return row_dot(self.parameters.W_enc_rows, self.parameters.W_dec).squeeze(1)


def threshold_decay(step: int, beta: float) -> float:
    """Decay of the threshold's moving average at a step: never longer a memory than a tenth of the run so far.

    Cuts are high while features are random. A fixed decay of .999 would still remember a third of them after 1,100
    steps, and the exported dictionary would have half the active features that it was trained with.
    """
    return min(beta, step / (step + 10))


def _finite(picks: Picks) -> Picks:
    """Leave out picks at -inf: there were fewer dead features than asked for."""
    keep = picks.values > -torch.inf
    offsets = torch.zeros_like(picks.offsets)
    torch.cumsum(torch.bincount(picks.token_indices()[keep], minlength=picks.n_tokens), 0, out=offsets[1:])
    return Picks(features=picks.features[keep], values=picks.values[keep], offsets=offsets)


def _sum_of_squares_tensor(values: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar: rows in the tensor's own precision, the sum of rows in float64."""
    rows = values.reshape(len(values), -1).square().sum(1)
    return rows.sum(dtype=torch.float64)


def _sum_of_squares(values: Tensor) -> float:
    return float(_sum_of_squares_tensor(values))
