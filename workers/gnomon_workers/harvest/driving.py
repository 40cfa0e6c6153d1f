"""Segments handed to a crew of harvest workers: each is harvested once, whichever of them are lost meanwhile."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit, segment_name
from gnomon_storage.writing import load_commit
from gnomon_workers.harvest.packing import SegmentPlan
from gnomon_workers.harvest.worker import HarvestTask
from gnomon_workers.runtime.crew import MAX_LOSSES, Crew
from gnomon_workers.runtime.reporting import WorkerLost

QUEUED_PER_WORKER: Final = 2
"""One segment under way and one waiting, so that no worker idles; more would only hold memory."""


@dataclass(slots=True, kw_only=True)
class Driver:
    """Keeps every worker busy until the plans are used up."""

    crew: Crew
    task: HarvestTask
    plans: Iterator[SegmentPlan]
    on_ready: Callable[[], None]
    """Called as soon as a worker has its model."""
    on_tick: Callable[[int], None]
    """Called some times a second, with the tokens that passed through the model."""
    _again: deque[SegmentPlan] = field(default_factory=deque)
    """Plans that come before all others: those of lost workers, and one that was looked at."""
    _preparing: dict[Any, int] = field(default_factory=dict)
    _ready: set[int] = field(default_factory=set)
    _under_way: dict[Any, tuple[int, SegmentPlan]] = field(default_factory=dict)
    """In the order in which they were handed out, which is a worker's own."""
    _n_lost: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Workers lost by each segment."""
    _n_tokens: Counter[int] = field(default_factory=Counter)
    """Tokens committed by the present worker of each place."""
    _life: int = 0
    """Workers that were replaced."""
    _n_tokens_before: int = 0
    """Tokens committed by workers that were lost."""

    def commits(self) -> Iterator[SegmentCommit]:
        """The commit of every plan, as they are made; raises WorkerLost where a segment costs too many workers."""
        for index in self.crew.present:
            self._prepare(index)
        while self._has_more() or self._under_way:
            self._hand_out()
            running = self._preparing | {reference: index for reference, (index, _) in self._under_way.items()}
            look = self.crew.look(running)
            for reference, value in look.values.items():
                if reference in self._preparing:
                    self._ready.add(self._preparing.pop(reference))
                    self.on_ready()
                else:
                    yield self._committed(reference, value)
            for index, why in look.lost.items():
                yield from self._replace(index, why)
            self.on_tick(self._n_tokens_before + sum(int(beat) for beat in self.crew.gang.last_beats))

    def _prepare(self, index: int) -> None:
        task = replace(self.task, life=self._life)
        self._preparing[self.crew.gang.members[index].prepare.remote(task)] = index

    def _has_more(self) -> bool:
        if not self._again and (plan := next(self.plans, None)) is not None:
            self._again.append(plan)
        return bool(self._again)

    def _hand_out(self) -> None:
        """Give plans to workers that have their model, the least busy first."""
        load = Counter(dict.fromkeys(self._ready, 0))
        load.update(index for index, _ in self._under_way.values())
        while load and min(load.values()) < QUEUED_PER_WORKER and self._has_more():
            index, plan = min(load, key=lambda each: (load[each], each)), self._again.popleft()
            self._under_way[self.crew.gang.members[index].harvest.remote(plan)] = (index, plan)
            load[index] += 1

    def _committed(self, reference: Any, commit: SegmentCommit) -> SegmentCommit:
        index, _ = self._under_way.pop(reference)
        self.crew.did(index)
        self._n_tokens[index] += commit.n_tokens
        return commit

    def _replace(self, index: int, why: WorkerLost) -> Iterator[SegmentCommit]:
        """Take back what a lost worker had, and replace it; yields what it had committed and not said."""
        self._ready.discard(index)
        self._preparing = {reference: other for reference, other in self._preparing.items() if other != index}
        mine = [(reference, plan) for reference, (other, plan) in self._under_way.items() if other == index]
        missing = []
        for reference, plan in mine:
            del self._under_way[reference]
            commit = load_commit(Location.open(self.task.store), plan.split, plan.index)
            if commit is None:
                missing.append(plan)
            else:
                self._n_tokens[index] += commit.n_tokens
                yield commit
        self._again.extendleft(reversed(missing))
        self._n_tokens_before += self._n_tokens.pop(index, 0)
        self._blame(missing[:1], why)
        names = " and ".join(f"{plan.split}/{segment_name(plan.index)}" for plan in missing) or "no segment"
        if self.crew.replace(index, why, begun=f"and {names} harvested again"):
            self._life += 1
            self._prepare(index)

    def _blame(self, plans: list[SegmentPlan], why: WorkerLost) -> None:
        """Count a loss for the segment that was under way; another attempt, perhaps, where it is one too many."""
        for plan in plans:
            self._n_lost[plan.split, plan.index] += 1
            if self._n_lost[plan.split, plan.index] >= MAX_LOSSES:
                name = f"{plan.split}/{segment_name(plan.index)}"
                raise WorkerLost(f"{MAX_LOSSES} workers were lost while they harvested {name}: {why}") from why
