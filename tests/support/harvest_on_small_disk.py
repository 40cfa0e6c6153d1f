"""A harvest on the small disk that is mounted at the path given; run in a mount namespace of its own.

Asserts that it waits, and goes on, as documented.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gnomon_workers.attempts.supervisor import Supervisor
from gnomon_workers.runtime.protocol import Outcome
from tests.integration.test_harvest_job import assign, make_spec
from tests.support.models import make_glassllm, write_corpus
from tests.support.rays import local_ray
from tests.support.waiting import wait_until


def main(root: Path) -> None:
    """A harvest of about 6 MB: before it there are 4 MB, then enough; then, resumed, enough for what is missing."""
    inputs = root / "in"
    inputs.mkdir()
    make_glassllm(inputs / "glassllm")
    write_corpus(inputs / "alice.jsonl", n_documents=600)
    spec = make_spec(inputs)
    with local_ray(n_cpus=1):
        leave_free(root, 4 << 20)
        first = Supervisor(assign(inputs, root, spec))
        said = wait_until(lambda: waits(first), "word of the wait")
        assert said[0].startswith("waiting (store_full): the disk that holds "), said
        assert "bytes free, and 6," in said[0], said
        assert not list(root.glob("activations/*/*")), "work had begun"
        (root / "filler").unlink()
        assert outcome(first).status == "succeeded", outcome(first)
        (store,) = root.glob("activations/*")
        (store / "manifest.json").unlink()
        (store / "segments" / "part-00000.json").unlink()
        shutil.rmtree(store / "segments" / "part-00000.a0001.zarr")
        leave_free(root, 3 << 20)
        second = Supervisor(assign(inputs, root, spec, attempt=2))
        assert outcome(second).status == "succeeded", outcome(second)
        assert not waits(second), waits(second)
    print("all is well")


def leave_free(root: Path, n_bytes: int) -> None:
    """Fill the disk."""
    (root / "filler").write_bytes(bytes(shutil.disk_usage(root).free - n_bytes))


def waits(supervisor: Supervisor) -> list[str]:
    """What was said before each pause."""
    logs = [report.data["message"] for report in supervisor.poll(0).reports if report.kind == "log"]
    return [message for message in logs if message.startswith("waiting")]


def outcome(supervisor: Supervisor) -> Outcome:
    """How the attempt ended."""
    return wait_until(lambda: supervisor.poll(0).outcome, "the outcome")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
