"""Models on the Hugging Face hub: a name and revision pinned to a commit, from the hub or from the local cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gnomon.errors import InvalidRequest, Unavailable
from gnomon_workers.models.tokenizers import TOKENIZER_FILES
from gnomon_workers.models.weight_files import (
    INDEX,
    Tensors,
    bad_model,
    check_alone,
    read_config,
    read_index,
    read_tensors,
    weight_files,
)

HUB_ID: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")
MODEL_FILES: Final = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.txt", "tokenizer*", "*.model",
    "generation_config.json", *TOKENIZER_FILES,
)  # fmt: skip
"""What is downloaded of a model: no code and no pickles."""
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A model at one commit."""

    commit: str
    config: dict[str, Any]
    tensors: Tensors


def find_hub_model(repo: str, revision: str | None) -> HubModel:
    """Pin a revision and read the model's config and tensor shapes.

    Raises InvalidRequest, "unknown_model", where the hub has no such model or it has no safetensors, and
    Unavailable, "hub_unreachable", where the hub does not answer and the local cache does not hold it.
    """
    cached = cached_snapshot(repo, revision)
    if cached is not None and revision is not None and COMMIT.match(revision):
        return _from_folder(cached)
    from huggingface_hub import HfApi

    try:
        with _refused_as_such(repo, revision):
            return _ask(HfApi(), repo, revision)
    except unanswered() as error:
        if cached is not None:
            return _from_folder(cached)
        raise Unavailable(
            f"model {repo!r} is neither a path nor in the local cache, and the hub does not answer ({_first(error)}); "
            "for a local model give an absolute path",
            code="hub_unreachable",
        ) from error


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Folder of a revision in the local cache, if its config and all its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, InvalidRequest):
        return None
    return folder if (folder / "config.json").is_file() else None


def _ask(api: Any, repo: str, revision: str | None) -> HubModel:
    commit = api.model_info(repo, revision=revision, timeout=_TIMEOUT_S).sha
    if not isinstance(commit, str) or not COMMIT.match(commit):
        raise bad_model(f"the hub names no commit for {repo!r} at {revision!r}")
    config = json.loads(Path(api.hf_hub_download(repo, "config.json", revision=commit)).read_bytes())
    found = api.get_safetensors_metadata(repo, revision=commit)
    if not found.sharded and api.file_exists(repo, INDEX, revision=commit):
        check_alone(read_index(Path(api.hf_hub_download(repo, INDEX, revision=commit))).values())
    files = [(name, file.tensors) for name, file in found.files_metadata.items()]
    return HubModel(commit=commit, config=config, tensors=Tensors.of_files(files, found.weight_map))


def _from_folder(folder: Path) -> HubModel:
    return HubModel(commit=folder.name, config=read_config(folder), tensors=read_tensors(folder))


@contextmanager
def _refused_as_such(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's refusals into InvalidRequest; failures to answer pass through."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except LocalEntryNotFoundError:  # an EntryNotFoundError in name, but it means that the hub did not answer
        raise
    except GatedRepoError as error:
        raise bad_model(
            f"model {repo!r} is gated; accept its licence and set HF_TOKEN where the service runs"
        ) from error
    except RevisionNotFoundError as error:
        raise bad_model(f"the hub has no revision {revision!r} of model {repo!r}") from error
    except RepositoryNotFoundError as error:
        raise bad_model(
            f"the hub has no model {repo!r}, or it is private; for a local model give an absolute path"
        ) from error
    except NotASafetensorsRepoError as error:
        raise bad_model(f"model {repo!r}{at} has no safetensors weights, and other formats are never read") from error
    except EntryNotFoundError as error:
        raise bad_model(f"model {repo!r}{at} lacks a file that is needed: {_first(error)}") from error
    except HFValidationError as error:
        raise bad_model(f"{repo!r} is not the name of a model; write org/name or an absolute path") from error


def unanswered() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the hub does not answer.

    A connection that fails is an error of its HTTP library, httpx or httpx2 by release, whose base class is among
    those of HfHubHTTPError; it is no OSError.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return (OSError, OfflineModeIsEnabled, *(base for base in HfHubHTTPError.__bases__ if base is not OSError))


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
