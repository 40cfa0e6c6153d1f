"""Does every job outlast its store? Takes the store away from a service with default settings, and gives it back.

    python benchmarks/outages.py --store s3 --database postgresql --outage-s 600
    python benchmarks/outages.py --store disk --database sqlite --outage-s 600       # mounts a tmpfs: needs root

"s3" is a SeaweedFS that nobody can connect to meanwhile; "disk" a file system of its own that is full meanwhile, on
which all of the service lies: store, database and logs. The store goes while a job harvests, while one trains, when one
is about to save a checkpoint, and when one evaluates and exports. Every job must end by itself, at its first attempt,
with the losses and weights of one that nothing happened to; ends with 1 where one did not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.databases import fresh_database
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.proxy import Proxy
from tests.support.seaweed import environment, new_place, s3_server

import gnomon
from gnomon import Client, Mesh, ModelSource, TextSource, TopK, TrainSpec
from gnomon.errors import GnomonError, Unavailable
from gnomon.resources import TERMINAL_STATES, Event, Job
from gnomon.specs import Adam, Evaluation, HarvestSpec
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings

N_STEPS, EVERY = 3000, 500
DISK_MIB = 200

Outage = Callable[[], AbstractContextManager[None]]


def main() -> int:
    """Run, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["s3", "disk"], default="s3")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--outage-s", type=float, default=600.0, help="how long the store is away")
    parser.add_argument("--cpus", type=int, default=4, help="what the service's own Ray offers")
    options = parser.parse_args()
    place = s3_place if options.store == "s3" else disk_place
    with (
        tempfile.TemporaryDirectory(prefix="gnomon-outages-") as folder,
        place(Path(folder)) as (home, root, outage),
        fresh_database(options.database, home) as database_url,
    ):
        (home / "inputs").mkdir()
        make_glassllm(home / "inputs/model")
        make_corpus(home / "inputs/corpus.jsonl")
        settings = load_settings(
            home=home, port=0, n_cpus=options.cpus, storage_root=root, database_url=database_url,
            input_roots=(str(home / "inputs"),),
        )  # fmt: skip
        with Embedded(settings) as service, Client(service.url, service.key) as client:
            print(f"{options.store} away for {options.outage_s:.0f} s, database {options.database}", flush=True)
            return _try_all(client, home / "inputs", outage, options.outage_s)


def _try_all(client: Client, inputs: Path, outage: Outage, outage_s: float) -> int:
    expected = finish(client, client.submit(spec_of(inputs)).id)
    assert expected.state == "succeeded", expected.error
    losses, weights = losses_of(client, expected.id), weights_of(client, expected)
    n_wrong = 0
    for phase, is_due in PHASES.items():
        if phase == "harvest":
            client.delete_activations(store_of(expected))
            until(lambda: all(store.state == "deleted" for store in client.activations()))
        job_id = client.submit(spec_of(inputs)).id
        watched = next(iter(client.job(job_id).job.depends_on), job_id) if phase == "harvest" else job_id
        until(lambda watched=watched, is_due=is_due: is_due(client.job(watched).job, list(client.events(watched))))
        with outage():
            time.sleep(outage_s)
        began = time.monotonic()
        job = finish(client, job_id)
        after_s = time.monotonic() - began
        told = [event for each in (*job.depends_on, job_id) for event in client.events(each)]
        n_waits = sum(event.kind == "log" and event.data["message"].startswith("waiting (") for event in told)
        attempts = {client.job(each).job.attempt for each in (*job.depends_on, job_id)}
        is_equal = job.state == "succeeded" and losses_of(client, job_id) == losses
        is_equal = is_equal and weights_of(client, job) == weights
        how = "equal to the bit" if is_equal else f"DIFFER ({job.error})"
        print(
            f"{phase:<10}  {job.state}, attempts {sorted(attempts)}, waited {n_waits} times, ended {after_s:.0f} s "
            f"after the store came back; losses and weights {how}",
            flush=True,
        )
        n_wrong += not (is_equal and attempts == {1})
    return int(n_wrong > 0)


