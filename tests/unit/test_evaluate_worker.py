"""A worker of an evaluation: errors of the job's own are its answer, and not the loss of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from gnomon.errors import NotFound
from gnomon.specs import Evaluation
from gnomon_workers.evaluate.patching import Hooks
from gnomon_workers.evaluate.worker import EvaluateTask, EvaluateWorker
from gnomon_workers.runtime.answers import value_of


def test_a_store_that_was_deleted_is_the_jobs_own_error(tmp_path: Path) -> None:
    hooks = Hooks(read=("layers.0",), written=("layers.0",))
    task = EvaluateTask(
        store=(tmp_path / "act_deleted").as_uri(), dictionary=tmp_path.as_uri(), hooks=hooks, evaluation=Evaluation(),
        has_logits=False, input_roots=(), n_workers=1,
    )  # fmt: skip
    with pytest.raises(NotFound, match="act_deleted"):
        value_of(EvaluateWorker(0).run(task))
