"""Pipelines that change a given picture or clip only in part: they run a share of the steps that they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffsparse.search.errors import BadInput
from diffsparse.search.inputs import Input
from diffsparse.search.signature import SHORTENING, default_of, parameters

if TYPE_CHECKING:
    from diffsparse.search.workspace import Workspace

__all__ = ["check_steps", "find_asked", "shortens", "steps_to_ask"]

#: How many numbers of steps are tried until enough of them run.
TRIED = 4


def shortens(pipe: Any, one: Input) -> float:
    """The share of the steps asked for that should run: by a strength, the pipeline's own where none is given."""
    # Where there is one of denoising, ``strength`` says something else.
    name = next((name for name in reversed(SHORTENING) if name in parameters(pipe)), None)
    value = one.arguments.get(name, default_of(pipe, name)) if name else None
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else 1.0


def steps_to_ask(pipe: Any, one: Input, steps: int) -> int:
    """How many steps to ask for so that this many run, as far as the arguments tell."""
    return max(1, math.ceil(steps / shortens(pipe, one) - 1e-9))


def find_asked(pipe: Any, one: Input, steps: int, levels: Callable[[int], list[float]]) -> int:
    """How many steps to ask for so that at least ``steps`` run, tried with this pipeline.

    ``levels``: the noise levels of all model calls of a generation of so many steps. Raises :class:`BadInput` where no
    number does it.
    """
    first = steps_to_ask(pipe, one, steps)
    for asked in range(first, first + TRIED):
        ran = len(set(levels(asked)))
        if ran >= steps:
            return asked
    raise BadInput(
        f"{type(pipe).__name__} ran {ran} of {asked} steps, too few to search with; give the inputs a larger strength"
    )


def check_steps(work: Workspace) -> None:
    """Raises :class:`BadInput` where a pipeline that leaves out first steps runs too few to search for."""
    if shortens(work.pipe, work.prompts[0]) == 1:
        return
    ran, dense = len(set(work.call_levels())), work.config.dense_steps or 0
    if ran <= dense:
        raise BadInput(
            f"with this strength {type(work.pipe).__name__} runs {ran} of {work.config.steps} steps"
            + (f", and {dense} are to be dense" if dense else "")
            + "; ask for more steps, or give the inputs a larger strength"
        )
