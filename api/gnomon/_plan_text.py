"""A job's plan as the CLI prints it."""

from __future__ import annotations

from collections.abc import Iterator

from gnomon._screen import show_pairs, show_table
from gnomon.plans import Duration, JobPlan, MeshPlan

_REUSED = {"sealed_store": "are there", "harvest_under_way": "are being harvested", "nothing": "would be harvested"}


def show_plan(plan: JobPlan) -> None:
    """What is reused, what it takes, and a row for each mesh; the one it would run on is marked."""
    show_pairs(_pairs(plan))
    if plan.meshes:
        show_table(
            (
                "",
                "MESH",
                "GIB A RANK",
                "TOKENS/S",
                "HOURS",
                "OFF BY",
                "GPU-HOURS" if plan.device == "gpu" else "CORE-HOURS",
                f"COST {plan.currency or ''}".rstrip(),
            ),
            (_row(plan, each) for each in plan.meshes),
        )


def _pairs(plan: JobPlan) -> Iterator[tuple[str, object]]:
    """What there is to say beside the meshes."""
    by = f", by {plan.job_id}" if plan.job_id else ""
    yield "activations", f"{plan.store_id} {_REUSED.get(plan.reuses, plan.reuses)}{by}"
    yield "rows", None if plan.n_rows is None else f"{plan.n_rows:,}"
    yield "store", size(plan.disk.store_bytes)
    if plan.harvest is not None:
        running = plan.harvest.running
        yield "harvest", f"{plan.harvest.n_tokens:,} tokens, {plan.harvest.n_workers} workers: {_duration(running)}"
    disk = plan.disk
    if disk.checkpoint_bytes is not None:
        kept, peak = size(disk.checkpoints_kept_bytes), size(disk.checkpoints_peak_bytes)
        yield "checkpoints", f"{size(disk.checkpoint_bytes)} each; {kept} kept, {peak} at most, none afterwards"
        yield "dictionary", size(disk.dictionary_bytes)
    chosen = plan.chosen
    if chosen is not None:
        yield "mesh", f"{chosen.mesh.dp} x {chosen.mesh.features} (dp x features): {plan.why}"
        yield "memory", _memory(chosen)
        yield "training", f"{_duration(chosen.training)}; {_learned(chosen.training)}"


def _row(plan: JobPlan, each: MeshPlan) -> tuple[str, ...]:
    told = each.training
    return (
        "*" if each.mesh == plan.mesh else "",
        f"{each.mesh.dp} x {each.mesh.features}",
        f"{each.memory.n_bytes / 2**30:.2f}{' (too much)' if each.fits is False else ''}",
        f"{told.tokens_per_s:,.0f}",
        _hours(told.hours),
        f"{told.error:.0%}",
        _hours(told.device_hours),
        "" if told.cost is None else f"{told.cost:,.2f}",
    )


def _memory(chosen: MeshPlan) -> str:
    """The parts, the largest first."""
    memory = chosen.memory
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    of = f" of variant {memory.variant}" if memory.variant else ""
    listed = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in parts if n_bytes >= memory.n_bytes / 200)
    return f"{size(memory.n_bytes)} a rank in phase {memory.phase!r}{of}: {listed}"


def _duration(told: Duration) -> str:
    return f"{told.tokens_per_s:,.0f} tokens/s, {_time(told.hours)} (off by {told.error:.0%})"


def _learned(told: Duration) -> str:
    return (
        f"learned from {told.n_jobs} finished job{'s' * (told.n_jobs > 1)}"
        if told.n_jobs
        else "by a documented machine, not by this one"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _time(hours: float) -> str:
    """In hours, minutes or seconds, whichever makes a number that people read."""
    for unit, length in (("h", 1.0), ("min", 1 / 60)):
        if hours >= length:
            return f"{hours / length:,.1f} {unit}"
    return f"{hours * 3600:.2g} s"


def size(n_bytes: int | None) -> str | None:
    """Bytes in the unit that leaves the fewest digits before the point."""
    if n_bytes is None:
        return None
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
