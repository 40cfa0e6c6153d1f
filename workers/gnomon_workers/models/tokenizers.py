"""What a model's tokenizer does by itself."""

from __future__ import annotations

from typing import Any


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a Transformers tokenizer begins every text with its BOS token, as the model was trained to see it."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
