"""TopK and BatchTopK: a fixed number of active features, and the squared error alone as the loss.

Sources: Gao et al. 2024, arXiv:2406.04093; Bussmann et al. 2024, arXiv:2412.06410.
"""

from __future__ import annotations

from gnomon.specs import BatchTopK, Matryoshka, TopK
from gnomon_workers.sae.global_selection import BatchTopKSelector, topk_of
from gnomon_workers.sae.sparse import Picks
from gnomon_workers.sae.variants.auxk import Auxiliary
from gnomon_workers.sae.variants.base import (
    Batch,
    PlainVariant,
    Setting,
    Terms,
    float32_values,
    plain_gradient,
    residual_of,
    sum_of_squares,
)


def reconstruction_terms(picks: Picks, batch: Batch, auxiliary: Auxiliary | None, state: dict[str, float]) -> Terms:
    """Terms of the squared error, with the auxiliary loss where there is one."""
    batch_size = len(batch.targets) * batch.mesh.dp
    picks = float32_values(picks, batch)
    residual = residual_of(picks, batch)
    loss = sum_of_squares(residual) / batch_size
    # in place where nobody needs the residual itself: [tokens, d_out] is copied on the hot path for nothing else
    scaled = residual.mul_(2 / batch_size) if auxiliary is None else residual * (2 / batch_size)
    terms = Terms(
        gradient=plain_gradient(picks, batch, scaled),
        n_active=len(picks.features),
        sums={"loss": loss, "objective": loss},
        state=state,
    )
    return terms if auxiliary is None else auxiliary.add(terms, batch, residual)


class TopKVariant(PlainVariant):
    """The k largest of every token."""

    def __init__(self, activation: TopK, setting: Setting) -> None:
        self._k = activation.k
        self._auxiliary = Auxiliary.create(activation.aux, setting)

    def select(self, batch: Batch) -> Picks:
        """The same picks on any number of shards, ties to the lowest feature."""
        return topk_of(batch.pre, self._k, batch.kernels, batch.mesh)

    def terms(self, batch: Batch) -> Terms:
        """Squared error of the reconstruction, and the auxiliary loss where there is one."""
        picks = self.select(batch)
        return reconstruction_terms(picks, batch, self._auxiliary, batch.state)


class BatchTopKVariant(PlainVariant):
    """The k * batch largest of the whole batch, and a running mean of the smallest as the threshold of inference."""

    def __init__(self, activation: BatchTopK | Matryoshka, setting: Setting) -> None:
        self._n_keep = activation.k * setting.batch_size
        self._beta = activation.threshold_beta
        self._selector = BatchTopKSelector()
        self._auxiliary = Auxiliary.create(activation.aux, setting)

    def initial_state(self) -> dict[str, float]:
        """The threshold; in float64, for it averages thousands."""
        return {"threshold": 0.0}

    def select(self, batch: Batch) -> Picks:
        """Exact over tokens, shards and replicas."""
        return self._select(batch)[0]

    def _select(self, batch: Batch) -> tuple[Picks, float]:
        maxima = batch.kernels.group_maxima
        return self._selector.select(batch.hidden_pre, self._n_keep, batch.mesh, maxima=maxima)

    def terms(self, batch: Batch) -> Terms:
        """Squared error of the reconstruction, and the auxiliary loss where there is one."""
        picks, cut = self._select(batch)
        return reconstruction_terms(picks, batch, self._auxiliary, moved_threshold(batch, self._beta, cut))


def moved_threshold(batch: Batch, beta: float, cut: float) -> dict[str, float]:
    """The state with the threshold moved towards this step's smallest kept activation."""
    decay = threshold_decay(batch.step, beta)
    return {"threshold": decay * batch.state["threshold"] + (1 - decay) * cut}


def threshold_decay(step: int, beta: float) -> float:
    """Decay of the threshold's moving average at a step: never longer a memory than a tenth of the run so far.

    Cuts are high while features are random. A fixed decay of .999 would still remember a third of them after 1,100
    steps, and the exported dictionary would have half the active features that it was trained with.
    """
    return min(beta, step / (step + 10))
