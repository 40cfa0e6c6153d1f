"""A service with real inputs for tests of the API: a model folder, a text, keys of two projects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from gnomon.resources import Job
from gnomon_service.app import make_app
from gnomon_service.db.engine import Database
from gnomon_service.settings import Settings
from gnomon_service.tenancy.keys import SCOPES, Keys, Scope
from tests.support.service_jobs import Bench

D_IN = 16
N_POSITIONS = 64


def write_inputs(folder: Path) -> None:
    """A model of two layers, as its headers tell (its weights are zeros), and a text."""
    model = folder / "model"
    model.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_size": D_IN,
        "vocab_size": 32,
        "max_position_embeddings": N_POSITIONS,
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    shapes = {"model.embed_tokens.weight": (32, D_IN), "lm_head.weight": (32, D_IN), "model.norm.weight": (D_IN,)}
    for layer in range(2):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{part}_proj.weight": (D_IN, D_IN) for part in "qkvo"}
        shapes |= {f"{path}.{part}_layernorm.weight": (D_IN,) for part in ("input", "post_attention")}
        shapes |= {f"{path}.mlp.{part}_proj.weight": (32, D_IN) for part in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj.weight"] = (D_IN, 32)
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, model / "model.safetensors")
    (folder / "text.txt").write_text("a few words")
    (folder / "empty.txt").write_text("")


def harvest_of(inputs: Path) -> dict[str, Any]:
    """The JSON of a harvest of such inputs."""
    return {
        "kind": "harvest",
        "model": {"source": str(inputs / "model")},
        "text": [{"url": str(inputs / "text.txt")}],
        "hooks": ["model.layers.1"],
        "context_length": 32,
        "token_budget": 1024,
    }


def train_on(inputs: Path) -> dict[str, Any]:
    """The JSON of a training run on that harvest."""
    return {"kind": "train", "activations": harvest_of(inputs), "d_sae": 48, "token_budget": 8192}


class Service:
    """The application on a fresh SQLite database, and the queue behind it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.inputs = home / "inputs"
        write_inputs(self.inputs)
        fields: dict[str, Any] = {"home": home, "input_roots": (str(self.inputs),), "poll_s": 0.02, "reading_s": 600}
        self.settings = Settings(**(fields | settings))
        self.app = make_app(self.settings)
        self.bench = Bench(Database(self.settings.database_url))
        self.key = self.new_key()

    def new_key(self, project: str = "default", scopes: tuple[Scope, ...] = SCOPES, **fields: Any) -> str:
        """The text of a new key."""
        return Keys(self.bench.database).create(project=project, name="test", scopes=scopes, **fields).key

    def client(self, key: str | None = None) -> TestClient:
        """A client with a key, the first one by default; "" for none."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)

    def harvest(self, **changes: Any) -> dict[str, Any]:
        """The JSON of a harvest of the inputs."""
        return harvest_of(self.inputs) | changes

    def train(self, **changes: Any) -> dict[str, Any]:
        """The JSON of a training run on that harvest."""
        return train_on(self.inputs) | changes

    def submit(self, spec: dict[str, Any], **headers: str) -> Job:
        """Submit a job that must be accepted."""
        answer = self.client().post("/v1/jobs", json={"spec": spec}, headers=headers)
        assert answer.status_code == 201, answer.text
        return Job.read(answer.content)

    def count_jobs(self) -> int:
        """Jobs of the project."""
        return len(self.client().get("/v1/jobs?limit=200").json()["items"])


@contextmanager
def running_service(home: Path, **settings: Any) -> Iterator[Service]:
    """A service whose connections are closed afterwards."""
    service = Service(home, **settings)
    try:
        yield service
    finally:
        service.bench.database.close()
        service.app.state.services.inspector.close()
        service.app.state.services.database.close()


def expect_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Check the shape of a refusal; returns it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["detail"]
    assert "Traceback" not in answer.text
    return dict(problem)
