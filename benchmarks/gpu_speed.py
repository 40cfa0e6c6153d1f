"""How fast is it? Steps against the bare bfloat16 encoder product, other steps beside them, and block sizes to try."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from gpu_sizes import Sizes, batches, make_step
from torch import Tensor

from gnomon.specs import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from gnomon_workers.kernels.triton_sparse import Blocks, sampled_products, segment_sums
from gnomon_workers.kernels.triton_update import AdamRows, AdamStep, RowBlocks, RowPicks, aligned_gradients, update_rows
from gnomon_workers.sae.sparse import sort_by_feature

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "4090": 165}
"""Dense bfloat16 of the makers' data sheets."""


@dataclass(slots=True, kw_only=True)
class Row:
    """A line of the table."""

    sizes: str
    run: str
    step_ms: float
    """Median."""
    spread_ms: tuple[float, float]
    """Fastest and slowest."""
    product_ms: float
    """The bare bfloat16 product [batch, d] x [d, n], median, timed in turns with the step."""
    ratio: float
    """Step over product."""
    floor: float
    """Product and one pass over weights and moments (24 bytes a parameter), over product: no step with Adam in float32
    is below it."""
    tokens_per_s: float
    memory: float
    """Peak of allocated memory over that of both matrices in float32."""
    mfu: float | None
    """Arithmetic of the encoder and of the sparse products over what the data sheet promises."""
    times_ms: dict[str, float] = field(default_factory=dict)
    """Of one step, by class of work."""
    kernels_ms: dict[str, float] = field(default_factory=dict)
    """Of one step, the kernels that take most, as the profiler sees them."""


class Timer:
    """Milliseconds of work on a device: events of its own clock, or this process's time where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self._is_cuda:
            began = time.perf_counter()
            work()
            return (time.perf_counter() - began) * 1000
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def median(self, work: Callable[[], object], n: int = 7) -> float:
        """Median of n, after two that are not counted; one is enough where times mean nothing."""
        if not self._is_cuda:
            return self(work)
        work(), work()
        return statistics.median(self(work) for _ in range(n))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    n_bytes = 1 << (32 if device.type == "cuda" else 22)
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / Timer(device).median(lambda: target.copy_(source)) * 1000


def product(sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """The bare bfloat16 product, into a buffer."""
    x = torch.randn(sizes.batch, sizes.d, device=device).bfloat16()
    w = torch.randn(sizes.n, sizes.d, device=device).bfloat16()
    out = torch.empty(sizes.batch, sizes.n, dtype=torch.bfloat16, device=device)
    return lambda: torch.mm(x, w.t(), out=out)


@dataclass(frozen=True, slots=True)
class Bench:
    """One machine."""

    device: torch.device
    bandwidth: float
    """Bytes a second of a large copy."""

    def ours(self, sizes: Sizes, run: str, *, n_steps: int) -> Row:
        """One of this project's runs."""
        fields = {
            "topk": {"activation": TopK(k=sizes.k)},
            "batchtopk": {"activation": BatchTopK(k=sizes.k)},
            "unaligned": {"activation": TopK(k=sizes.k), "alignment": "none"},
            "matryoshka": {"activation": Matryoshka(k=sizes.k)},
            "relu": {"activation": ReLU(l1_coefficient=0.01)},
            "jumprelu": {"activation": JumpReLU(l0_coefficient=0.001)},
            "gated": {"activation": Gated(l1_coefficient=0.01)},
        }[run]
        kernels = "auto" if self.device.type == "cuda" else "triton"
        step = make_step(sizes, self.device, kernels=kernels, **fields)
        numbers = iter(range(1000))

        def reset() -> None:
            step.mesh.clock.lap()

        row = self.measure(sizes, run, lambda x: step(next(numbers), x), n_steps=n_steps, before=reset)
        row.times_ms = {name: 1000 * s / n_steps for name, s in step.mesh.clock.lap().items()}
        x = next(batches(sizes, self.device))
        row.kernels_ms = profiled(lambda: step(next(numbers), x)) if self.device.type == "cuda" else {}
        return row

    def measure(
        self,
        sizes: Sizes,
        run: str,
        step: Callable[[Tensor], object],
        *,
        n_steps: int,
        before: Callable[[], object] = lambda: None,
    ) -> Row:
        """Time a step in turns with the bare product."""
        timer, source = Timer(self.device), batches(sizes, self.device)
        for _ in range(3 if self.device.type == "cuda" else 1):
            step(next(source))
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        bare = product(sizes, self.device)
        bare()
        before()
        steps, products = [], []
        for _ in range(n_steps):
            x = next(source)
            products.append(timer(bare))
            steps.append(timer(lambda x=x: step(x)))
        step_ms, product_ms = statistics.median(steps), statistics.median(products)
        pass_ms = 24 * sizes.params / self.bandwidth * 1000
        return Row(
            sizes=str(sizes),
            run=run,
            step_ms=step_ms,
            spread_ms=(min(steps), max(steps)),
            product_ms=product_ms,
            ratio=step_ms / product_ms,
            floor=(product_ms + pass_ms) / product_ms,
            tokens_per_s=sizes.batch / step_ms * 1000,
            memory=memory / (4 * sizes.params),
            mfu=self._mfu(sizes, step_ms),
        )

    def _mfu(self, sizes: Sizes, step_ms: float) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        # the encoder; then its values again, decoding, two gradients of matrices and one of activations, at picks
        flops = 2 * sizes.batch * sizes.d * (sizes.n + 5 * sizes.k)
        return flops / (step_ms / 1000) / (peak * 1e12) if peak else None


