"""How often each fault happens: `make test` a few times, `make chaos` more, `make chaos COUNT=release` most."""

from __future__ import annotations

import os
from typing import Final

_COUNT: Final = os.environ.get("GNOMON_CHAOS", "")
assert _COUNT in ("", "some", "release"), f"COUNT is some or release, not {_COUNT!r}"
IS_CHAOS: Final = bool(_COUNT)
"""Whether this is `make chaos`."""


def count(few: int, some: int, release: int) -> int:
    """One of the three numbers."""
    return {"": few, "some": some, "release": release}[_COUNT]


def tell(**counts: object) -> None:
    """Print the one line with which a fault's test ends."""
    print("\n" + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()), flush=True)
