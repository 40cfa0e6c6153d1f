"""Text to tokens: the model's own tokenizer, and the packing policy that makes contexts of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from gnomon.errors import InvalidRequest
from gnomon.specs import ConcatPacking, DocumentPacking, HarvestSpec
from gnomon.specs.harvest import Packing
from gnomon_workers.harvest.packing import Tokens, concat_contexts, document_contexts, within_budget
from gnomon_workers.models.tokenizers import begins_with_bos, only_described, without_sampling

_PIECE_CHARACTERS: Final = 1 << 18
_MAX_CHARACTERS_PER_TOKEN: Final = 32
_BATCH_DOCUMENTS: Final = 64
_BATCH_CHARACTERS: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what is special about it."""

    encoder: Any
    """The transformers tokenizer."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_ids: tuple[int, ...]
    begins_with_bos: bool
    """Whether it begins texts with its BOS token by itself."""
    sampling: tuple[str, ...] = ()
    """Settings by which it would draw lots, and which were switched off."""

    def provenance(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "class": type(self.encoder).__name__,
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "special_token_ids": list(self.special_ids),
            "begins_with_bos": self.begins_with_bos,
            **({"sampling_switched_off": list(self.sampling)} if self.sampling else {}),
        }

    def context_bos(self, packing: Packing) -> int | None:
        """The BOS token with which contexts begin, where they do; raises InvalidRequest where there is none."""
        match packing:
            case ConcatPacking(bos=bos):
                begins = self.begins_with_bos if bos == "auto" else bos
            case DocumentPacking(special_tokens=special_tokens):
                begins = special_tokens and self.begins_with_bos
        return _needed(self, "bos") if begins else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder; raises InvalidRequest, "unknown_model", where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        with only_described(folder) as view:
            encoder = AutoTokenizer.from_pretrained(view, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InvalidRequest(f"the model's tokenizer cannot be read ({reason})", code="unknown_model") from error
    sampling = without_sampling(encoder)
    encoder.truncation_side = "right"  # a document that is cut keeps its beginning, whatever the tokenizer is set to
    added = {number for number, token in encoder.added_tokens_decoder.items() if token.special}
    return Tokenizer(
        encoder=encoder,
        vocab_size=len(encoder),
        bos_id=encoder.bos_token_id,
        eos_id=encoder.eos_token_id,
        special_ids=tuple(sorted(added | set(encoder.all_special_ids))),
        begins_with_bos=begins_with_bos(encoder),
        sampling=sampling,
    )


def make_contexts(documents: Iterable[str], tokenizer: Tokenizer, spec: HarvestSpec) -> Iterator[Tokens]:
    """Contexts (context_length,) within the token budget.

    Raises InvalidRequest, "no_special_token", where the packing needs a token that the tokenizer lacks.
    """
    match spec.packing:
        case ConcatPacking(separator=separator):
            contexts = concat_contexts(
                encode_joined(documents, tokenizer),
                length=spec.context_length,
                separator=None if separator == "none" else _needed(tokenizer, separator),
                bos=tokenizer.context_bos(spec.packing),
            )
        case DocumentPacking(special_tokens=special_tokens):
            encoded = encode_single(documents, tokenizer, spec.context_length, special_tokens=special_tokens)
            contexts = document_contexts(encoded, length=spec.context_length)
    return within_budget(contexts, spec.token_budget)


def known_to_the_model(contexts: Iterable[Tokens], n_embeddings: int | None) -> Iterator[Tokens]:
    """The same contexts; raises InvalidRequest, "token_not_embedded", at one that the model has no embedding for."""
    for context in contexts:
        if n_embeddings is not None and int(context.max()) >= n_embeddings:
            raise InvalidRequest(
                f"the tokenizer gives token {int(context.max())}, and the model embeds {n_embeddings}: they do not "
                "belong together; give the model with its own tokenizer",
                code="token_not_embedded",
            )
        yield context


def encode_joined(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of whole documents, without special tokens.

    A document of more than 2^18 characters is encoded in pieces, cut at white space: a tokenizer keeps everything
    about a text in memory at once.
    """
    for batch in _batches(documents):
        pieces = [list(_pieces(document)) for document in batch]
        encoded = iter(_encode(tokenizer, [piece for document in pieces for piece in document]))
        for document in pieces:
            yield [token for ids in islice(encoded, len(document)) for token in ids]


def encode_single(
    documents: Iterable[str], tokenizer: Tokenizer, length: int, *, special_tokens: bool
) -> Iterator[list[int]]:
    """Token ids of documents cut to `length` tokens, with the tokenizer's own special tokens where asked for."""
    for batch in _batches(documents):
        cut = [document[: max(_PIECE_CHARACTERS, _MAX_CHARACTERS_PER_TOKEN * length)] for document in batch]
        yield from _encode(tokenizer, cut, add_special_tokens=special_tokens, truncation=True, max_length=length)


def _encode(tokenizer: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
    options = {"add_special_tokens": False, **options}
    ids: list[list[int]] = tokenizer.encoder(
        texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
    )["input_ids"]
    return ids


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in batches that keep all cores of a fast tokenizer busy, and bound its memory."""
    batch: list[str] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document)
        if len(batch) == _BATCH_DOCUMENTS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    """The document, cut before white space into pieces of at most _PIECE_CHARACTERS."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        window = document[start : start + _PIECE_CHARACTERS]
        cut = max(window.rfind(" "), window.rfind("\n"))
        end = start + (cut if cut > 0 else _PIECE_CHARACTERS)
        yield document[start:end]
        start = end
    yield document[start:]


def _needed(tokenizer: Tokenizer, which: str) -> int:
    number = tokenizer.eos_id if which == "eos" else tokenizer.bos_id
    if number is None:
        raise InvalidRequest(
            f"the packing needs the tokenizer's {which.upper()} token, and it has none; set packing.separator to "
            "'none' and packing.bos to false, or use packing.kind='document'",
            code="no_special_token",
        )
    return number
