"""The variants of a dictionary: one small file each, against the interface of `base`."""

from __future__ import annotations

from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_workers.sae.variants.base import Batch, Setting, Terms, Variant
from gnomon_workers.sae.variants.gated import GatedVariant
from gnomon_workers.sae.variants.jumprelu import JumpReLUVariant
from gnomon_workers.sae.variants.matryoshka import MatryoshkaVariant
from gnomon_workers.sae.variants.relu import PAnnealVariant, ReLUVariant
from gnomon_workers.sae.variants.topk import BatchTopKVariant, TopKVariant

__all__ = ["Batch", "Setting", "Terms", "Variant", "make_variant"]


def make_variant(activation: Activation, setting: Setting) -> Variant:
    """The activation and loss that a spec names, with what the run fixes of them."""
    match activation:
        case TopK():
            return TopKVariant(activation, setting)
        case BatchTopK():
            return BatchTopKVariant(activation, setting)
        case Matryoshka():
            return MatryoshkaVariant(activation, setting)
        case JumpReLU():
            return JumpReLUVariant(activation, setting)
        case Gated():
            return GatedVariant(activation, setting)
        case ReLU():
            return ReLUVariant(activation, setting)
        case PAnneal():
            return PAnnealVariant(activation, setting)
