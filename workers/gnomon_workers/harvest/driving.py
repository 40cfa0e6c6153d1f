"""Segments handed to a crew of harvest workers: each is harvested once, whichever of them are lost meanwhile."""

from __future__ import annotations

import time
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
from gnomon_workers.runtime.reporting import Left, WorkerLost

PLACES_EVERY_S: Final = 1.0
"""Between two looks at where the workers are."""
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
    _retiring: set[int] = field(default_factory=set)
    """Workers that get nothing more to do, and go."""
    _places_due: float = 0.0
    _life: int = 0
    """Workers that were replaced."""
    _n_tokens_before: int = 0
    """Tokens committed by workers that were lost."""

    def commits(self) -> Iterator[SegmentCommit]:
        """The commit of every plan, as they are made; raises WorkerLost where a segment costs too many workers."""
        for index in self.crew.present:
            self._prepare(index)
        while self._under_way or (self._has_more() and not self._is_leaving):
            self._resize()
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
            self.on_tick(self._n_tokens_before + sum(int(self.crew.gang.last_beats[i]) for i in self.crew.present))
        if self._has_more():
            raise Left

    @property
    def _is_leaving(self) -> bool:
        return self.crew.reporter.is_leaving

    def _resize(self) -> None:
        """Take in workers that are wanted, and let those go that are not, as soon as they have nothing under way."""
        reporter = self.crew.reporter
        if reporter.places_wanted is not None:
            self._follow(Counter(reporter.places_wanted))
        busy = {index for index, _ in self._under_way.values()}
        for index in self._retiring - busy:
            self._let_go(index)
        now = time.monotonic()
        if now >= self._places_due:
            self._places_due = now + PLACES_EVERY_S
            reporter.places = self.crew.places

    def _follow(self, wanted: Counter[str]) -> None:
        """Have as many workers as are wanted, where they are wanted as far as that needs no move."""
        self.crew.reporter.places_wanted = None
        mine = [index for index in self.crew.present if index not in self._retiring]
        spare = Counter(wanted)
        fits: set[int] = set()
        for index in mine:
            node = self.crew.gang.node_of(index)
            if node is not None and spare[node] > 0:
                spare[node] -= 1
                fits.add(index)
        n_more = wanted.total() - len(mine)
        if n_more < 0:
            newest_first = sorted(mine, key=lambda index: (index in fits, -index))
            self._retiring.update(newest_first[:-n_more])
        for node in list((+spare).elements())[: max(0, n_more)]:
            self._prepare(self.crew.grow(node))

    def _let_go(self, index: int) -> None:
        self._retiring.discard(index)
        self._forget(index)
        self.crew.shrink(index)

    def _forget(self, index: int) -> None:
        """Count what a worker has done as that of workers before, and expect nothing of it any more."""
        self._ready.discard(index)
        self._preparing = {reference: other for reference, other in self._preparing.items() if other != index}
        self._n_tokens_before += self._n_tokens.pop(index, 0)

    def _prepare(self, index: int) -> None:
        task = replace(self.task, life=self._life)
        self._preparing[self.crew.gang.members[index].prepare.remote(task)] = index

    def _has_more(self) -> bool:
        if not self._again and (plan := next(self.plans, None)) is not None:
            self._again.append(plan)
        return bool(self._again)

    def _hand_out(self) -> None:
        """Give plans to workers that have their model, the least busy first."""
        if self._is_leaving:
            return
        load = Counter(dict.fromkeys(self._ready - self._retiring, 0))
        load.update(index for index, _ in self._under_way.values() if index in load)
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
        self._forget(index)
        self._retiring.discard(index)
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
