"""Folders for large temporary files of a process that may be killed at any time.

What a killed process left is removed by the next one that makes such a folder in the same place: each folder is held
for as long as its process lives.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gnomon.claims import claim, make_claimed, release

PREFIX: Final = "gnomon-scratch-"


@contextmanager
def scratch_folder(place: Path | None = None, *, prefix: str = PREFIX) -> Iterator[Path]:
    """A folder of this process, gone afterwards; in the system's place for temporary files ($TMPDIR) unless told.

    Nothing else may have a name with that prefix there.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    remove_abandoned(place, prefix=prefix)
    folder, held = make_claimed(lambda: Path(tempfile.mkdtemp(prefix=prefix, dir=place)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(held)


def remove_abandoned(place: Path | None = None, *, prefix: str = PREFIX) -> None:
    """Remove the folders whose processes are gone."""
    place = Path(tempfile.gettempdir()) if place is None else place
    for folder in place.glob(prefix + "*"):
        held = claim(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            release(held)
