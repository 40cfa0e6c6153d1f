"""Which modules a model has, how wide their outputs are and which tensors it needs: told by its own class.

The class is built without weights in a process of its own (see `skeleton`): building takes a second and 500 MB, and a
config decides what is built. What was found is kept in the cache, by the config and the tensors' names and shapes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final, Self

from gnomon.errors import InvalidRequest, Unavailable
from gnomon_storage.digests import combine
from gnomon_workers.models.cache import cache_dir
from gnomon_workers.runtime.scratch import scratch_folder

Shapes = Mapping[str, tuple[int, ...]]
LONGEST_S: Final = 300.0
"""Of waiting for a model to be built, on a machine that is busy; it has two minutes of a core (see `skeleton`)."""
_VERSION: Final = 1
"""Grows when the same model would be described otherwise."""
_building = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model's class, as a trial run without weights shows it."""

    class_name: str
    n_layers: int
    hidden_size: int
    n_embeddings: int | None
    """Rows of the table of input embeddings: token ids are below it."""
    context_length: int | None
    """Longest context, where the model says so."""
    has_head: bool
    """Whether it predicts tokens: a causal model whose checkpoint holds what makes logits."""
    hooks: Mapping[str, int]
    """Module path -> width of its output, in the order in which they are defined."""
    not_hooks: Mapping[str, str]
    """Module path -> why it cannot be hooked."""
    faults: tuple[str, ...]
    """What is wrong with the checkpoint, by tensor."""

    def to_json(self) -> dict[str, Any]:
        """As it travels and is cached."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**values, "faults": tuple(values["faults"])})


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the harvester loads this model as a causal language model, and not as a bare encoder."""
    return bool(re.search(r"(ForCausalLM|LMHeadModel)$", _architecture(config)))


def find_skeleton(source: str, config: Mapping[str, Any], shapes: Shapes) -> Skeleton:
    """The skeleton of a checkpoint with this config and tensors of these shapes.

    Raises InvalidRequest: "unsupported_model" where no model that can be harvested is built of it, "incomplete_model"
    where tensors are missing, have other shapes or have no place in the model.
    """
    if config.get("quantization_config"):
        raise InvalidRequest(
            f"{source!r} holds quantised weights, which are not read; give the model as it was before quantisation",
            code="unsupported_model",
        )
    found = _found(config, shapes)
    if "refused" in found:
        raise InvalidRequest(
            f"{source!r} cannot be harvested: {found['refused']}. Models are built by Transformers "
            f"{version('transformers')}, as a causal language model or as an encoder, and without code of their own",
            code="unsupported_model",
        )
    skeleton = Skeleton.from_json(found["skeleton"])
    refuse_faults(source, skeleton.faults)
    return skeleton


def refuse_faults(source: str, faults: Sequence[str]) -> None:
    """Raise InvalidRequest, "incomplete_model", where something is wrong with a checkpoint's tensors."""
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InvalidRequest(
            f"the weights of {source!r} do not fit its config.json: {'; '.join(faults[:5])}{more}; what is missing "
            "would be random numbers, so nothing is read. Save the whole model again",
            code="incomplete_model",
            faults=list(faults[:100]),
        )


def _found(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What building the class gave, kept in the cache."""
    question = {"config": config, "shapes": shapes}
    versions = [version("transformers"), version("torch"), _VERSION]
    kept = cache_dir().parent / "skeletons" / f"{combine({'versions': versions, 'question': question})[:40]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(kept.read_bytes())
        if isinstance(known, dict) and known.keys() & {"skeleton", "refused"}:
            return known
    with _building:  # one at a time: each takes half a gigabyte
        found = _build(question)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(kept.parent, prefix=".writing-") as folder:
            (folder / kept.name).write_text(json.dumps(found))
            (folder / kept.name).rename(kept)
    return found


def _build(question: Mapping[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gnomon_workers.models.skeleton"]
    try:
        run = subprocess.run(  # noqa: S603 - this interpreter, and a module of this package
            command, input=json.dumps(question).encode(), capture_output=True, env=environment, timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"a model's class was not built within {LONGEST_S:.0f} s; the machine is busy, try again later"
        ) from error
    if run.returncode:
        reason = run.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1] or f"exit status {run.returncode}"
        return {"refused": f"building its class failed or took too much time or memory ({reason})"}
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
