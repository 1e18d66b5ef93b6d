"""What differs from layer to layer: the grid of its calls, and with it its layout and what it weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.pipelines import architecture_of, find_transformers
from diffsparse.plan import Architecture
from diffsparse.search.errors import BadInput

__all__ = ["common_architecture", "layouts_by_call", "main_grid", "merged_grid", "switch_level"]


def common_architecture(pipe: Any) -> Architecture:
    """Of all transformers of a pipeline, which one plan is for. Raises :class:`BadInput` where they differ."""
    (first, known), *others = ((name, architecture_of(t)) for name, t in find_transformers(pipe).items())
    for name, architecture in others:
        if differences := known.differences(architecture):
            raise BadInput(
                f"{first} and {name} of {type(pipe).__name__} differ ({'; '.join(differences)}), and a plan is for one "
                "architecture; search with one of them alone"
            )
    return known


def merged_grid(known: TokenGrid | None, call: Any) -> TokenGrid:
    """The grid of a layer's calls so far; of different numbers of text tokens the most.

    Raises :class:`BadInput` where the layer had another visual grid before: what was measured there says nothing here.
    """
    grid: TokenGrid = call.grid
    if known is None:
        return grid
    if known.shape != grid.shape:
        raise BadInput(
            f"{call.layer} attends on grids of {known.visual_only()} and of {grid.visual_only()} tokens; "
            "a search needs one size throughout"
        )
    return grid if grid.seq_len > known.seq_len else known


def main_grid(grids: Mapping[str, TokenGrid]) -> TokenGrid:
    """The largest of the layers' grids, which stands for the model where one is named."""
    return max(grids.values(), key=lambda grid: grid.seq_len)


def layouts_by_call(entries: Mapping[str, Sequence[HeadEntry]], block_size: int) -> Callable[[Any], BlockLayout | None]:
    """A tapped call's layout, on the grid of that call: prompts differ in length. None for a layer without entries."""
    built: dict[tuple[str, TokenGrid, torch.device], BlockLayout] = {}

    def find(call: Any) -> BlockLayout | None:
        if call.layer not in entries:
            return None
        key = (call.layer, call.grid, call.q.device)
        if key not in built:
            built[key] = build_layout(call.grid, list(entries[call.layer]), block_size).to(call.q.device)
        return built[key]

    return find


def switch_level(pipe: Any, levels: Sequence[float], parts: Sequence[Sequence[str]]) -> float | None:
    """The noise level below which another expert takes over (Wan 2.2), or None where there is one throughout.

    ``parts``: the components that ran at each of the ``levels``, which fall. Between the last level of the one and the
    first of the other it is what the pipeline says, else halfway.
    """
    changes = [i for i in range(1, len(parts)) if parts[i] != parts[i - 1]]
    if len(changes) != 1:
        return None
    above, below = levels[changes[0] - 1], levels[changes[0]]
    said = getattr(pipe.config, "boundary_ratio", None)
    return float(said) if isinstance(said, (int, float)) and below < said <= above else (above + below) / 2
