"""Where converted and downloaded models, and what was found out about models, are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GNOMON_CACHE/models, by default ~/.cache/gnomon/models."""
    base = os.environ.get("GNOMON_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "gnomon") / "models"
