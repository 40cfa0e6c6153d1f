"""A harvest job, as its supervisor runs it: read and pack text, hand segments to a gang, seal the store."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from gnomon.errors import InvalidRequest, NotFound
from gnomon.events import Logged
from gnomon.resources import HarvestedOn, HarvestResult
from gnomon.specs import HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit
from gnomon_storage.writing import leftovers, load_commit, seal
from gnomon_workers.harvest.driving import Driver
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.harvest.packing import SegmentPlan, plan_segments
from gnomon_workers.harvest.progress import HarvestProgress
from gnomon_workers.harvest.readers import text_bytes
from gnomon_workers.harvest.room import committed_tokens, expected_tokens, needed_bytes
from gnomon_workers.harvest.telling import tell_rounding, warn_of_bad_documents, warn_of_short_text
from gnomon_workers.harvest.text import Tally, read_documents, resolve_text, text_fingerprint
from gnomon_workers.harvest.tokens import Tokenizer, known_to_the_model, load_tokenizer, make_contexts
from gnomon_workers.harvest.worker import HarvestTask, HarvestWorker
from gnomon_workers.models.catalog import ModelDescription, describe_model
from gnomon_workers.models.loading import model_folder
from gnomon_workers.runtime.crew import Crew
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.gang import Gang
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.runtime.reporting import Reporter

LOOKAHEAD_TOKENS: Final = 1 << 21
"""Tokens packed before work begins: a text that ends within them has its exact length shown."""
_PACKAGES: Final = ("gnomon", "numpy", "tokenizers", "torch", "transformers", "zarr")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestRun:
    """One attempt at a harvest, with its sources looked up."""

    assignment: Assignment
    spec: HarvestSpec
    store: Location
    model: ModelDescription
    text_fingerprint: str
    tokenizer: Tokenizer

    def task(self) -> HarvestTask:
        """What the workers are told."""
        return HarvestTask(
            spec=self.spec,
            store=self.store.url,
            attempt=self.assignment.attempt,
            special_ids=self.tokenizer.special_ids,
            input_roots=self.assignment.input_roots,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Plans of a harvest, of which the first are made."""

    plans: Iterator[SegmentPlan]
    """All of them."""
    n_tokens: int
    """Tokens of those that are made."""
    is_all: bool
    """Whether there are no others."""


