"""Identifiers that sort by the time they were made."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def make_id(prefix: str) -> str:
    """A new id: the prefix, "_", and 26 characters, of which the first 10 are the time in milliseconds."""
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return prefix + "_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))
