"""What a user submits: one pydantic model per kind of job, with every limit in the type.

The same models validate a body in the API, build a request in the SDK and travel to the workers, so a spec
that was accepted once needs no second check of its shape.
"""

from gnomon.specs.activations import (
    DEFAULT_BETAS,
    DEFAULT_LR,
    Activation,
    AuxK,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    PAnneal,
    ReLU,
    TopK,
    chooses_k,
)
from gnomon.specs.base import DictionaryId, Document, Dtype, HookName, JobId, Spec, StoreId, Url, unread_fields
from gnomon.specs.evaluate import EvaluateSpec, Evaluation
from gnomon.specs.harvest import (
    ConcatPacking,
    DocumentPacking,
    DropPolicy,
    HarvestSpec,
    ModelSource,
    Packing,
    TextSource,
)
from gnomon.specs.request import (
    AnySpec,
    ClusterChange,
    JobChange,
    JobClass,
    JobRequest,
    JobSpec,
    ProjectChange,
    UnknownSpec,
)
from gnomon.specs.train import Adam, Alignment, Mesh, Schedule, StoredActivations, TrainSpec, TrainVariant, check_shape

__all__ = [
    "DEFAULT_BETAS",
    "DEFAULT_LR",
    "Activation",
    "Adam",
    "Alignment",
    "AnySpec",
    "AuxK",
    "BatchTopK",
    "ClusterChange",
    "ConcatPacking",
    "DictionaryId",
    "Document",
    "DocumentPacking",
    "DropPolicy",
    "Dtype",
    "EvaluateSpec",
    "Evaluation",
    "Gated",
    "HarvestSpec",
    "HookName",
    "JobChange",
    "JobClass",
    "JobId",
    "JobRequest",
    "JobSpec",
    "JumpReLU",
    "Matryoshka",
    "Mesh",
    "ModelSource",
    "PAnneal",
    "Packing",
    "ProjectChange",
    "ReLU",
    "Schedule",
    "Spec",
    "StoreId",
    "StoredActivations",
    "TextSource",
    "TopK",
    "TrainSpec",
    "TrainVariant",
    "UnknownSpec",
    "Url",
    "check_shape",
    "chooses_k",
    "unread_fields",
]
