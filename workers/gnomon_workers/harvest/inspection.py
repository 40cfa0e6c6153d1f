"""What a request names, looked at before it is queued: models, texts and stores, which are foreign bytes all of them.

Run as a program it answers questions, a JSON document a line, from its standard input to its standard output, until the
input ends. The API asks it instead of looking itself: what takes minutes, gigabytes or for ever then harms no other
request. What is quick to see is wrong is said before anything long is read.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from gnomon.errors import GnomonError, InvalidRequest
from gnomon.specs import HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.harvest.readers import text_bytes
from gnomon_workers.harvest.text import check_text, resolve_text
from gnomon_workers.models import catalog

MOST_BYTES: Final = 4 << 30
"""Of memory: no text or header that is within its limits takes more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenHarvest:
    """What a harvest would read."""

    revision: str | None
    """Commit of a hub model."""
    model_fingerprint: str
    text_fingerprint: str
    hooks: Mapping[str, int]
    """The hooks that were asked for -> d_in."""
    n_parameters: int = 0
    """Of the model."""
    n_text_bytes: int = 0
    """About the bytes of the text, unpacked."""


def inspect_harvest(spec: HarvestSpec, input_roots: Sequence[str]) -> SeenHarvest:
    """Look a harvest's model and text up; raises what the specs' reader and `catalog` and `text` raise."""
    model = catalog.describe_model(spec.model, input_roots)
    for hook in spec.hooks:
        catalog.check_hook(hook, model)
    catalog.check_context_length(spec.context_length, model)
    return SeenHarvest(
        text_fingerprint=check_text(spec.text, input_roots),
        model_fingerprint=model.fingerprint(),
        revision=model.revision,
        hooks={hook: model.hooks[hook] for hook in spec.hooks},
        n_parameters=model.n_parameters,
        n_text_bytes=sum(map(text_bytes, resolve_text(spec.text, input_roots))),
    )


def inspect_store(location: str) -> None:
    """Raise CorruptArtifact, or NotFound, unless the files of a sealed store are all there in full size."""
    ActivationStore.open(Location.open(location)).check_quick()


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """{"seen": ...}, or {"problem": ...} as the API would send it."""
    try:
        if "harvest" in question:
            seen = inspect_harvest(HarvestSpec.read(question["harvest"]), question["input_roots"])
            return {"seen": asdict(seen)}
        inspect_store(question["store"])
    except MemoryError:
        return _problem(
            InvalidRequest(
                f"reading the files that this request names takes more than {MOST_BYTES >> 30} GiB of memory; look at "
                "them, and give the text as .jsonl",
                code="unreadable_input",
            )
        )
    except GnomonError as error:
        return _problem(error)
    return {"seen": None}


def _problem(error: GnomonError) -> dict[str, Any]:
    return {"problem": {"status": error.status, "code": error.code, "detail": error.message, **error.detail}}


def main() -> None:
    """Answer until no one asks any more."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
