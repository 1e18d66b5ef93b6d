"""What ``diffsparse explain`` prints."""

from __future__ import annotations

import re
from itertools import groupby

from diffsparse.search.columns import GLUE, fold, printable, text_table
from diffsparse.search.explain import Explanation, LayerForecast

__all__ = ["explain_table"]


def _folded_name(names: list[str]) -> str:
    """``blocks.0-7.attn1 (8)`` for layers that differ in one number, else the first and the last."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(p) for p in parts}) == 1:
        differing = [i for i in range(len(parts[0])) if len({p[i] for p in parts}) > 1]
        if len(differing) == 1 and differing[0] % 2:
            i = differing[0]
            numbers = [int(p[i]) for p in parts]
            if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
                head, tail = "".join(parts[0][:i]), "".join(parts[0][i + 1 :])
                return f"{head}{numbers[0]}-{numbers[-1]}{tail} ({len(names)})"
    return f"{names[0]} ... {names[-1]} ({len(names)})"


def _cells(layer: LayerForecast) -> tuple[str, ...]:
    """What is printed of a layer, its name apart: layers that print alike are folded."""
    phases = layer.phases
    why = dict.fromkeys(p.dense_because for p in phases if p.dense_because is not None)
    everywhere = all(p.dense_because is not None for p in phases)
    reasons = [
        reason if everywhere and len(why) == 1 else
        f"phase {','.join(str(i) for i, p in enumerate(phases) if p.dense_because == reason)}: {reason}"
        for reason in why
    ]  # fmt: skip
    slow = [str(i) for i, p in enumerate(phases) if p.dense_because is None and p.time is not None and p.time >= 1]
    if slow:
        reasons.append(f"phase {','.join(slow)}: sparse, but no faster than dense")
    times = [p.time for p in phases]
    carried = [p.carried_heads for p in phases]
    return (
        layer.backend or "dense",
        str(layer.tokens),
        " ".join(f"{p.density:.3f}" for p in phases),
        "-" if None in times else " ".join(f"{t:.2f}" for t in times),
        " ".join(map(str, carried)) if any(carried) else "-",
        "; ".join(reasons) or "-",
    )


def explain_table(found: Explanation, name: str = "") -> str:
    """:class:`Explanation` for readers: layers that agree are one line."""
    a, grid = found.shape.architecture, found.shape.grid
    head = [["plan", name]] if name else []
    head += [
        ["model", "any" if a is None else f"{a.model_class}, {len(a.layers)} layers, {a.heads} heads"],
        ["tokens", f"{grid.seq_len:,} ({grid})"],
        ["machine", f"{found.device}; backend {found.backend}"],
        ["dense steps", " and ".join(found.schedule.dense_steps()) or "none"],
        ["phases", ", ".join(name.replace(" ", GLUE) for name in found.phases)],
        ["density", " ".join(f"{d:.3f}" for d in found.call_density) + " (a sparse step, by phase, tails counted)"],
    ]
    if (time := found.time) is not None:
        head.append(["attention time", " ".join(f"{t:.2f}" for t in time) + " of dense (a sparse step, by phase)"])
        limits = found.break_even
        told = ", ".join(f"{d:.2f} with tail {tail}" for tail, d in limits.items())
        head.append(
            ["break-even", "density " + (f"{told[:4]} with any tail" if len(set(limits.values())) == 1 else told)]
        )
    if found.carried_heads:
        heads = sum(sum(phase.families.values()) for layer in found.layers for phase in layer.phases)
        text = f"the bitmaps of {found.carried_heads} of {heads} heads (of all phases), measured on another grid"
        head.append(["carried over", text])
    rows = []
    for cells, group in groupby(found.layers, key=_cells):
        rows.append([_folded_name([layer.layer for layer in group]), *cells])
    header = ["layer", "backend", "tokens", "density", "time", "carried heads", "dense because"]
    rows = [["all layers" if row[0] == "*" else row[0], *row[1:]] for row in rows]
    parts = [text_table(head), text_table(rows, header=header, right=[2], names=0)]
    if found.notes:
        parts.append("\n".join(fold(f"note: {printable(note)}", indent="  ") for note in found.notes))
    return "\n\n".join(parts)
