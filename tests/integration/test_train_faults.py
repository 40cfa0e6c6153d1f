"""Training on a 2 x 2 mesh, with ranks killed at every named place and at random: not one bit may differ."""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from gnomon_workers.runtime.failpoints import Failpoint
from tests.support.stores import make_store
from tests.support.train_processes import Attempt, ProcessGang, plan_for

N_KILLS = int(os.environ.get("GNOMON_TEST_KILLS", "24"))
"""Random kills; a release is tried with more."""
EVERY = 4
"""Steps between two checkpoints."""
RANK_0 = {Failpoint.MANIFEST_BEFORE, Failpoint.MANIFEST_AFTER, Failpoint.DELETE_DURING}
"""Places that rank 0 alone comes by."""
REPLICA_0 = {Failpoint.UPLOAD_DURING}
"""Places that only the ranks of replica 0 come by: 0 and 1."""
LAST = (Failpoint.LOAD_CHECKPOINT, Failpoint.DELETE_DURING)
"""Places that need checkpoints to be there."""
NAMED = (*(point for point in Failpoint if point not in (*LAST, Failpoint.RUN_END)), *LAST)
"""Every place but the last, which is tried at the end: whatever is added to the enum is tried."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_store(tmp_path)
    return tmp_path


@pytest.mark.long
def test_killed_at_every_named_place_and_at_random_no_bit_differs(root: Path) -> None:
    rng = random.Random(20_240_607)
    n_steps = 30 + 2 * N_KILLS
    plan = plan_for(n_steps, checkpoint_every=EVERY)
    whole, gang = ProcessGang(root, "whole", plan), ProcessGang(root, "killed", plan)
    uninterrupted = whole.run()
    assert uninterrupted.finished
    attempts = [_killed_at(gang, point, rng) for point in NAMED]
    first = 1 + max(max(attempt.losses, default=0) for attempt in attempts)
    targets = sorted(rng.sample(range(first, n_steps - 2), N_KILLS))
    attempts += [_killed_at_random(gang, target, rng) for target in targets]
    attempts.append(_killed_at(gang, Failpoint.RUN_END, rng))
    attempts.append(gang.run())
    assert attempts[-1].finished
    _compare(gang, whole, attempts, uninterrupted, n_steps)


def _killed_at(gang: ProcessGang, point: Failpoint, rng: random.Random) -> Attempt:
    """An attempt of which one rank is killed at a named place."""
    rank = 0 if point in RANK_0 else rng.randrange(2) if point in REPLICA_0 else rng.randrange(4)
    hit = rng.randint(1, 3) if point.startswith("step.") else 1
    attempt = gang.run(f"{point}@rank={rank},hit={hit}:kill")
    assert attempt.killed == [rank], f"{point} did not happen on rank {rank}: {attempt.killed}, {attempt.refused}"
    return attempt


def _killed_at_random(gang: ProcessGang, target: int, rng: random.Random) -> Attempt:
    """An attempt of which one rank is killed some time after step `target`."""
    victim, delay_s = rng.randrange(4), rng.uniform(0, 0.05)
    sent: list[int] = []

    def kill(step: int, pids: list[int]) -> None:
        if step >= target and not sent:
            time.sleep(delay_s)
            sent.append(victim)
            os.kill(pids[victim], signal.SIGKILL)

    attempt = gang.run(on_step=kill)
    assert attempt.killed == sent == [victim], f"rank {victim} was not killed at step {target}: {attempt.killed}"
    return attempt


def _compare(
    gang: ProcessGang, whole: ProcessGang, attempts: list[Attempt], uninterrupted: Attempt, n_steps: int
) -> None:
    """Every loss that was ever computed, and every bit of the final state."""
    seen = [(step, loss) for attempt in attempts for step, loss in attempt.losses.items()]
    assert {step for step, _ in seen} == set(range(1, n_steps + 1))
    differing = [step for step, loss in seen if loss != uninterrupted.losses[step]]
    with_steps = [attempt.losses for attempt in attempts if attempt.losses]
    lost = [max(before) + 1 - min(after) for before, after in pairwise(with_steps)]
    ours, theirs = gang.final(), whole.final()
    print(
        f"{len(NAMED) + 1} failpoints, {N_KILLS} random kills; {n_steps} steps and {len(seen) - n_steps} replayed, "
        f"at most {max(lost)} at once; {len(differing)} losses differ"
    )
    # an interval, and what was done while the checkpoint was under way
    assert max(lost) <= 2 * EVERY
    assert not differing
    assert ours.step == theirs.step == n_steps
    assert ours.state == theirs.state and ours.state
    assert [shard.digest for shard in ours.shards] == [shard.digest for shard in theirs.shards]


def test_an_attempt_that_finds_all_steps_made_ends_well(root: Path) -> None:
    """As after a death between the last checkpoint and the answer: nothing is left but to say so."""
    gang = ProcessGang(root, "ended", plan_for(2 * EVERY, checkpoint_every=EVERY))
    first, again = gang.run(), gang.run()
    assert (first.finished, again.finished) == (True, True), again.refused
    assert (len(first.losses), again.losses) == (2 * EVERY, {})
    assert gang.final().step == 2 * EVERY
