"""Is Gnomon right on this GPU, and how fast is it? One command, less than eight minutes, from a bare checkout.

    python benchmarks/gpu_check.py                # or: make gpu-check

Needs torch >= 2.10, triton, numpy, pydantic and safetensors, and nothing of this project installed. In this order:

    right      every Triton kernel and a whole step of each variant against float64 on this device, ties included
    training   a short run in a process group of one, saved in the middle and resumed: the bits must be equal
    speed      steps of four sizes over the bare bfloat16 encoder product, and where their time goes
    tuning     the blocks of every kernel, timed
    others     the same steps in plain PyTorch, dense and compiled, and by sparsify where it is installed

Prints a table, writes a JSON file as it goes, and ends with 1 if anything was unequal. Without a GPU it goes through
the same motions at toy size in Triton's interpreter, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MORE_RUNS = ("matryoshka", "relu", "jumprelu", "gated")
"""At one size; the last three in their first steps, in which half of all features are active."""
STAGES = ("right", "training", "speed", "tuning", "others")


class Report:
    """What was found so far, on disk at any moment."""

    def __init__(self, path: Path, minutes: float) -> None:
        self._path = path
        self._began = time.monotonic()
        self._limit_s = 60 * minutes
        self.found: dict[str, Any] = {"checks": [], "table": [], "tuning": {}, "skipped": []}
        self.is_unequal = False

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def has_time(self, what: str, share: float = 1.0) -> bool:
        """Whether less than a share of the time is used up; if not, what is left out is noted."""
        if self.elapsed_s < share * self._limit_s:
            return True
        self.skip(what, "no time was left")
        return False

    def skip(self, what: str, why: str) -> None:
        """Note what was left out."""
        self.found["skipped"].append({"what": what, "why": why})
        print(f"skipped  {what}: {why}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.found["elapsed_s"] = round(self.elapsed_s, 1)
        self._path.write_text(json.dumps(self.found, indent=1))


def main() -> int:
    """Run the stages; 1 if anything was unequal."""
    arguments = _arguments()
    try:
        import numpy  # noqa: F401
        import pydantic  # noqa: F401
        import safetensors  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        print(f"gpu-check needs torch, triton, numpy, pydantic and safetensors: {error}", file=sys.stderr)
        return 2
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    report = Report(arguments.json, arguments.minutes)
    device = torch.device("cuda" if has_gpu else "cpu")
    _describe(report, device)
    work = {"right": _right, "training": _training, "speed": _speed, "tuning": _tuning, "others": _others}
    for stage in arguments.stages.split(","):
        print(f"\n== {stage} ({report.elapsed_s:.0f} s)", flush=True)
        try:
            work[stage](report, device)
        except Exception:
            report.is_unequal = True
            report.found["checks"].append({"name": stage, "status": "failed", "note": traceback.format_exc()})
            traceback.print_exc()
        report.save()
    _summary(report)
    return 1 if report.is_unequal else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="where the report goes")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new is begun")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in which order")
    return parser.parse_args()


def _describe(report: Report, device: Any) -> None:
    import torch

    is_cuda = device.type == "cuda"
    report.found["device"] = torch.cuda.get_device_name(device) if is_cuda else "cpu, Triton's interpreter"
    report.found["torch"] = torch.__version__
    report.found["is_toy"] = not is_cuda
    print(f"{report.found['device']}, torch {torch.__version__}", flush=True)


def _record(report: Report, checks: Any, share: float) -> None:
    for check in checks:
        report.found["checks"].append({name: getattr(check, name) for name in check.__slots__})
        report.is_unequal |= check.status in ("unequal", "failed")
        print(check, flush=True)
        report.save()
        if not report.has_time("the rest of the checks", share):
            return


def _right(report: Report, device: Any) -> None:
    import gpu_oracle

    _record(report, gpu_oracle.checks(device, is_toy=report.found["is_toy"]), 0.4)


def _training(report: Report, device: Any) -> None:
    import gpu_oracle

    _record(report, gpu_oracle.training(device, is_toy=report.found["is_toy"]), 0.6)


def _speed(report: Report, device: Any) -> None:
    import gpu_sizes
    import gpu_speed

    is_toy = report.found["is_toy"]
    bandwidth = gpu_speed.copy_bandwidth(device)
    report.found["copy_bytes_per_s"] = bandwidth
    bench = gpu_speed.Bench(device, bandwidth)
    print(f"copies {bandwidth / 1e12:.2f} TB/s", flush=True)
    table = gpu_sizes.TOY_TABLE if is_toy else gpu_sizes.TABLE
    n_steps = 1 if is_toy else 12
    for sizes in table:
        for run in ("topk", "batchtopk", "unaligned"):
            _row(report, f"{sizes} {run}", 0.8, lambda: bench.ours(sizes, run, n_steps=n_steps))  # noqa: B023
    for run in () if is_toy else MORE_RUNS:
        _row(report, f"{gpu_sizes.COMPILED} {run}", 0.8, lambda: bench.ours(gpu_sizes.COMPILED, run, n_steps=6))  # noqa: B023


def _others(report: Report, device: Any) -> None:
    import gpu_sizes
    import gpu_speed

    is_toy = report.found["is_toy"]
    bench = gpu_speed.Bench(device, report.found.get("copy_bytes_per_s") or gpu_speed.copy_bandwidth(device))
    table = gpu_sizes.TOY_TABLE if is_toy else gpu_sizes.TABLE
    n_steps = 1 if is_toy else 8
    for sizes in table:
        for run in ("torch", "torch-compiled"):
            if run == "torch-compiled" and (is_toy or sizes is not gpu_sizes.COMPILED):
                continue  # a minute of compiling each
            step = lambda: gpu_speed.torch_step(sizes, device, compiled=run == "torch-compiled")  # noqa: B023, E731
            _row(report, f"{sizes} {run}", 1.0, lambda: bench.measure(sizes, run, step(), n_steps=n_steps))  # noqa: B023
    _peers(report, bench, table, n_steps)


def _row(report: Report, name: str, share: float, make: Callable[[], Any]) -> None:
    import gpu_speed
    import torch

    if not report.has_time(name, share):
        return
    try:
        with gpu_speed.fresh_memory(torch.device("cpu" if report.found["is_toy"] else "cuda")):
            row = make()
    except torch.OutOfMemoryError as error:
        report.skip(name, f"out of memory: {error}".partition(". ")[0])
        return
    report.found["table"].append(gpu_speed.as_json(row))
    report.save()
    print(_line(report.found["table"][-1]), flush=True)
    print("   ", {k: round(v, 2) for k, v in row.times_ms.items()}, flush=True)
    for kernel, ms in row.kernels_ms.items():
        print(f"      {ms:8.3f} ms  {kernel}", flush=True)


def _peers(report: Report, bench: Any, table: Any, n_steps: int) -> None:
    import importlib.util

    if importlib.util.find_spec("sparsify") is None:
        report.skip("sparsify", "not installed")
        return
    import peers

    for sizes in table:
        step = lambda: peers.make_sparsify(_peer_sizes(sizes, bench.device))  # noqa: B023, E731
        _row(report, f"{sizes} sparsify", 1.0, lambda: bench.measure(sizes, "sparsify", step(), n_steps=n_steps))  # noqa: B023


def _peer_sizes(sizes: Any, device: Any) -> SimpleNamespace:
    return SimpleNamespace(d=sizes.d, n=sizes.n, k=sizes.k, seed=0, lr=3e-4, device=str(device))


def _tuning(report: Report, device: Any) -> None:
    import gpu_sizes
    import gpu_speed
    import torch

    table = gpu_sizes.TOY_TABLE[:1] if report.found["is_toy"] else gpu_sizes.TABLE
    for sizes in table:
        if not report.has_time(f"tuning {sizes}", 0.93):
            continue
        with gpu_speed.fresh_memory(device):
            found = gpu_speed.tune(sizes, device)
        report.found["tuning"][str(sizes)] = found
        report.save()
        print(sizes)
        for kernel, times in found.items():
            best = "; ".join(f"{ms:.2f} {blocks}" for blocks, ms in list(times.items())[:5])
            print(f"  {kernel}: {best}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    low, high = row["spread_ms"]
    mfu = f"{row['mfu']:.2f}" if row["mfu"] is not None else "-"
    return (
        f"| {row['sizes']} | {row['run']} | {row['step_ms']:.2f} ({low:.2f}-{high:.2f}) | {row['product_ms']:.2f} | "
        f"{row['ratio']:.2f} | {row['floor']:.2f} | {row['tokens_per_s']:,.0f} | {row['memory']:.1f} | {mfu} |"
    )


def _summary(report: Report) -> None:
    print(f"\n== {report.found['device']}, {report.elapsed_s:.0f} s")
    counts: dict[str, int] = {}
    for check in report.found["checks"]:
        counts[check["status"]] = counts.get(check["status"], 0) + 1
        if check["status"] in ("unequal", "failed"):
            print(check["status"], check["name"], check.get("error", ""), check["note"][-300:])
    print("checks:", ", ".join(f"{n} {status}" for status, n in counts.items()) or "none")
    if report.found["table"]:
        print("| sizes | run | step, ms | product, ms | step / product | floor | tokens/s | memory / params | MFU |")
        print("|---" * 9 + "|")
        print("\n".join(_line(row) for row in report.found["table"]))


if __name__ == "__main__":
    sys.exit(main())
