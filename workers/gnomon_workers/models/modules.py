"""Which modules a model has, how wide their outputs are and which tensors it needs: told by its own class.

The class is built without weights in a process of its own (see `skeleton`): building takes a second and 500 MB, and a
config decides what is built. What was found is kept in the cache, by the config and the tensors' names and shapes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from gnomon.errors import InvalidRequest, Unavailable
from gnomon_storage.digests import combine, spelled_out
from gnomon_workers.models.cache import cache_dir
from gnomon_workers.models.weight_files import Tensors
from gnomon_workers.runtime.scratch import scratch_folder

MOST_LAYERS: Final = 1000
"""That a config may declare: each takes milliseconds to build, and the deepest models have a few hundred."""
LONGEST_S: Final = 300.0
"""Of waiting for a model to be built, on a machine that is busy; it has two minutes of a core (see `skeleton`)."""
_VERSION: Final = 2
"""Grows when the same model would be described otherwise."""
_REDIRECTS: Final = frozenset(("transformers_weights", "configuration_files"))
"""Settings by which Transformers reads other weights, or another config, than the ones that lie there by name."""
_DEPTHS: Final = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "num_hidden_groups", "num_nextn_predict_layers",
)  # fmt: skip
_DEEPEST: Final = 64
"""Nesting of a config; what reads it recurses."""
_COMMAND: Final = (sys.executable, "-m", "gnomon_workers.models.skeleton")
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


def find_skeleton(source: str, config: Mapping[str, Any], tensors: Tensors) -> Skeleton:
    """The skeleton of a checkpoint with this config and these tensors.

    Raises InvalidRequest: "unsupported_model" where no model that can be harvested is built of it, "incomplete_model"
    where tensors are missing, have other shapes or dtypes or no place in the model. Raises Unavailable where building
    was cut off from outside.
    """
    _check_config(source, config)
    found = _found(config, tensors)
    if why := found.get("refused") or found.get("failed"):
        raise _unsupported(
            f"{source!r} cannot be harvested: {why}. Models are built by Transformers "
            f"{version('transformers')}, as a causal language model or as an encoder, and without code of their own"
        )
    skeleton = Skeleton.from_json(found["skeleton"])
    refuse_faults(source, skeleton.faults)
    return skeleton


def _check_config(source: str, config: Mapping[str, Any]) -> None:
    """Refuse what a config may ask for beyond a class that is built in seconds of the weights that were described."""
    if config.get("quantization_config"):
        raise _unsupported(
            f"{source!r} holds quantised weights, which are not read; give the model as it was before quantisation"
        )
    for path, value in _settings(source, config):
        name = path.rsplit(".", 1)[-1]
        if name in _REDIRECTS and value is not None:
            raise _unsupported(
                f"config.json of {source!r} sets {path} to {str(value)[:80]!r}, which points to other files than "
                "those read: model.safetensors, or the files of its index, and config.json. Take the setting out"
            )
        if name in _DEPTHS and isinstance(value, (int, float)) and not value <= MOST_LAYERS:
            raise _unsupported(
                f"config.json of {source!r} sets {path} to {value:.6g}, and models of {MOST_LAYERS} layers at most are "
                "built; correct it"
            )


def _settings(source: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Path and value of every setting, of the parts of a model as well."""
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise _unsupported(f"config.json of {source!r} is nested more than {_DEEPEST} deep; correct it")
        inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for name, part in inside:
            below = f"{path}.{name}" if path else str(name)
            yield below, part
            waiting.append((below, part, depth + 1))


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="unsupported_model")


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


def _found(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """What building the class gave; what it will always give is kept in the cache."""
    question = {"config": config, **asdict(tensors)}
    versions = [version("transformers"), version("torch"), _VERSION]
    key = combine(spelled_out({"versions": versions, "question": question}))
    kept = cache_dir().parent / "skeletons" / f"{key[:40]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(kept.read_bytes())
        if isinstance(known, dict) and known.keys() & {"skeleton", "refused"}:
            return known
    with _building:  # one at a time: each takes half a gigabyte
        found = _build(question)
    if "failed" not in found:
        _keep(kept, found)
    return found


def _keep(kept: Path, found: Mapping[str, Any]) -> None:
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(kept.parent, prefix=".writing-") as folder:
            (folder / kept.name).write_text(json.dumps(found))
            (folder / kept.name).rename(kept)


def _build(question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a process of its own; raises Unavailable where it was not its own question that ended it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(  # noqa: S603 - this interpreter, and a module of this package
            _COMMAND, input=json.dumps(question).encode(), capture_output=True, env=environment, timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired as error:
        raise _not_built(f"it took more than {LONGEST_S:.0f} s") from error
    except OSError as error:
        raise _not_built(f"no process could be made: {error}") from error
    if run.returncode == -signal.SIGXCPU:
        return {"failed": "building its class took too much time"}
    if run.returncode:
        last = run.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        how = f"signal {-run.returncode}" if run.returncode < 0 else f"exit status {run.returncode}"
        raise _not_built(f"its process ended with {how}{': ' if last else ''}{last[:300]}")
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def _not_built(why: str) -> Unavailable:
    return Unavailable(
        f"a model's class could not be built now ({why}); nothing is known of the model yet. Send the request again "
        "when the machine has room",
        code="not_built",
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
