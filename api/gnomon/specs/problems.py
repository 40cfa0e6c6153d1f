"""What is wrong with a document, in the words of whoever wrote it: the service and the SDK say it alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from gnomon.specs.base import types_of

_MAX_SHOWN: Final = 80
_MAX_TOLD: Final = 5


def explain(error: ValidationError, body: Any, root: type[BaseModel], *, below: str = "") -> str:
    """One line that names the fields of `body` that are wrong, and how; at most five of them.

    Paths begin below the field `below`, where that is all that the user wrote.
    """
    problems = error.errors(include_url=False)
    return join([describe(item, item["loc"], body, root, below=below)["message"] for item in problems])


def join(messages: Sequence[str]) -> str:
    """The first of the messages as one line, and how many more there are."""
    more = f"; and {len(messages) - _MAX_TOLD} more" if len(messages) > _MAX_TOLD else ""
    return "; ".join(messages[:_MAX_TOLD]) + more


def describe(
    error: Mapping[str, Any], location: Sequence[int | str], body: Any, root: Any = None, *, below: str = ""
) -> dict[str, str]:
    """One of pydantic's errors as {path, message, code}; the path is the one in the user's JSON.

    `root` is the type of the whole body: its fields are what may have been meant by one that is unknown.
    """
    path = plain_path(location, body).removeprefix(f"{below}." if below else "")
    kind = error["type"]
    message = _sentence(kind, error, path or "the body")
    if kind == "extra_forbidden":
        message = f"{path} is not a field; {_advice(str(location[-1]), root, location[:-1])}"
    return {"path": path, "message": message, "code": "transcoder_alignment" if kind == "transcoder_alignment" else ""}


def plain_path(location: Sequence[int | str], body: Any) -> str:
    """The path of an error without the names that pydantic adds for the members of a tagged union."""
    parts: list[str] = []
    here = body
    for index, part in enumerate(location):
        is_tag = isinstance(here, Mapping) and part not in here and here.get("kind") == part
        if is_tag or (isinstance(here, Mapping) and part not in here and index < len(location) - 1):
            continue
        parts.append(str(part))
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, Sequence) and not isinstance(here, str) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            here = None
    return ".".join(parts)


def _sentence(kind: str, error: Mapping[str, Any], path: str) -> str:
    context = error.get("ctx", {})
    match kind:
        case "missing":
            return f"{path} is required"
        case "union_tag_not_found":
            return f"{path} needs a field 'kind' that says which sort it is"
        case "union_tag_invalid":
            return f"{path}.kind={context.get('tag')!r} is unknown; use one of {context.get('expected_tags')}"
        case "json_invalid":
            return f"the body is not JSON ({context.get('error', 'unreadable')})"
        case "value_error" | "transcoder_alignment":
            return f"{path}: {str(error['msg']).removeprefix('Value error, ')}"
        case _:
            message = str(error["msg"])
            return f"{path}: {message[:1].lower()}{message[1:]} (got {_shown(error.get('input'))})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _advice(name: str, root: Any, location: Sequence[int | str]) -> str:
    known = {field for model in _models_at(root, location) for field in model.model_fields}
    near = get_close_matches(name, sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else "check its spelling, or leave it out"


def _models_at(root: Any, location: Iterable[int | str]) -> list[type[BaseModel]]:
    """The models that a place in a document may hold, as pydantic names the place: with the tags of unions."""
    models = list(_models_of(root))
    for part in location:
        fields = [model.model_fields[str(part)].annotation for model in models if part in model.model_fields]
        tagged = [
            model for model in models if "kind" in model.model_fields and model.model_fields["kind"].default == part
        ]
        if fields:
            models = [model for annotation in fields for model in _models_of(annotation)]
        elif tagged:
            models = tagged
        # else an index into a list, whose items' models these are already
    return models


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    return (each for each in types_of(annotation) if isinstance(each, type) and issubclass(each, BaseModel))
