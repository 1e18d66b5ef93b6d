"""The time of one denoising step after another: without attention, dense, and sparse by each setting."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.library.steps.attention import pass_on, self_attention, without_mask
from benchmarks.library.steps.models import Model, build, inputs
from benchmarks.library.steps.plans import plan_of
from benchmarks.library.steps.rows import OK, Row, ratios
from diffsparse.pipelines import architecture_of, sparse_attention, sparse_attention_summary
from diffsparse.preset_plans import preset

__all__ = ["Step", "bench_model", "run_step"]


@dataclass(frozen=True)
class Step:
    """times: milliseconds of each forward. peak_gib: memory at the highest, on a GPU. finite: whether its output is."""

    times: list[float]
    peak_gib: float | None
    finite: bool


@torch.no_grad()
def run_step(forward: Callable[[], Any], device: torch.device, seconds: float, most: int) -> Step:
    """Milliseconds of single forwards, over about ``seconds``, two at least, after one or two to warm up."""
    out = forward()[0]
    finite = bool(out.isfinite().all())
    del out

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    peak = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = once()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    # A forward that takes this long is warm after one.
    times = [first] if first > seconds * 500 else []
    while len(times) < 2 or (len(times) < most and sum(times) < seconds * 1e3):
        times.append(once())
    return Step(times, peak, finite)


def told(row: Row, step: Step) -> Row:
    """The row with the step's figures."""
    status = row.status if row.status != OK or step.finite else "the output is not finite"
    return replace(
        row,
        status=status,
        ms=statistics.median(step.times),
        ms_low=min(step.times),
        ms_high=max(step.times),
        samples=len(step.times),
        peak_gib=step.peak_gib,
    )


def bench_model(
    name: str,
    model: Model,
    *,
    device: torch.device,
    dtype: torch.dtype,
    modes: list[str],
    settings: list[tuple[float, str, str]],
    block_size: int,
    kind: str,
    backend: str,
    seconds: float,
    most: int,
    say: Callable[[Row], None],
    with_fastest: bool = True,
) -> list[Row]:
    """Rows of every mode: ``rest``, dense, then the sparse settings. A step that fails gets a row that says so."""
    transformer: Any = build(model, device, dtype)
    arguments = inputs(model, transformer, device, dtype)
    architecture = architecture_of(transformer)
    base = Row(
        model=name, tokens=model.grid.seq_len, layers=len(architecture.layers), heads=architecture.heads,
        head_dim=architecture.head_dim, dtype=str(dtype).removeprefix("torch."), mode="", what="",
    )  # fmt: skip

    def forward() -> Any:
        return transformer(**arguments)

    def attempt(row: Row, run: Callable[[Row], Row]) -> Row:
        torch._dynamo.reset()
        try:
            return run(row)
        except Exception as failure:  # told in its row, and by the exit status
            lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
            return replace(row, status=f"{type(failure).__name__}: {lines[0].strip()[:300]}")
        finally:
            gc.collect()

    def plain(row: Row) -> Row:
        return told(row, run_step(forward, device, seconds, most))

    def rest(row: Row) -> Row:
        with self_attention(transformer, model.grid.seq_len, pass_on):
            return plain(row)

    def unmasked(row: Row) -> Row:
        with self_attention(transformer, model.grid.seq_len, without_mask):
            return plain(row)

    def sparse(row: Row) -> Row:
        plan = plan_of(transformer, model.grid, row.asked, row.tail, block_size, kind, row.numerics)
        with sparse_attention(transformer, plan, backend=backend):
            step = run_step(forward, device, seconds, most)
            found = sparse_attention_summary(transformer).transformers["transformer"]
        if found.dense_calls or found.sparse_calls != len(architecture.layers) * found.forwards:
            reasons = "; ".join(found.dense_reasons) or "calls are missing"
            row = replace(row, status=f"{found.dense_calls} calls ran dense: {reasons}")
        row = replace(row, density=found.call_density or 0.0, backend="+".join(found.backends), block_size=block_size)
        return told(row, step)

    def fastest(row: Row) -> Row:
        with sparse_attention(transformer, preset("dense"), dense_backend="fastest"):
            step = run_step(forward, device, seconds, most)
            found = sparse_attention_summary(transformer).transformers["transformer"]
        return told(replace(row, backend="+".join(found.dense_kernels)), step)

    rows: list[Row] = []
    for mode in sorted(modes, key=("eager", "compiled").index):  # what has been compiled stays so
        if mode == "compiled":
            transformer.compile_repeated_blocks(fullgraph=True)
        here: list[Row] = []
        wanted = {"rest": rest, "dense": plain}
        if "encoder_attention_mask" in arguments:
            wanted["unmasked"] = unmasked
        if with_fastest:
            wanted["fastest"] = fastest
        for what, run in wanted.items():
            here.append(attempt(replace(base, mode=mode, what=what), run))
            say(ratios(here)[-1])
        for density, tail, numerics in settings:
            row = replace(base, mode=mode, what="sparse", asked=density, tail=tail, numerics=numerics)
            here.append(attempt(row, sparse))
            say(ratios(here)[-1])
        rows += ratios(here)
    return rows