@contextmanager
def fresh_memory(device: torch.device) -> Iterator[None]:
    """Forget what was allocated before, and leave nothing behind."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def profiled(step: Callable[[], object], n_shown: int = 30) -> dict[str, float]:
    """Milliseconds of the kernels that take most of one step."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = trace.key_averages()
    totals = {f"{event.key[:90]} x{event.count}": event.self_device_time_total / 1000 for event in events}
    shown = dict(sorted(totals.items(), key=lambda item: -item[1])[:n_shown])
    return {"all kernels": sum(totals.values()), **shown}


def torch_step(sizes: Sizes, device: torch.device, *, compiled: bool) -> Callable[[Tensor], object]:
    """TopK as one would write it: dense products under autocast, torch.topk, autograd, fused Adam, unit decoder."""
    W_enc = (torch.randn(sizes.d, sizes.n, device=device) / sizes.d**0.5).requires_grad_()
    W_dec = W_enc.detach().t().clone().requires_grad_()
    b_enc = torch.zeros(sizes.n, device=device, requires_grad=True)
    b_dec = torch.zeros(sizes.d, device=device, requires_grad=True)
    params = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(params, lr=3e-4, fused=True)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            pre = (x - b_dec) @ W_enc + b_enc
            top = pre.topk(sizes.k, dim=1)
            acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
            reconstruction = acts @ W_dec + b_dec
        return (reconstruction.float() - x).square().sum(1).mean()

    loss_of_x = torch.compile(loss_of) if compiled else loss_of

    def step(x: Tensor) -> None:
        loss_of_x(x * sizes.d**-0.5).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def tune(sizes: Sizes, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of every kernel of the step for the blocks worth trying, the fastest first."""
    step = make_step(sizes, device, activation=TopK(k=sizes.k), kernels="triton")
    x = next(batches(sizes, device))
    picks = step.select(x)
    picks = type(picks)(features=picks.features, values=picks.values.float(), offsets=picks.offsets)
    params, timer = step.parameters, Timer(device)
    tokens = picks.token_indices()
    segments = sort_by_feature(picks.features, tokens)
    order = segments.order
    rows = RowPicks(
        touched=segments.touched, offsets=segments.offsets, tokens=segments.tokens, rows=segments.tokens,
        gradients=picks.values[order], values=picks.values[order],
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    sparse = [(c, p, w) for c, p, w in SPARSE if c < 2 * sizes.d] or SPARSE[:1]
    found["segment_sums"] = _sorted(
        (f"{b}", timer.median(lambda b=b: segment_sums(picks.offsets, picks.features, picks.values, params.W_dec,
                                                       blocks=b), 3))
        for b in (Blocks(columns=c, picks=p, n_warps=w) for c, p, w in sparse)
    )  # fmt: skip
    found["sampled_products"] = _sorted(
        (f"{b}", timer.median(lambda b=b: sampled_products(tokens, picks.features, x, params.W_dec, blocks=b), 3))
        for b in (Blocks(columns=c, picks=p, n_warps=w) for c, p, w in sparse)
    )
    residual = torch.randn_like(x)  # another matrix than the inputs: two of them have to share the cache
    if device.type != "cuda":
        sparse = sparse[:1]
    gradient_blocks = [RowBlocks(columns_per_warp=c, picks=p) for c in (64, 128, 256, 512, 1024) for p in (1, 2, 4)]
    found["aligned_gradients"] = _sorted(
        (f"{b}", timer.median(lambda b=b: aligned_gradients(rows, x, residual, params.W_enc_rows, params.W_dec, "orth",
                                                            blocks=b), 3))
        for b in gradient_blocks
    )  # fmt: skip
    gradients = aligned_gradients(rows, x, residual, params.W_enc_rows, params.W_dec, "orth")
    first, second = step.optimizer.first, step.optimizer.second
    encoder, decoder = (
        AdamRows(weights=step.optimizer.params[name], first=first[name], second=second[name])
        for name in ("W_enc_rows", "W_dec")
    )
    adam = AdamStep(number=1, lr=1e-9, beta1=0.9, beta2=0.999, eps=1e-8)
    copy = torch.empty_like(params.W_enc_rows, dtype=torch.bfloat16)
    found["update_rows"] = _sorted(
        (f"{b}", timer.median(lambda b=b: update_rows(encoder, decoder, gradients, 1.0, adam, "orth", copy,
                                                      blocks=b), 3))
        for b in (RowBlocks(columns_per_warp=c) for c in (64, 128, 256, 512, 1024))
    )  # fmt: skip
    found["selection"] = _sorted(_selections(sizes, device, timer))
    return found


SPARSE = [
    (64, 8, 1), (64, 16, 2), (128, 4, 1), (128, 8, 1), (128, 8, 2), (256, 4, 1), (256, 8, 2), (256, 8, 4),
    (512, 4, 2), (512, 4, 4), (512, 8, 4), (1024, 2, 4), (1024, 4, 4), (1024, 4, 8), (2048, 2, 4), (4096, 2, 8),
]  # fmt: skip
"""(columns, picks, warps)"""


def _selections(sizes: Sizes, device: torch.device, timer: Timer) -> Iterator[tuple[str, float]]:
    from gnomon_workers.kernels.triton_select import group_keys, group_width, select_topk
    from gnomon_workers.sae.selection import GroupedRows, local_topk

    x = next(batches(sizes, device)).bfloat16()
    w = torch.nn.functional.normalize(torch.randn(sizes.n, sizes.d, device=device)).bfloat16()
    bias = torch.zeros(sizes.n, device=device)
    out = torch.addmm(bias.bfloat16(), x, w.t())
    yield "addmm into bfloat16", timer.median(lambda: torch.addmm(bias.bfloat16(), x, w.t(), out=out), 3)
    width = group_width(sizes.n, sizes.k)
    if width is not None:
        yield "group_keys of the written product", timer.median(lambda: group_keys(out, width), 3)
    yield "select_topk of the written product", timer.median(lambda: select_topk(out, sizes.k), 3)
    yield "maxima and topk by PyTorch", timer.median(lambda: local_topk(GroupedRows(out, sizes.k), sizes.k), 3)


def _sorted(pairs: Any) -> dict[str, float]:
    return dict(sorted(pairs, key=lambda pair: pair[1]))


def as_json(row: Row) -> dict[str, Any]:
    """For the report."""
    return asdict(row)