def run_harvest(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
    """Harvest the assignment's store; segments that an earlier attempt committed are kept as they are."""
    store = ProjectLayout.open(assignment.storage_root).store(assignment.store_id)
    sealed = find_sealed(store)
    if sealed is not None:
        return _result(sealed, n_tokens=0, tokens_per_s=None)
    run = prepare(assignment, store)
    tally = Tally()
    ahead = look_ahead(make_plans(run, tally))
    reporter.phase("harvest", total=ahead.n_tokens if ahead.is_all else run.spec.token_budget, unit="tokens")
    n_told = warn_of_bad_documents(tally, reporter)
    check_room(run, ahead, tally)
    progress = HarvestProgress(reporter=reporter)
    commits = harvest_segments(run, ahead.plans, progress)
    if tally.n_bad > n_told:
        warn_of_bad_documents(tally, reporter)
    if not sum(commit.n_rows for commit in commits if commit.split == "segments"):
        raise InvalidRequest(
            "the text gives no row to train on; give more text, a shorter context_length, or a drop policy that "
            "keeps more",
            code="empty_corpus",
        )
    for place in leftovers(store, {commit.path for commit in commits}):
        place.delete()
    warn_of_short_text(run.spec, commits, reporter)
    ran = _ran_on(run, progress)
    sealed = seal_store(run, commits, tally)
    tell_rounding(sealed.manifest.dtype, sealed.manifest.hooks, reporter)
    return _result(sealed, n_tokens=progress.n_new, tokens_per_s=progress.mean_rate(), run=ran)


def find_sealed(store: Location) -> ActivationStore | None:
    """The store, if it is sealed already."""
    try:
        return ActivationStore.open(store)
    except NotFound:
        return None


def prepare(assignment: Assignment, store: Location) -> HarvestRun:
    """Look the sources up again and load the tokenizer.

    Raises InvalidRequest, "source_changed", where model or text are no longer what the job was accepted with.
    """
    spec = HarvestSpec.read(assignment.spec)
    model = describe_model(spec.model, assignment.input_roots)
    fingerprint = text_fingerprint(resolve_text(spec.text, assignment.input_roots))
    if store_id(spec, model.fingerprint(), fingerprint) != assignment.store_id:
        raise InvalidRequest(
            "the model or the text is no longer what the job was accepted with, and what it has committed is of the "
            "former; submit it again for a harvest of what is there now, or put it back and resume",
            code="source_changed",
        )
    return HarvestRun(
        assignment=assignment,
        spec=spec,
        store=store,
        model=model,
        text_fingerprint=fingerprint,
        tokenizer=load_tokenizer(model_folder(spec.model, assignment.input_roots)),
    )


def make_plans(run: HarvestRun, tally: Tally) -> Iterator[SegmentPlan]:
    """Every segment of the store, in an order that depends on the spec and the text alone."""
    documents = read_documents(resolve_text(run.spec.text, run.assignment.input_roots), tally)
    contexts = make_contexts(documents, run.tokenizer, run.spec)
    return plan_segments(
        known_to_the_model(contexts, run.model.n_embeddings),
        held_out_every=run.spec.held_out_every,
        contexts_per_segment=max(1, run.spec.segment_tokens // run.spec.context_length),
    )


def look_ahead(plans: Iterator[SegmentPlan]) -> Ahead:
    """The first plans, made now: all of a short text."""
    ahead: list[SegmentPlan] = []
    n_tokens = 0
    for plan in plans:
        ahead.append(plan)
        n_tokens += plan.n_tokens
        if n_tokens >= LOOKAHEAD_TOKENS:
            return Ahead(plans=chain(ahead, plans), n_tokens=n_tokens, is_all=False)
    return Ahead(plans=iter(ahead), n_tokens=n_tokens, is_all=True)


def check_room(run: HarvestRun, ahead: Ahead, tally: Tally) -> None:
    """Raise StoreUnavailable, "store_full", where a local disk has no room for what is missing of the store.

    Otherwise a full disk would be found after hours of work, and again by every segment.
    """
    if run.store.local_path() is None:
        return
    n_tokens = ahead.n_tokens
    if not ahead.is_all:
        files = resolve_text(run.spec.text, run.assignment.input_roots)
        n_tokens = expected_tokens(run.spec, ahead.n_tokens, tally.n_bytes, sum(map(text_bytes, files)))
    run.store.check_room(needed_bytes(run.spec, run.model.hooks, n_tokens - committed_tokens(run.store)))


def harvest_segments(run: HarvestRun, plans: Iterator[SegmentPlan], progress: HarvestProgress) -> list[SegmentCommit]:
    """Commit every planned segment that is not committed yet; returns the commits of all."""
    commits: list[SegmentCommit] = []
    missing = skip_committed(run.store, plans, commits, progress)
    first = next(missing, None)
    if first is None:
        return commits
    places = run.assignment.places
    n_workers = progress.n_workers = len(places) or count_workers(run.spec, progress.reporter)
    with Gang.start(HarvestWorker, n_workers, progress.reporter, places=places, apart=True) as gang:
        driver = Driver(
            crew=Crew(gang, progress.reporter),
            task=run.task(),
            plans=chain([first], missing),
            on_ready=progress.begin,
            on_tick=progress.tick,
        )
        for commit in driver.commits():
            commits.append(commit)
            progress.segment(commit, is_new=True)
    return commits


def skip_committed(
    store: Location, plans: Iterable[SegmentPlan], commits: list[SegmentCommit], progress: HarvestProgress
) -> Iterator[SegmentPlan]:
    """Plans that still have to be done; the commits of the others are added to the list."""
    for plan in plans:
        commit = load_commit(store, plan.split, plan.index)
        if commit is None:
            yield plan
        else:
            commits.append(commit)
            progress.segment(commit, is_new=False)


def count_workers(spec: HarvestSpec, reporter: Reporter) -> int:
    """Workers to start: as asked, else one for each device or core; never more than there are segments to do."""
    available = Devices.of_cluster().n_members
    if spec.n_workers is not None and spec.n_workers > available:
        message = f"n_workers={spec.n_workers}, and the cluster has room for {available}: taking {available}"
        reporter.report(Logged(level="warning", message=message))
    n_segments = -(-spec.token_budget // spec.segment_tokens) + 1  # one of them held out
    return min(spec.n_workers or available, available, n_segments)


def seal_store(run: HarvestRun, commits: list[SegmentCommit], tally: Tally) -> ActivationStore:
    """Write the manifest, with everything that is known of the rows' origin."""
    spec = run.spec.model_dump(mode="json")
    model = run.model
    return seal(
        run.store,
        commits,
        dtype=run.spec.dtype,
        store_id=run.assignment.store_id,
        spec=spec,
        context_length=run.spec.context_length,
        packing=spec["packing"] | {"begins_with_bos": run.tokenizer.context_bos(run.spec.packing) is not None},
        drop=spec["drop"],
        model={
            "source": model.source,
            "kind": model.kind,
            "revision": model.revision,
            "fingerprint": model.fingerprint(),
            "model_type": model.model_type,
            "kind_of_model": "causal" if model.has_head else "encoder",
            "n_layers": model.n_layers,
            "n_parameters": model.n_parameters,
        },
        tokenizer=run.tokenizer.provenance(),
        text={
            "sources": spec["text"],
            "fingerprint": run.text_fingerprint,
            "n_bad_documents": tally.n_bad,
            "bad_documents": tally.first_bad,
        },
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
    )


def _ran_on(run: HarvestRun, progress: HarvestProgress) -> HarvestedOn | None:
    """What plans of other harvests are learned from; None where no worker was needed."""
    if not progress.n_workers:
        return None
    return HarvestedOn(
        device=Devices.of_cluster().kind, n_workers=progress.n_workers, n_parameters=run.model.n_parameters
    )


def _result(
    store: ActivationStore, *, n_tokens: int, tokens_per_s: float | None, run: HarvestedOn | None = None
) -> Mapping[str, Any]:
    manifest = store.manifest
    result = HarvestResult(
        store_id=manifest.store_id,
        n_rows=manifest.n_rows,
        n_held_out_rows=manifest.n_held_out_rows,
        n_tokens=n_tokens,
        n_bad_documents=manifest.text.get("n_bad_documents", 0),
        bad_documents=tuple(manifest.text.get("bad_documents", ())),
        tokens_per_s=tokens_per_s,
        run=run,
    )
    record = {
        "n_rows": manifest.n_rows,
        "n_held_out_rows": manifest.n_held_out_rows,
        "n_bytes": manifest.n_bytes,
        "hooks": {name: hook.d_in for name, hook in manifest.hooks.items()},
        "location": store.location.url,
    }
    return {**result.model_dump(mode="json"), "record": record}
