"""Alignment: encoder . decoder = 1 for every feature, as a row-wise hook around the optimizer of a plain SAE.

For feature i with unit decoder row d and encoder row w, and gradients h = dL/dd and g = dL/dw of the plain SAE:

    orth      w = v + (1 - <v, d>) d    g -= <g, d> d    h -= <h, d> d    h -= <g, d> (w - d)
    stopgrad  the same with d detached  g -= <g, d> d    h -= <h, d> d
    scale     w = v / <v, d>            h -= <g, w> w    h -= <h, d> d    g -= <g, w> d
    tied      w = d                     h += g           h -= <h, d> d
    none      w free                                     h -= <h, d> d

each equal to the autograd gradient of the reparameterisation in the gauge <v, d> = 1. After the optimizer the row
is retracted: d to norm 1, and w so that <w, d> = 1 again. The hook is row-local, so shards need no communication
for it, and linear in (g, h), so it commutes with a sum over replicas.

The idea is that of Brzozowski and Chung, arXiv:2605.18629; the formulas are this project's (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gnomon.errors import GnomonError
from gnomon.specs import Alignment

MIN_SCALE: Final = 0.05
"""Smallest <v, d> that "scale" accepts; below it the pole of 1 / <v, d> destroys the row."""


class AlignmentPole(GnomonError):
    """A feature of a "scale" dictionary came near the pole <v, d> = 0."""

    default_code = "alignment_pole"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRule:
    """How one value of the alignment enum treats rows; all arguments are (rows, d_in), changed in place."""

    project: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(g, h, w, d): turn plain gradients into those of the reparameterisation."""
    retract: Callable[[Tensor, Tensor], Tensor | None]
    """(w, d): return to the constraint after a step; "scale" returns the smallest <v, d> it divided by."""


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (rows, 1)."""
    return (a * b).sum(1, keepdim=True)


def _tangent(h: Tensor, d: Tensor) -> None:
    h.addcmul_(row_dot(h, d), d, value=-1)


def _project_orth(g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
    u = row_dot(g, d)
    g.addcmul_(u, d, value=-1)
    # h - <h, d> d - u (w - d), with the two terms along d taken together
    h.addcmul_(u - row_dot(h, d), d).addcmul_(u, w, value=-1)


def _project_stopgrad(g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
    _tangent(g, d)
    _tangent(h, d)


def _project_scale(g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
    u = row_dot(g, w)
    h.addcmul_(u, w, value=-1)
    _tangent(h, d)
    g.addcmul_(u, d, value=-1)


def _project_tied(g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
    h.add_(g)
    _tangent(h, d)


def _project_none(g: Tensor, h: Tensor, w: Tensor, d: Tensor) -> None:
    _tangent(h, d)


def _normalize(d: Tensor) -> None:
    d.div_(d.norm(dim=1, keepdim=True))


def _retract_orth(w: Tensor, d: Tensor) -> None:
    _normalize(d)
    w.addcmul_(1 - row_dot(w, d), d)


def _retract_scale(w: Tensor, d: Tensor) -> Tensor:
    _normalize(d)
    scale = row_dot(w, d)
    w.div_(scale)
    return scale.min()


def _retract_none(w: Tensor, d: Tensor) -> None:
    _normalize(d)


def check_pole(smallest_scale: float) -> None:
    """Raise AlignmentPole where the smallest <v, d> of all shards is too near 0."""
    if smallest_scale < MIN_SCALE:
        raise AlignmentPole(
            f"alignment='scale' met a feature with <v, d> = {smallest_scale:.3g}, below {MIN_SCALE}: w = v / <v, d> "
            "has a pole at 0; lower optimizer.lr or use alignment='orth'"
        )


RULES: Final[dict[Alignment, AlignmentRule]] = {
    "orth": AlignmentRule(project=_project_orth, retract=_retract_orth),
    "stopgrad": AlignmentRule(project=_project_stopgrad, retract=_retract_orth),
    "scale": AlignmentRule(project=_project_scale, retract=_retract_scale),
    "tied": AlignmentRule(project=_project_tied, retract=_retract_none),
    "none": AlignmentRule(project=_project_none, retract=_retract_none),
}


_SCORED_ROWS: Final = 4096


def alignment_scores(w: Tensor, d: Tensor) -> Tensor:
    """<w, d> of every feature, (rows,), summed in float64 so that the score is better than the weights.

    A block of rows at a time: all at once would take as much memory as the optimizer's state.
    """
    scores = w.new_empty(len(w), dtype=torch.float64)
    for start in range(0, len(w), _SCORED_ROWS):
        rows = slice(start, start + _SCORED_ROWS)
        scores[rows] = (w[rows].double() * d[rows].double()).sum(1)
    return scores
