"""What all documents have in common: strict when written, lenient when read; and the types of names and ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Dtype = Literal["float32", "bfloat16"]
StoredDtype = Literal["float32", "bfloat16", "int8"]
Url = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]
HookName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.]+$")]
StoreId = Annotated[str, StringConstraints(pattern=r"^act_[0-9a-f]{32}$")]
DictionaryId = Annotated[str, StringConstraints(pattern=r"^dict_[0-9a-z]{26}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-z]{26}$")]


class Document(BaseModel):
    """Base of all that one release writes and another may read: immutable, and an unknown field is an error.

    What was written by a release that may be another one is taken by `read`, which passes over fields that this one
    does not know, however deep they lie.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    is_written_by_users: ClassVar[bool] = False

    @classmethod
    def read(cls, data: Mapping[str, Any] | bytes | str) -> Self:
        """The document of any release, parsed or as JSON; raises pydantic's ValidationError."""
        if isinstance(data, bytes | str):
            return cls.model_validate_json(data, extra="ignore")
        return cls.model_validate(data, extra="ignore")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of what may be read: further fields are welcome, unless users write it."""
        found = handler(schema)
        if not cls.is_written_by_users:
            handler.resolve_ref_schema(found).pop("additionalProperties", None)
        return found


class Spec(Document):
    """Base of all specs; no number in them is infinite or NaN."""

    model_config = ConfigDict(allow_inf_nan=False)
    is_written_by_users = True

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        """Refuse true where a number is asked for: Python takes it for 1, and in a spec it is a slip."""
        if isinstance(data, Mapping):
            for name, value in data.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field is not None and bool not in types_of(field.annotation):
                    raise ValueError(f"{name} is {str(value).lower()}, and no field that is true or false")
        return data


def types_of(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(types_of, get_args(annotation)))


def unread_fields(data: Any, document: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields in `data` that a document read from it does not have; both as JSON."""
    if isinstance(data, Mapping) and isinstance(document, Mapping):
        for name, value in data.items():
            place = f"{path}.{name}" if path else str(name)
            if name in document:
                yield from unread_fields(value, document[name], place)
            else:
                yield place
    elif isinstance(data, list | tuple) and isinstance(document, list | tuple):
        for index, (value, known) in enumerate(zip(data, document, strict=False)):
            yield from unread_fields(value, known, f"{path}.{index}")