def _is_training(job: Job, step: int) -> bool:
    progress = job.progress
    return bool(progress and progress.phase == "train" and progress.done >= step * 64)


PHASES: dict[str, Callable[[Job, list[Event]], bool]] = {
    "harvest": lambda _, events: any(event.kind == "segment" for event in events),
    "train": lambda job, _: _is_training(job, EVERY + 10),
    "checkpoint": lambda job, _: _is_training(job, 3 * EVERY - 60),
    "export": lambda job, _: bool(job.progress and job.progress.phase in ("evaluate", "export")),
}


def harvest_of(inputs: Path) -> HarvestSpec:
    """A short harvest of several segments."""
    return HarvestSpec(
        model=ModelSource(source=str(inputs / "model"), dtype="float32"),
        text=(TextSource(url=str(inputs / "corpus.jsonl")),), hooks=("model.layers.2",), context_length=64,
        token_budget=40_000, segment_tokens=4096, n_workers=1,
    )  # fmt: skip


def spec_of(inputs: Path) -> TrainSpec:
    """A short training, with its harvest."""
    return TrainSpec(
        activations=harvest_of(inputs), d_sae=512, activation=TopK(k=16), optimizer=Adam(lr=3e-3), batch_size=64,
        token_budget=64 * N_STEPS, mesh=Mesh(features=2), log_every=5, checkpoint_every=EVERY,
        evaluation=Evaluation(n_tokens=1000, n_ce_tokens=512),
    )  # fmt: skip


@contextmanager
def s3_place(folder: Path) -> Iterator[tuple[Path, str, Outage]]:
    """A home, and an S3 server behind a proxy that can be closed."""
    (folder / "weed").mkdir()
    with (
        s3_server(folder / "weed") as variables,
        Proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        environment(variables | {"AWS_ENDPOINT_URL": proxy.url}),
    ):
        home = folder / "home"
        home.mkdir()
        yield home, new_place(), proxy.away


@contextmanager
def disk_place(folder: Path) -> Iterator[tuple[Path, str, Outage]]:
    """A home on a small disk that can be filled."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)], check=True)
    try:
        home = disk / "home"
        home.mkdir()
        yield home, (home / "store").as_uri(), lambda: _full(disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    """Leave no byte free, whatever is deleted meanwhile."""
    stop, ballast = threading.Event(), disk / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            while not stop.wait(0.05):
                for n_bytes in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            os.write(file.fileno(), bytes(n_bytes))

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield
    finally:
        stop.set()
        filler.join()
        ballast.unlink()


def finish(client: Client, job_id: str) -> Job:
    """The job once it has ended."""
    found: list[Job] = []

    def has_ended() -> bool:
        found.append(client.job(job_id).job)
        return found[-1].state in TERMINAL_STATES

    until(has_ended)
    return found[-1]


def until(is_so: Callable[[], bool]) -> None:
    """Wait for something that the service says; it may be away."""
    while True:
        with contextlib.suppress(Unavailable, GnomonError):
            if is_so():
                return
        time.sleep(0.05)


def losses_of(client: Client, job_id: str) -> dict[int, float]:
    """Loss by step; of a step that was repeated, all must agree."""
    found: dict[int, float] = {}
    for event in client.events(job_id):
        if event.kind == "metrics" and found.setdefault(event.data["step"], event.data["loss"]) != event.data["loss"]:
            found[event.data["step"]] = float("nan")
    return found


def weights_of(client: Client, job: Job) -> dict[str, Any]:
    """The dictionary's tensors as bytes, by name."""
    assert job.result is not None
    dictionary = gnomon.load(job.result["dictionary_id"], client=client)
    return {name: tensor.numpy().tobytes() for name, tensor in dictionary.state_dict().items()}


def store_of(job: Job) -> str:
    """The store that a job trained on."""
    assert job.result is not None
    return str(job.result["store_id"])


if __name__ == "__main__":
    sys.exit(main())
