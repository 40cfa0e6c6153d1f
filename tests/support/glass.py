"""Enough text for a whole run with the small language model of models.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SENTENCE = "the queen said to her cat that a little door in the garden was never seen by any white rabbit"


def make_corpus(path: Path, *, n_documents: int = 800) -> Path:
    """Write made-up documents as JSON lines, about 60 tokens each."""
    words = SENTENCE.split()
    generator = np.random.default_rng(0)
    documents = (" ".join(generator.choice(words, 40)) + "." for _ in range(n_documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
