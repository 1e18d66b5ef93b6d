"""The table of supported models, from the families themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families import FAMILIES, UNSUITABLE
from diffsparse.pipelines.families.sizes import USUAL_SIZES
from diffsparse.pipelines.families.tested import COMMON, features_of, lacking
from diffsparse.pipelines.family import Family

__all__ = ["ModelRow", "markdown", "model_rows"]

_ORDERS = {"none": "{v}", "before": "text, {v}", "after": "{v}, text"}


@dataclass(frozen=True)
class ModelRow:
    """What is known of one transformer class.

    size, grid: a usual output size in words, and its token grid (without text).
    layers: paths of the attention modules that run sparse.
    order: how a sequence is put together.
    stays_dense: what of its self-attention a plan does not reach, and when.
    tested, not_tested: features of diffusers that are tested with a plan, and common ones that the class lacks.
    """

    model_class: str
    family: str
    size: str
    grid: TokenGrid
    layers: tuple[str, ...]
    order: str
    stays_dense: str
    tested: tuple[str, ...]
    not_tested: tuple[str, ...]

    @property
    def is_video(self) -> bool:
        return self.grid.frames > 1


def model_rows() -> Iterator[ModelRow]:
    """One row for each known transformer class, videos first, by name."""
    rows = [_row(family, name) for family in FAMILIES for name in family.classes]
    yield from sorted(rows, key=lambda row: (not row.is_video, row.model_class.lower()))


def _row(family: Family, name: str) -> ModelRow:
    size, grid = USUAL_SIZES[name]
    order = _ORDERS[family.text_position].format(v="video" if grid.frames > 1 else "image")
    if family.visual_only:
        order += f" ({', '.join(family.visual_only)}: no text)"
    return ModelRow(
        name, family.name, size, grid, family.layers, order, family.stays_dense, features_of(name), lacking(name)
    )


def _tested(row: ModelRow) -> str:
    """``all but LoRA; IP-adapter``: of the common features, then what else."""
    common = f"all but {', '.join(row.not_tested)}" if row.not_tested else "all"
    besides = ", ".join(feature for feature in row.tested if feature not in COMMON)
    return f"{common}; {besides}" if besides else common


def markdown() -> str:
    """The whole page ``docs/models.md``."""
    parts = [_HEAD.format(common=", ".join(COMMON))]
    for title, video in (("Video", True), ("Images", False)):
        parts.append(f"## {title}\n")
        columns = ("transformer", "self-attention layers", "sequence", "a usual size", "visual tokens", "stays dense")
        parts.append(f"| {' | '.join(columns)} | tested with |\n|{'---|' * (len(columns) + 1)}")
        for row in model_rows():
            if row.is_video == video:
                layers = ", ".join(f"`{path}`" for path in row.layers)
                parts.append(
                    f"| `{row.model_class}` | {layers} | {row.order} | {row.size} | {row.grid.num_visual:,} "
                    f"({row.grid}) | {row.stays_dense or '–'} | {_tested(row)} |"
                )
        parts.append("")
    parts.append("## Models that cannot run sparse\n")
    parts.append("Enabling one of these raises an error with the reason.\n")
    parts.append("| transformer | reason |\n|---|---|")
    parts += [f"| `{name}` | {UNSUITABLE[name]} |" for name in sorted(UNSUITABLE, key=str.lower)]
    return "\n".join(parts) + "\n"


_HEAD = """# Supported models

Made from the code by `diffsparse models --markdown`.

A plan runs in the self-attention layers named here; cross-attention, text encoders and autoencoders stay as they are.
Every class in the first two tables has a small random model in the tests, on grids that are ragged in every axis, which
shows: the layers that are routed; that a plan without sparsity leaves the output bit for bit; that a plan with another
pattern in every head equals torch's attention under the same masks; that two sizes in turn do not disturb each other;
that disabling leaves nothing behind; and that a deep copy is independent. Text is always attended exactly. The sizes
are usual ones of the released models. Real checkpoints of these sizes were not run in these tests.

The last column says which features of diffusers are tested beside a plan, most of them switched on before and after
it. *All* are: {common}.
What is behind *but* diffusers itself refuses for that class, or (Mochi, compiled) runs dense; what comes after the
semicolon is tested with that class besides. *Other caches* are MagCache, TaylorSeer,
PyramidAttentionBroadcast and FasterCache, *quantised weights* torchao and GGUF. bitsandbytes is not tested: diffusers
loads it on a GPU only. Copies, saving and loading again, schedulers with 50 to 4 steps and guidance in one batch or in
two calls are tested too.

A model that is not listed: [describe it](own_model.md#a-model-that-is-not-listed).
"""
