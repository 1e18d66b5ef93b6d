"""The README.md that is written beside a plan."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsparse.plan import SparsityPlan

__all__ = ["plan_card"]


def plan_card(plan: SparsityPlan) -> str:
    """A model card in Markdown: what the plan is for, what it keeps, what was measured, how to use it."""
    record = plan.record
    base = record.get("model", {}).get("id")
    lines = ["---", "library_name: diffsparse", "tags: [sparse-attention, diffusers]"]
    if base:
        lines.append(f"base_model: {base}")
    lines += ["---", "", "# Sparsity plan", ""]
    if plan.architecture:
        a = plan.architecture
        lines += [
            f"For `{a.model_class}`: {len(a.layers)} self-attention layers, {a.heads} heads of {a.head_dim}, "
            f"patch {'x'.join(map(str, a.patch_size))}, text {a.text_position}, fingerprint `{a.fingerprint}`.",
        ]
    else:
        lines += ["For any model: one rule for all layers and heads."]
    s = plan.schedule
    lines += [
        "",
        f"Steps at a noise level above {s.sparse_below:g}"
        + (f", or at {s.dense_below:g} and below," if s.dense_below else "")
        + f" run dense. {s.num_phases} phase(s)"
        + (f", parted at {', '.join(f'{b:g}' for b in s.phase_bounds)}." if s.phase_bounds else ".")
        + (f" Dense layers: {', '.join(s.dense_layers)}." if s.dense_layers else ""),
        "",
        "```python",
        "import diffsparse",
        "",
        'pipe.enable_sparse_attention("this folder or repository")',
        "```",
        "",
        "| heads | entry |",
        "|---:|---|",
    ]
    counts = Counter(
        str(plan.entries[i]).split("(")[0] + tail(plan.entries[i]) for i in plan.index.reshape(-1).tolist()
    )
    lines += [f"| {count} | {name} |" for name, count in counts.most_common()]
    for title in ("quality", "speed", "calibration", "environment"):
        if isinstance(section := record.get(title), dict):
            lines += ["", f"## {title.capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {_value(value)} |" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def tail(entry: object) -> str:
    """The tail's name as a suffix."""
    execution = entry.execution  # type: ignore[attr-defined]
    return "" if execution.tail == "none" or execution.mode == "skip" else f" + {execution.tail} tail"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
