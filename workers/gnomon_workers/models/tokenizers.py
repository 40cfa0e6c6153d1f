"""A model's tokenizer: the files that it is read from, and what it does by itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from gnomon.errors import InvalidRequest
from gnomon_workers.runtime.scratch import scratch_folder

logger = logging.getLogger(__name__)

TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json",
    "prophetnet.tokenizer", "sentencepiece.model", "source.spm", "spm.model", "spm_char.model", "target.spm",
    "target_vocab.json", "tekken.json", "tiktoken.model", "vocab-src.json", "vocab-tgt.json",
    "word_pronunciation.json", "word_shape.json",
)  # fmt: skip
"""What a tokenizer may be made of, all of which belongs to a model's fingerprint."""

_SAMPLING: Final = ("dropout", "alpha", "nbest_size")
"""Of BPE and of Unigram, as tokenizers' models call them."""


@contextmanager
def only_described(folder: Path) -> Iterator[Path]:
    """The folder as a tokenizer may see it: a setting can name other files, which no fingerprint covers."""
    with scratch_folder() as view:
        for name in ("config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                (view / name).symlink_to((folder / name).absolute())
        _drop_versions(view / "tokenizer_config.json")
        yield view


def _drop_versions(path: Path) -> None:
    """Have tokenizer.json read, and not another that the settings name for the release of Transformers."""
    with suppress(OSError, ValueError, RecursionError):  # what is wrong with it is said by whoever reads it next
        settings = json.loads(path.read_bytes())
        if isinstance(settings, dict) and settings.pop("fast_tokenizer_files", None) is not None:
            path.unlink()
            path.write_text(json.dumps(settings))


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a Transformers tokenizer begins every text with its BOS token, as the model was trained to see it."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def without_sampling(tokenizer: Any) -> tuple[str, ...]:
    """Switch off what makes a tokenizer draw lots, as some were trained with; returns the settings that did.

    Raises InvalidRequest, "random_tokenizer", where it cannot be switched off.
    """
    if (getattr(tokenizer, "sp_model_kwargs", None) or {}).get("enable_sampling"):
        raise InvalidRequest(
            "the tokenizer's sp_model_kwargs enable sampling, so that the same text gives other tokens each time; take "
            "enable_sampling out of its tokenizer_config.json",
            code="random_tokenizer",
        )
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    drawing = [name for name in _SAMPLING if getattr(model, name, None)]
    for name in drawing:
        setattr(model, name, None)
    if drawing:
        logger.warning("the tokenizer draws lots (%s), which is switched off", ", ".join(drawing))
    return tuple(drawing)
