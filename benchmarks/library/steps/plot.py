"""The picture of all steps: one panel for each model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.library.steps.rows import DENSE_NAMES, OK, Row, extras

__all__ = ["draw"]


def draw(rows: list[Row], machine: dict[str, str], path: Path) -> None:
    """One panel a model: what is not attention and what is, of every step, by the density it ran at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.model for row in rows))
    panel_rows = [
        [r for r in rows if r.model == name and r.ms is not None and r.status == OK and r.what != "rest"]
        for name in names
    ]
    figure, panels = plt.subplots(
        len(names), 1, figsize=(9, 1.2 + 0.28 * sum(len(mine) + 3 for mine in panel_rows)), squeeze=False,
        layout="constrained", height_ratios=[len(mine) + 1 for mine in panel_rows],
    )  # fmt: skip
    for name, mine, panel in zip(names, panel_rows, panels[:, 0]):
        for y, row in enumerate(mine):
            assert row.ms is not None
            attention = (row.attention_share or 0.0) * row.ms / 1e3
            color = "tab:gray" if row.attention_share is not None else "lightgray"
            panel.barh(y, row.ms / 1e3 - attention, color=color)
            color = "tab:orange" if row.what == "sparse" else "tab:blue"
            panel.barh(y, attention, left=row.ms / 1e3 - attention, color=color)
            if row.what != "dense" and row.speedup is not None:
                panel.annotate(f" {row.speedup:.2f}x", (row.ms / 1e3, y), va="center", fontsize="small")
        modes = len({row.mode for row in rows}) > 1
        labels = [DENSE_NAMES.get(r.what, " ".join([f"{r.density:.2f}", *extras(r)])) for r in mine]
        labels = [f"{r.mode}, {label}" if modes else label for r, label in zip(mine, labels)]
        panel.set_yticks(range(len(mine)), labels, fontsize="small")
        panel.invert_yaxis()
        panel.set_title(f"{name}, {mine[0].tokens:,} tokens" if mine else name, fontsize="medium")
    panels[-1, 0].set_xlabel("seconds a step; gray: not attention, light gray: not told apart")
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)
