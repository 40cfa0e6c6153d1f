"""Files of a published dictionary, written so that a folder never looks whole before it is."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gnomon._requests import Request, dictionary_file
from gnomon.errors import CorruptArtifact, GnomonError
from gnomon.resources import DictionaryRecord

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDownload:
    """One file to fetch, and where it goes."""

    request: Request[None]
    path: Path
    n_bytes: int

    @contextmanager
    def writer(self) -> Iterator[BinaryIO]:
        """A file that takes its place only when it is complete; raises CorruptArtifact if it is not."""
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("wb") as file:
                yield file
            if part.stat().st_size != self.n_bytes:
                raise CorruptArtifact(
                    f"{self.path.name!r} arrived with {part.stat().st_size} bytes, wanted {self.n_bytes}; "
                    "download again"
                )
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


def plan_download(dictionary: DictionaryRecord, folder: Path) -> list[FileDownload]:
    """All files of a dictionary, cfg.json last: without it, no loader takes the folder for a dictionary.

    Makes the folder. Raises GnomonError where the server names a file that could lie outside it.
    """
    names = sorted(dictionary.files, key=lambda name: (name == "cfg.json", name))
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise GnomonError(f"the server names a file {name!r}; refused", code="bad_response")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        FileDownload(request=dictionary_file(dictionary.id, name), path=folder / name, n_bytes=dictionary.files[name])
        for name in names
    ]
