"""What holds for all tests."""

from __future__ import annotations

import os

# Ray runs its workers at a low priority, so that a laptop stays usable. Beside busy processes a test would wait for
# such workers for hours: a niceness of 15 is a thirtieth of the time that others get.
os.environ.setdefault("RAY_worker_niceness", "0")
