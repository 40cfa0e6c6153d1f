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
    from gnomon.events import (
        CheckpointSaved,
        EventData,
        Logged,
        PhaseBegan,
        ProfileWritten,
        Progressed,
        SegmentCommitted,
        StateChanged,
        TrainingMeasured,
        UnknownEvent,
    )
    from gnomon.loading import load
    from gnomon.metrics import (
        AlignmentMetrics,
        Costs,
        DensityHistogram,
        DictionaryMetrics,
        Histogram,
        RowFvu,
        StepMetrics,
    )
    from gnomon.plans import DiskPlan, Duration, HarvestPlan, JobPlan, MemoryPlan, MeshPlan
    from gnomon.resources import (
        ActivationStoreRecord,
        ApiKey,
        ClusterState,
        Collection,
        DictionaryRecord,
        EvaluateResult,
        Event,
        HarvestedOn,
        HarvestResult,
        Job,
        JobError,
        NewApiKey,
        NodeState,
        ProjectState,
        QueuePlace,
        Remaining,
        Removable,
        TrainedDictionary,
        TrainedOn,
        TrainResult,
        UnknownResult,
    )
    from gnomon.specs import (
        Adam,
        AuxK,
        BatchTopK,
        ClusterChange,
        ConcatPacking,
        DocumentPacking,
        DropPolicy,
        EvaluateSpec,
        Evaluation,
        Gated,
        HarvestSpec,
        JobChange,
        JobRequest,
        JumpReLU,
        Matryoshka,
        Mesh,
        ModelSource,
        PAnneal,
        ProjectChange,
        ReLU,
        Schedule,
        StoredActivations,
        TextSource,
        TopK,
        TrainSpec,
        TrainVariant,
        UnknownSpec,
    )

__all__ = [
    "ActivationStoreRecord",
    "Adam",
    "AlignmentMetrics",
    "ApiKey",
    "AsyncClient",
    "AsyncJobHandle",
    "AsyncRemoteDictionary",
    "AuxK",
    "BatchTopK",
    "CheckpointSaved",
    "Client",
    "ClusterChange",
    "ClusterState",
    "Collection",
    "ConcatPacking",
    "Conflict",
    "CorruptArtifact",
    "Costs",
    "DensityHistogram",
    "DictionaryMetrics",
    "DictionaryRecord",
    "DiskPlan",
    "DocumentPacking",
    "DropPolicy",
    "Duration",
    "EvaluateResult",
    "EvaluateSpec",
    "Evaluation",
    "Event",
    "EventData",
    "Forbidden",
    "Gated",
    "GnomonError",
    "HarvestPlan",
    "HarvestResult",
    "HarvestSpec",
    "HarvestedOn",
    "Histogram",
    "InvalidRequest",
    "Job",
    "JobChange",
    "JobError",
    "JobFailed",
    "JobHandle",
    "JobPlan",
    "JobRequest",
    "JumpReLU",
    "LeaseLost",
    "Logged",
    "Matryoshka",
    "MemoryPlan",
    "Mesh",
    "MeshPlan",
    "ModelSource",
    "NewApiKey",
    "NodeState",
    "NotFound",
    "PAnneal",
    "PayloadTooLarge",
    "PhaseBegan",
    "ProfileWritten",
    "Progressed",
    "ProjectChange",
    "ProjectState",
    "QueuePlace",
    "ReLU",
    "Remaining",
    "RemoteDictionary",
    "Removable",
    "RowFvu",
    "Schedule",
    "SegmentCommitted",
    "StateChanged",
    "StepMetrics",
    "StoreUnavailable",
    "StoredActivations",
    "TextSource",
    "TooManyRequests",
    "TopK",
    "TrainResult",
    "TrainSpec",
    "TrainVariant",
    "TrainedDictionary",
    "TrainedOn",
    "TrainingMeasured",
    "Unauthenticated",
    "Unavailable",
    "UnknownEvent",
    "UnknownResult",
    "UnknownSpec",
    "load",
]

_MODULES = ("specs", "errors", "resources", "plans", "events", "metrics", "client", "async_client", "loading")


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
