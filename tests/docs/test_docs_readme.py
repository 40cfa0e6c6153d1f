"""The README's examples and the scripts in examples/, run as they stand against a live service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gnomon
from gnomon.client import Client
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings
from tests.support.blocks import ROOT, example
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm

pytestmark = pytest.mark.long
HOOK = "model.layers.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Someone with a terminal who follows the README."""

    home: Path
    client: Client

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the reader's environment."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MODEL": str(self.home / "inputs/model"),
            "CORPUS": str(self.home / "inputs/corpus.jsonl"),
            "HOOK": HOOK,
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        return subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True)

    def bash(self, name: str, *, after: str = "") -> str:
        """Run a shell block of the README, in the shell where `after` was run; returns what it printed."""
        done = self.run("bash", "-euo", "pipefail", "-c", f"{after}\n{example(name)}")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, *arguments: str) -> str:
        """Run Python; returns what it printed."""
        done = self.run(sys.executable, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A home with a service in it, a small model and a small corpus."""
    home = tmp_path_factory.mktemp("reader")
    (home / "inputs").mkdir()
    make_glassllm(home / "inputs/model")
    make_corpus(home / "inputs/corpus.jsonl")
    settings = load_settings(home=home / ".gnomon", port=0, input_roots=(str(home / "inputs"),), n_cpus=2)
    with Embedded(settings) as service, Client(service.url, service.key) as client:
        yield Reader(home=home, client=client)


@pytest.fixture(scope="module")
def curl_job(reader: Reader) -> str:
    """Id of the job that the README submits first."""
    job_id: str = json.loads(reader.bash("curl"))["id"]
    return job_id


def test_curl_submits_a_job_and_follows_it_to_its_end(reader: Reader, curl_job: str) -> None:
    lines = reader.bash("curl-events", after='eval "$(gnomon env)"').splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert {event["job_id"] for event in events} == {curl_job}
    assert events[-1]["data"]["to"] == "succeeded"
    job = reader.client.job(curl_job)
    assert job.job.name == "first"
    assert job.wait()


def test_curl_sent_again_is_the_same_job(reader: Reader, curl_job: str) -> None:
    assert json.loads(reader.bash("curl"))["id"] == curl_job


def test_sdk_trains_and_loads_a_dictionary(reader: Reader, curl_job: str) -> None:
    lines = reader.python("-c", example("sdk")).splitlines()
    assert lines[-1] == "torch.Size([1024, 128])"
    assert 0 < float(lines[-2].split()[0]) < 1
    assert re.search(r" [\d.]+ to [\d.]+, median [\d.]+$", lines[-2])
    (job,) = (job for job in reader.client.jobs() if job.name == "second")
    assert job.state == "succeeded"


def test_figures_are_drawn(reader: Reader, curl_job: str) -> None:
    reader.client.job(curl_job).wait()
    reader.python("-c", example("figures"))
    assert all("plotly" in (reader.home / f"{name}.html").read_text() for name in ("training", "alignment"))


def test_cli_trains_lists_and_downloads(reader: Reader, curl_job: str) -> None:
    printed = reader.bash("cli")
    assert "succeeded" in printed
    assert printed.rstrip().endswith("my-dictionary")
    dictionary = gnomon.load(reader.home / "my-dictionary")
    assert (dictionary.cfg.architecture, dictionary.cfg.d_sae, dictionary.cfg.k) == ("topk", 1024, 16)
    scores = dictionary.alignment()
    assert float((scores - 1).abs().max()) > 1e-3, "alignment none leaves the encoder free"


def test_script_trains_one_dictionary(reader: Reader) -> None:
    arguments = ["inputs/model", "inputs/corpus.jsonl"]
    model, corpus = (str(reader.home / name) for name in arguments)
    options = ["--d-sae", "512", "--k", "8", "--tokens", "32768"]
    printed = reader.python(str(ROOT / "examples/train.py"), model, corpus, HOOK, *options)
    assert "topk, d_in=128, d_sae=512" in printed
    low, high = (float(word) for word in printed.split("alignment from ")[1].split(" to "))
    assert abs(low - 1) <= 1e-5
    assert abs(high - 1) <= 1e-5


def test_script_compares_alignment(reader: Reader) -> None:
    model, corpus = str(reader.home / "inputs/model"), str(reader.home / "inputs/corpus.jsonl")
    options = ["--d-sae", "512", "--k", "8", "--tokens", "32768", "--seeds", "1"]
    printed = reader.python(str(ROOT / "examples/compare_alignment.py"), model, corpus, HOOK, *options)
    assert [line.split()[0] for line in printed.splitlines()] == ["alignment", "none", "orth"]


def test_all_examples_share_one_harvest(reader: Reader, curl_job: str) -> None:
    reader.client.job(curl_job).wait()
    assert len({store.id for store in reader.client.activations()}) == len(reader.client.jobs(kind="harvest"))
    trained = [job for job in reader.client.jobs(kind="train") if job.name in ("first", "second", "unaligned")]
    stores = {job.result["store_id"] for job in trained if job.result}
    assert len(stores) == 1
