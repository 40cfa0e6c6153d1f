"""Which store a harvest makes: the same id for the same rows, whoever asks for them."""

from __future__ import annotations

from typing import Final

from gnomon.specs import HarvestSpec
from gnomon_storage.digests import combine

_LAYOUT_VERSION: Final = 1
"""Grows when the same spec would give other rows."""


def store_id(spec: HarvestSpec, model_fingerprint: str, text_fingerprint: str) -> str:
    """The id of the store that a harvest makes: a hash of everything that determines its rows, and of nothing else."""
    fields = spec.model_dump(mode="json", exclude={"model": {"source", "revision"}, "text": True, "n_workers": True})
    fields["hooks"] = sorted(fields["hooks"])
    limits = [source.max_bad_documents for source in spec.text]
    if any(limits):  # left out otherwise: the stores of earlier releases have no such limits
        fields["max_bad_documents"] = limits
    parts = {"spec": fields, "model": model_fingerprint, "text": text_fingerprint, "layout": _LAYOUT_VERSION}
    return "act_" + combine(parts)[:32]
