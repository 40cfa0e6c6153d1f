"""Pictures of a dictionary and of its training, as Plotly figures; needs the extra `viz`.

client = gnomon.Client()
figures.alignment_histogram(client.dictionary(id).info.metrics).show()
figures.training_curves(client.events(job_id)).write_html("training.html")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from gnomon.errors import NotFound, how_to_install
from gnomon.events import TrainingMeasured
from gnomon.metrics import DictionaryMetrics
from gnomon.resources import Event

try:
    import plotly.graph_objects as go
    from plotly.colors import DEFAULT_PLOTLY_COLORS
    from plotly.subplots import make_subplots
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"figures need plotly ({error}): {how_to_install('viz')}", name=error.name) from error

_CURVES = {
    "fvu": "FVU (batch)",
    "l0": "L0",
    "dead_fraction": "dead fraction",
    "alignment_min": "alignment, lowest",
}


def alignment_histogram(metrics: DictionaryMetrics) -> go.Figure:
    """Features by their alignment score <encoder, decoder>, from a dictionary's metrics; 1 is aligned."""
    if metrics.alignment is None:
        raise _missing("alignment")
    histogram = metrics.alignment.histogram
    figure = _bars(histogram.edges, histogram.counts)
    return figure.update_layout(title="Alignment", xaxis_title="encoder . decoder", yaxis_title="features")


def density_histogram(metrics: DictionaryMetrics) -> go.Figure:
    """Features by how often they fire on held-out activations, from a dictionary's metrics."""
    if metrics.density_histogram is None:
        raise _missing("density_histogram")
    figure = _bars(metrics.density_histogram.log10_edges, metrics.density_histogram.counts)
    return figure.update_layout(title="Density", xaxis_title="log10 of firing frequency", yaxis_title="features")


def training_curves(events: Iterable[Event]) -> go.Figure:
    """FVU, L0, dead fraction and alignment by step, from a train job's events.

    Every variant has a line of its own. A step that a later attempt repeated is drawn once. Raises NotFound where
    there are no metrics.
    """
    runs: dict[str, dict[int, TrainingMeasured]] = {}
    for event in events:
        if isinstance(told := event.told, TrainingMeasured):
            runs.setdefault(told.variant or "", {})[told.step] = told
    if not runs:
        raise NotFound("these events hold no metrics; a train job has some once it runs", code="no_metrics")
    figure = make_subplots(rows=2, cols=2, subplot_titles=list(_CURVES.values()), shared_xaxes=True)
    for index, (variant, by_step) in enumerate(runs.items()):
        color = DEFAULT_PLOTLY_COLORS[index % len(DEFAULT_PLOTLY_COLORS)]
        for number, name in enumerate(_CURVES):
            line = go.Scatter(
                x=sorted(by_step),
                y=[getattr(by_step[step], name) for step in sorted(by_step)],
                mode="lines",
                name=variant or name,
                legendgroup=variant,
                showlegend=number == 0,
                line={"color": color} if variant else None,
            )
            figure.add_trace(line, row=number // 2 + 1, col=number % 2 + 1)
    return figure.update_layout(title="Training", showlegend=len(runs) > 1)


def _bars(edges: Sequence[float], counts: Sequence[float]) -> go.Figure:
    """Bars between edges; equal edges (every score the same) still show."""
    widths = [max(hi - lo, 1e-9) for lo, hi in pairwise(edges)]
    return go.Figure(go.Bar(x=list(edges[:-1]), y=list(counts), width=widths, offset=0))


def _missing(name: str) -> NotFound:
    return NotFound(f"these metrics have no {name!r}; train or evaluate with evaluation on", code="no_metrics")
