"""The README.md that is written beside a plan."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import TYPE_CHECKING

from diffsparse.quality import quality_line

if TYPE_CHECKING:
    from diffsparse.plan import SparsityPlan

__all__ = ["card_names_plan", "is_own_card", "plan_card", "seal_card"]

_TOP = "---\nlibrary_name: diffsparse\ntags: [sparse-attention, diffusers]\n"
_SEAL = re.compile(r"\n<!-- written by diffsparse: plan ([0-9a-f]{16}), text ([0-9a-f]{16}) -->\n\Z")
# Every line that a card had before cards were sealed.
_OLD_LINE = re.compile(
    r"|---|library_name: diffsparse|tags: .*|base_model: .*|# Sparsity plan|For `.*`: \d+ self-attention layers, .*"
    r"|For any model: one rule for all layers and heads\.|Steps at a noise level above .*|```|```python"
    r"|import diffsparse"
    r'|pipe\.enable_sparse_attention\("this folder or repository"\)|\|.*\||## (Quality|Speed|Calibration|Environment)'
)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def seal_card(text: str, plan_json: bytes) -> str:
    """A card with a last line that pages do not show: its plan, and a check that it is unedited."""
    return f"{text}\n<!-- written by diffsparse: plan {_hash(plan_json)}, text {_hash(text.encode())} -->\n"


def _sealed(text: str) -> re.Match[str] | None:
    """The seal of a card that has not been edited."""
    seal = _SEAL.search(text)
    return seal if seal and _hash(text[: seal.start()].encode()) == seal[2] else None


def is_own_card(text: str) -> bool:
    """Whether a ``README.md`` is a card as diffsparse wrote it, so that it may be replaced. An edited one is not."""
    text = text.replace("\r\n", "\n")
    if _SEAL.search(text):
        return _sealed(text) is not None
    old = text.startswith(_TOP) and "\n# Sparsity plan\n" in text
    return old and all(_OLD_LINE.fullmatch(line) for line in text.splitlines())


def card_names_plan(text: str, plan_json: bytes) -> bool:
    """False where a card of ours is of another plan than this ``sparse_plan.json``."""
    seal = _sealed(text.replace("\r\n", "\n"))
    return seal is None or seal[1] == _hash(plan_json)


def plan_card(plan: SparsityPlan) -> str:
    """A model card in Markdown: what the plan is for, what it keeps, what was measured, how to use it."""
    record = plan.record
    base = record.get("model", {}).get("id")
    lines = _TOP.splitlines()
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
        (f"Steps {' and '.join(dense)} run dense." if (dense := s.dense_steps()) else "No step runs dense.")
        + f" {s.num_phases} phase(s)"
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
    if plan.fitted_repair is not None:
        repaired = plan.fitted_repair.num_heads
        lines += ["", f"The outputs of {repaired} of {plan.index.size} heads are repaired."]
    if plan.online_repair is not None:
        rows = plan.online_repair.rows
        lines += ["", f"The outputs of all sparse calls are repaired online, by {rows} exact rows of each."]
    if plan.reuses:
        lines += ["", f"The outputs of {plan.reused_heads} of {plan.index.size} heads serve several steps."]
    if line := quality_line(record):
        lines += ["", f"Searched for quality: {line}."]
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
