"""Weight gradients, alignment, clipping, Adam and retraction, a block of features at a time.

A block is as many features as fit in the processor's cache, so that a row of weights, moments and gradients comes
from memory once a step, whatever is done with it. The norm that gradients are clipped by is known only when all rows
have been summed, which makes two passes: the first over features with a gradient, the second over all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.arrays import take
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.optimizer import AdamState
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.sparse import FeatureSegments, bag_sums

BLOCK_BYTES: Final = 1 << 19
"""Of one matrix in a block; eight of them are at work at once. Half of this costs a sixth more time, in calls."""

WHOLE_SHARE: Final = 0.5
"""Share of the features with picks beyond which all features are gone through."""


class BlockedUpdate:
    """Moves the features of one shard block by block; keeps the buffers from step to step, as allocating costs more."""

    def __init__(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._rule = RULES["none" if parameters.is_tied else alignment]
        self._is_tied = parameters.is_tied
        W_dec, W_enc = parameters.W_dec, parameters.W_enc_rows
        row_bytes = max(W_dec.shape[1], W_enc.shape[1]) * W_dec.element_size()
        on_cpu = W_dec.device.type == "cpu"
        self._block = max(16, BLOCK_BYTES // row_bytes) if on_cpu else parameters.n_local
        self._decoder = W_dec.new_empty(0, W_dec.shape[1])
        self._encoder = W_enc.new_empty(0, W_enc.shape[1])
        self._block_decoder = torch.zeros_like(W_dec[: self._block])
        self._block_encoder = torch.zeros_like(W_enc[: self._block])

    def gradients(
        self, sparse: SparseGradient, segments: FeatureSegments, vectors: dict[str, Tensor], projections: Tensor
    ) -> RowGradients:
        """Sums over the picks of a block of features, projected while they are in the cache."""
        params = self._parameters
        # Where most features have picks, those without are summed too, over nothing: rows then lie as the weights' do,
        # and neither weights nor gradients are copied from place to place.
        is_whole = len(segments.touched) > WHOLE_SHARE * params.n_local
        segments = segments.of_all(params.n_local) if is_whole else segments
        pulls = projections[segments.touched]
        through_encoder = torch.zeros_like(params.W_enc_rows[0])
        squares = through_encoder.new_empty(len(segments.touched), dtype=torch.float64)
        self._grow(len(segments.touched))
        weights = take(sparse.values, segments.order), take(sparse.gradients, segments.order)
        rows = segments.tokens if sparse.n_rows == 1 else take(sparse.rows, segments.order)
        for start, stop, first, last in self._touched_blocks(segments):
            features, picks = segments.touched[start:stop], slice(first, last)
            offsets = segments.offsets[start : stop + 1] - first
            # blocks end between features and picks are in token order: the size of blocks changes no bit of these
            h = bag_sums(sparse.residual_gradients, rows[picks], weights[0][picks], offsets)
            g = bag_sums(sparse.encoder_inputs, segments.tokens[picks], weights[1][picks], offsets)
            w, d = self._rows(features, slice(start, stop) if is_whole else None)
            # the one sum over features: its rounding follows the blocks, whose size must depend on shapes alone
            through_encoder.addmv_(w.t(), pulls[start:stop])
            self._project(g, h, w, d)
            self._decoder[start:stop] = h
            squares[start:stop] = _square_sums(h)
            if not self._is_tied:
                self._encoder[start:stop] = g
                squares[start:stop] += _square_sums(g)
        n_touched = len(segments.touched)
        decoder = self._decoder[:n_touched]
        return RowGradients(
            touched=segments.touched,
            encoder=decoder if self._is_tied else self._encoder[:n_touched],
            decoder=decoder,
            vectors=vectors,
            through_encoder=through_encoder,
            squares=squares,
        )

    def apply(
        self, gradients: RowGradients, *, lr: float, clip_scale: float, encoder_copy: Tensor | None = None
    ) -> Tensor | None:
        """Adam and retraction of a block of features while it is in the cache."""
        optimizer = self._optimizer
        optimizer.begin(gradients.vectors, lr=lr, clip_scale=clip_scale)
        smallest: list[Tensor] = []
        for start, stop, first, last in self._blocks(gradients.touched):
            self._move_block(gradients, slice(start, stop), slice(first, last), lr, clip_scale)
            w, d = self._parameters.W_enc_rows[start:stop], self._parameters.W_dec[start:stop]
            scale = self._rule.retract(w, d)
            smallest += [scale] if scale is not None else []
            if encoder_copy is not None:
                encoder_copy[start:stop] = w
        return torch.stack(smallest).min() if smallest else None

    def _rows(self, features: Tensor, block: slice | None) -> tuple[Tensor, Tensor]:
        """Encoder and decoder rows of some features, which may be the block [start, stop) of all."""
        matrices = self._parameters.W_enc_rows, self._parameters.W_dec
        w, d = (rows[block] if block is not None else rows.index_select(0, features) for rows in matrices)
        return w, w if self._is_tied else d

    def _project(self, g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
        if self._is_tied:
            h.add_(g)  # one matrix, whose gradient is the sum of both
        self._rule.project(g, h, w, d)

    def _move_block(self, gradients: RowGradients, rows: slice, touched: slice, lr: float, clip_scale: float) -> None:
        optimizer = self._optimizer
        names = ["W_dec"] if self._is_tied else ["W_enc_rows", "W_dec"]
        buffers = {
            "W_dec": (gradients.decoder, self._block_decoder),
            "W_enc_rows": (gradients.encoder, self._block_encoder),
        }
        n_rows, n_touched = rows.stop - rows.start, touched.stop - touched.start
        grads: list[Tensor] = []
        for name in names:
            whole, block = buffers[name]
            grad = whole[touched]
            if clip_scale != 1:
                grad.mul_(clip_scale)
            if n_touched < n_rows:
                # features without a gradient move too: their moments decay, and what is left of those moves them
                block = block[:n_rows].zero_()
                grad = block.index_copy_(0, gradients.touched[touched] - rows.start, grad)
            grads.append(grad)
        optimizer.move([optimizer.rows(name, rows.start, rows.stop) for name in names], grads, lr)

    def _grow(self, n_touched: int) -> None:
        if len(self._decoder) < n_touched:
            n = min(self._parameters.n_local, n_touched + n_touched // 4)
            self._decoder = self._decoder.new_empty(n, self._decoder.shape[1])
            if not self._is_tied:
                self._encoder = self._encoder.new_empty(n, self._encoder.shape[1])

    def _touched_blocks(self, segments: FeatureSegments) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop) among the touched features and (first, last) among their picks, for every block."""
        n = len(segments.touched)
        starts = [*range(0, n, self._block), n]
        picks = segments.offsets[starts].tolist()
        for (start, stop), (first, last) in zip(pairwise(starts), pairwise(picks), strict=True):
            yield start, stop, first, last

    def _blocks(self, touched: Tensor) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop) of own features and (first, last) of those among the touched, for every block."""
        own = self._optimizer.own
        starts = [*range(own.start, own.stop, self._block), own.stop]
        among = torch.searchsorted(touched, torch.tensor(starts, device=touched.device)).tolist()
        for (start, stop), (first, last) in zip(pairwise(starts), pairwise(among), strict=True):
            yield start, stop, first, last


def _square_sums(rows: Tensor) -> Tensor:
    """(rows,) sums of squares in float64: as float32, a sum over 1e5 rows would lose the small ones."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()
