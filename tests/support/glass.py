"""What a whole run needs: a real, small language model in a folder, and enough text to harvest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.models import make_glassllm as make_glass_folder

__all__ = ["make_corpus", "make_glass_folder"]

SENTENCE = "the queen said to her cat that a little door in the garden was never seen by any white rabbit"


def make_corpus(path: Path, *, n_documents: int = 800) -> Path:
    """Write made-up documents as JSON lines, about 60 tokens each."""
    words = SENTENCE.split()
    generator = np.random.default_rng(0)
    documents = (" ".join(generator.choice(words, 40)) + "." for _ in range(n_documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
