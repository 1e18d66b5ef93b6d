"""The table of supported models, from the families themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families import FAMILIES, UNSUITABLE
from diffsparse.pipelines.families.sizes import USUAL_SIZES
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
    """

    model_class: str
    family: str
    size: str
    grid: TokenGrid
    layers: tuple[str, ...]
    order: str
    stays_dense: str

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
    return ModelRow(name, family.name, size, grid, family.layers, order, family.stays_dense)


def markdown() -> str:
    """The whole page ``docs/models.md``."""
    parts = [_HEAD]
    for title, video in (("Video", True), ("Images", False)):
        parts.append(f"## {title}\n")
        parts.append("| transformer | self-attention layers | sequence | a usual size | visual tokens | stays dense |")
        parts.append("|---|---|---|---|---|---|")
        for row in model_rows():
            if row.is_video == video:
                layers = ", ".join(f"`{path}`" for path in row.layers)
                parts.append(
                    f"| `{row.model_class}` | {layers} | {row.order} | {row.size} | {row.grid.num_visual:,} "
                    f"({row.grid}) | {row.stays_dense or '–'} |"
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

Beside it, switched on before and after it, these features of diffusers are tested on a Wan pipeline: FirstBlockCache,
MagCache, TaylorSeer, PyramidAttentionBroadcast, FasterCache; model and group offload; layerwise casting to 8 bits;
fused projections; LoRA (loaded, fused, switched off, unloaded); weights quantised by torchao and GGUF; modular
pipelines; other schedulers, 50 to 4 steps; copies, pickles, saving and loading; `torch.compile` of repeated blocks and
of the whole model.

A model that is not listed: see `register_family` in `CONTRIBUTING.md`.
"""
