"""A queue on the small disk that is mounted at the path given; run in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.conftest import migrate
from tests.chaos.counts import count, tell
from tests.chaos.scene import Scene, counts_of, scene_of
from tests.support.waiting import wait_until


def main(disk: Path, home: Path) -> None:
    """Fill the disk again and again under clients and dispatchers; what they note lies elsewhere."""
    url = f"sqlite:///{disk / 'gnomon.db'}"
    migrate(url)
    n_rounds = count(2, 5, 40)
    with scene_of(url, home) as scene:
        client, dispatcher = scene.new_client(0.02), scene.new_dispatcher()
        for _ in range(n_rounds):
            wait_until(scene.n_held, "a job that is held")
            n_refused = refusals(scene)
            with full(disk):
                wait_until(lambda n=n_refused: refusals(scene) >= n + 3, "writes that are refused")  # type: ignore[misc]
            n_answers, n_ended = len(scene.diary.sent().answers), scene.n_ended()
            wait_until(lambda n=n_answers: len(scene.diary.sent().answers) > n + 3, "the next answers")  # type: ignore[misc]
            wait_until(lambda n=n_ended: scene.n_ended() > n, "the next job's end")  # type: ignore[misc]
        client.stop()
        dispatcher.stop()
        history = scene.drain()
        tell(fills=n_rounds, refused=refusals(scene), **counts_of(scene, history))


def refusals(scene: Scene) -> int:
    """How many submits were refused."""
    return sum(words[0] == "unavailable" for words in scene.diary.lines())


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for n_bytes in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(n_bytes))
    try:
        yield
    finally:
        ballast.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
