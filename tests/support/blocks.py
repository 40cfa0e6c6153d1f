"""Code blocks of the README, by the name in the comment before them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^(?:<!-- example: ([\w-]+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Name ("" if it has none), language and text of every block."""
    return [(name or "", language, text) for name, language, text in _BLOCK.findall(readme())]


def example(name: str) -> str:
    """The text of a named block."""
    (text,) = (text for found, _, text in blocks() if found == name)
    return text


def readme() -> str:
    """The README."""
    return (ROOT / "README.md").read_text()
