"""Gnomon: distributed training of aligned sparse autoencoders, as a service.

The names below are loaded when first used, so that `import gnomon` is quick and needs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnomon.async_client import AsyncClient, AsyncJobHandle, AsyncRemoteDictionary
    from gnomon.client import Client, JobHandle, RemoteDictionary
    from gnomon.errors import (
        Conflict,
        CorruptArtifact,
        Forbidden,
        GnomonError,
        InvalidRequest,
        JobFailed,
        LeaseLost,
        NotFound,
        PayloadTooLarge,
        StoreUnavailable,
        TooManyRequests,
        Unauthenticated,
        Unavailable,
    )
    from gnomon.loading import load
    from gnomon.specs import (
        Adam,
        AuxK,
        BatchTopK,
        ConcatPacking,
        DocumentPacking,
        DropPolicy,
        EvaluateSpec,
        Evaluation,
        HarvestSpec,
        JobRequest,
        Mesh,
        ModelSource,
        Schedule,
        StoredActivations,
        TextSource,
        TopK,
        TrainSpec,
        TrainVariant,
    )

__all__ = [
    "Adam",
    "AsyncClient",
    "AsyncJobHandle",
    "AsyncRemoteDictionary",
    "AuxK",
    "BatchTopK",
    "Client",
    "ConcatPacking",
    "Conflict",
    "CorruptArtifact",
    "DocumentPacking",
    "DropPolicy",
    "EvaluateSpec",
    "Evaluation",
    "Forbidden",
    "GnomonError",
    "HarvestSpec",
    "InvalidRequest",
    "JobFailed",
    "JobHandle",
    "JobRequest",
    "LeaseLost",
    "Mesh",
    "ModelSource",
    "NotFound",
    "PayloadTooLarge",
    "RemoteDictionary",
    "Schedule",
    "StoreUnavailable",
    "StoredActivations",
    "TextSource",
    "TooManyRequests",
    "TopK",
    "TrainSpec",
    "TrainVariant",
    "Unauthenticated",
    "Unavailable",
    "load",
]

_MODULES = ("specs", "errors", "client", "async_client", "loading")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("gnomon")
    if name in __all__:
        for module in _MODULES:
            value = getattr(import_module(f"gnomon.{module}"), name, None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module 'gnomon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
