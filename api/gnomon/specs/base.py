"""What all specs have in common: their base class, and the types of their names and ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Dtype = Literal["float32", "bfloat16"]
Url = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]
HookName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.]+$")]
StoreId = Annotated[str, StringConstraints(pattern=r"^act_[0-9a-f]{32}$")]
DictionaryId = Annotated[str, StringConstraints(pattern=r"^dict_[0-9a-z]{26}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-z]{26}$")]


class Spec(BaseModel):
    """Base of all specs: immutable, and an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
