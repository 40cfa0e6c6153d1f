"""What holds for all tests."""

from __future__ import annotations

import os
import tempfile

# Ray runs its workers at a low priority, so that a laptop stays usable. Beside busy processes a test would wait for
# such workers for hours: a niceness of 15 is a thirtieth of the time that others get.
os.environ.setdefault("RAY_worker_niceness", "0")

# What is found out about models is cached: by the tests for themselves.
_cache = tempfile.TemporaryDirectory(prefix="gnomon-tests-cache-")
os.environ.setdefault("GNOMON_CACHE", _cache.name)
