"""The field's yardstick: the relative error of single attention calls against their time, on captured q, k and v."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.select import pick_blocks
from diffsparse.pipelines import architecture_of, find_transformers, tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.search.columns import text_table
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.inputs import Input
from diffsparse.search.intact import eager
from diffsparse.search.observe import final_latents
from diffsparse.search.steps import StepCounter

__all__ = ["Captured", "calls_table", "calls_text", "calls_title", "capture_calls", "evenly", "judge_calls"]

#: Layers and steps whose calls are captured, as many as there are at most; fewer where they would take more memory.
LAYERS, STEPS = 3, 2
MAX_BYTES = 4 * 2**30
#: Milliseconds that timing one call may take, beside three samples at least.
BUDGET_MS, SAMPLES = 60.0, 3


@dataclass(frozen=True, eq=False)
class Captured:
    """One dense call, of its first item, on the host. q, k, v: ``[1, S, H, D]``. key_mask: bool ``[1, S]`` or None.
    exact: its output, fp32. dense_ms: of torch's attention on the pipeline's device."""

    layer: str
    level: float
    grid: TokenGrid
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None
    key_mask: torch.Tensor | None
    exact: torch.Tensor
    dense_ms: float

    def to_dict(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        return {"layer": self.layer, "level": self.level, "grid": str(self.grid), "dense_ms": self.dense_ms}


def evenly(count: int, places: int) -> list[int]:
    """At most ``places`` of ``count`` places, evenly spread and away from both ends.

    >>> evenly(12, 3), evenly(2, 3)
    ([2, 6, 10], [0, 1])
    """
    places = min(count, places)
    return [int((i + 0.5) * count / places) for i in range(places)]


def capture_calls(
    pipe: Any,
    source: Input,
    seed: int,
    settings: GenerationSettings,
    levels: Sequence[float],
    device: torch.device,
) -> list[Captured]:
    """Calls of a dense generation: of a few layers and steps, of each step's first forward.

    levels: of its steps. Memory is bounded by :data:`MAX_BYTES`, beyond one call.
    """
    transformers = find_transformers(pipe)
    layers = architecture_of(next(iter(transformers.values()))).layers
    steps, chosen = evenly(len(levels), STEPS), [layers[i] for i in evenly(len(layers), LAYERS)]
    counter, held = StepCounter(), 0
    found: dict[tuple[int, str], Captured] = {}

    def look(call: Any) -> None:
        nonlocal held
        step = counter.update(call)
        key = (step, call.layer)
        size = 4 * call.q[:1].nbytes  # q, k, v and the exact output
        if step not in steps or call.layer not in chosen or key in found or (found and held + size > MAX_BYTES):
            return
        held += size
        found[key] = _captured(call, device)

    with eager(pipe), tap_attention(pipe, look):
        final_latents(pipe, source, seed, settings)
    return list(found.values())


def _captured(call: Any, device: torch.device) -> Captured:
    q, k, v = (x[:1].detach() for x in (call.q, call.k, call.v))
    mask = None if call.kv_len is None else call.kv_len[:1]
    exact = _dense(q.float(), k.float(), v.float(), call.scale, mask)
    ms = timing(samples_ms(lambda: _dense(q, k, v, call.scale, mask), device, BUDGET_MS, SAMPLES)).ms
    kept_q, kept_k, kept_v = (x.to("cpu", copy=True).contiguous() for x in (q, k, v))
    return Captured(
        call.layer,
        float(call.noise_level),
        call.grid,
        kept_q,
        kept_k,
        kept_v,
        call.scale,
        None if mask is None else mask.cpu(),
        exact.cpu(),
        ms,
    )


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale).transpose(1, 2)


@torch.no_grad()
def judge_calls(
    plan: SparsityPlan, captured: Sequence[Captured], device: torch.device, backend: str
) -> list[dict[str, Any]]:
    """What a plan makes of each call: the relative L2 error of the visual tokens' output, density and milliseconds.

    A step that the plan leaves dense is judged as one of its first phase: here its blocks count, not its schedule. A
    rule that keeps its blocks for some steps picks anew in each call. Layers that the plan leaves dense have no error.
    """
    return [_judge(plan, call, device, backend) for call in captured]


def _judge(plan: SparsityPlan, call: Captured, device: torch.device, backend: str) -> dict[str, Any]:
    q, k, v = (x.to(device) for x in (call.q, call.k, call.v))
    mask = None if call.key_mask is None else call.key_mask.to(device)
    built = plan.layout(plan.schedule.phase(call.level) or 0, call.layer, q.shape[2], call.grid)
    if built is None:
        return {"error": 0.0, "density": 1.0, "ms": call.dense_ms, "pick_ms": None}
    layout = built.to(device)

    def attend() -> torch.Tensor:
        return sparse_attention(q, k, v, layout, scale=call.scale, kv_len=mask, backend=backend)

    density, picking = layout.density, None
    if layout.heads.picks is not None:
        density = float(pick_blocks(layout, q, k, v, call.scale)[1])
        picking = _ms(lambda: pick_blocks(layout, q, k, v, call.scale), device)
    return {
        "error": _relative_error(attend(), call),
        "density": density,
        "ms": _ms(attend, device),
        "pick_ms": picking,
    }


def _ms(function: Callable[[], Any], device: torch.device) -> float:
    return timing(samples_ms(function, device, BUDGET_MS, SAMPLES)).ms


def _relative_error(out: torch.Tensor, call: Captured) -> float:
    first, count = call.grid.text_before, call.grid.num_visual
    mine, exact = (x.narrow(1, first, count) for x in (out.cpu().float(), call.exact))
    return float((mine - exact).norm() / exact.norm().clamp(min=1e-12))


# -- for readers -------------------------------------------------------------------------------------------------------


def calls_table(calls: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: rows of one density under each other, the smallest error first."""
    header = ["row", "density", "error", "worst", "ms", "pick ms", "of dense"]
    dense = _mean([each["dense_ms"] for each in calls["chosen"]])
    known = [row for row in calls["rows"] if row.get("calls")]
    cells = []
    for row in sorted(known, key=lambda row: (-(row["asked_density"] or 0), _mean([c["error"] for c in row["calls"]]))):
        errors, ms = [c["error"] for c in row["calls"]], _mean([c["ms"] for c in row["calls"]])
        picking = [c["pick_ms"] for c in row["calls"] if c["pick_ms"] is not None]
        cells.append(
            [
                row["row"],
                f"{_mean([c['density'] for c in row['calls']]):.3f}",
                f"{_mean(errors):.4f}",
                f"{max(errors):.4f}",
                f"{ms:.3g}",
                f"{_mean(picking):.3g}" if picking else "-",
                f"{ms / dense:.2f}",
            ]
        )
    return header, cells


def calls_title(calls: dict[str, Any]) -> str:
    """What the figures are of."""
    chosen = calls["chosen"]
    layers, levels = ({each[name] for each in chosen} for name in ("layer", "level"))
    return (
        f"relative error of {len(chosen)} single calls ({len(layers)} layers, {len(levels)} steps), schedules left "
        f"aside; dense takes {_mean([each['dense_ms'] for each in chosen]):.3g} ms"
    )


def calls_text(calls: dict[str, Any]) -> str:
    """The table as text."""
    header, cells = calls_table(calls)
    return f"{calls_title(calls)}\n{text_table(cells, header, right=range(1, 7))}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
