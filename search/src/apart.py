"""What ranks find of prompts at the same time, until it is added up in the order of the prompts.

It is in a file beside the search's record, which is removed when the search has ended: it would take several times the
room that the record does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffsparse.search.repair import ErrorSums
from diffsparse.search.store import SearchStore

__all__ = ["PREFIXES", "Apart"]

#: What names begin with.
PREFIXES = ("apart/", "judged/", "errors/")


class Apart:
    """By typed names, what is in such a file, or in that of a rank. ``elsewhere``: names that rank 0 has already."""

    def __init__(self, store: SearchStore, elsewhere: frozenset[str] = frozenset()) -> None:
        self.store, self.elsewhere = store, elsewhere

    # -- scores of a prompt ----------------------------------------------------------------------------------------

    def has_part(self, prompt: int, part: int, layer: str) -> bool:
        return (name := f"apart/{prompt}/{part}/{layer}") in self.store or name in self.elsewhere

    def put_part(
        self, prompt: int, part: int, layer: str, sums: dict[str, np.ndarray], maps: Sequence[torch.Tensor]
    ) -> None:
        """Sums, and maps in bf16."""
        bits = {f"map{i}": value.view(torch.int16).numpy() for i, value in enumerate(maps)}
        self.store.put_arrays(f"apart/{prompt}/{part}/{layer}", sums | bits)

    def part(self, prompt: int, part: int, layer: str) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
        """What :meth:`put_part` was given."""
        arrays = self.store.get_arrays(f"apart/{prompt}/{part}/{layer}")
        bits = [arrays.pop(f"map{i}") for i in range(sum(name.startswith("map") for name in arrays))]
        return arrays, [torch.from_numpy(each).view(torch.bfloat16) for each in bits]

    def parts(self, prompt: int) -> list[tuple[int, str]]:
        """Parts and layers of a prompt that are there."""
        names = [name.split("/", 3) for name in self.store.names(f"apart/{prompt}/")]
        return [(int(place[2]), place[3]) for place in names]

    def put_trace(self, prompt: int, levels: Sequence[float], parts: Sequence[Sequence[str]]) -> None:
        """All of a prompt is there, but for what masks leave: what ``Workspace.put_trace`` takes."""
        about = {"levels": list(levels), "parts": [sorted(names) for names in parts]}
        self.store.put_json(f"judged/{prompt}/trace", about)

    def is_traced(self, prompt: int) -> bool:
        return f"judged/{prompt}/trace" in self.store

    def trace(self, prompt: int) -> tuple[list[float], list[list[str]]]:
        found = self.store.get_json(f"judged/{prompt}/trace")
        return found["levels"], found["parts"]

    def put_judged(self, prompt: int, step: int, found: dict[str, np.ndarray]) -> None:
        """What masks of the prompts before leave at a step."""
        self.store.put_arrays(f"judged/{prompt}/{step}", found)

    def judged(self, prompt: int, step: int) -> dict[str, np.ndarray]:
        return self.store.get_arrays(f"judged/{prompt}/{step}")

    def left_to_judge(self, prompt: int) -> list[int]:
        """Steps of a traced prompt at which no masks were judged yet."""
        return [step for step in range(len(self.trace(prompt)[0])) if f"judged/{prompt}/{step}" not in self.store]

    def remove_prompt(self, prompt: int) -> None:
        """It is added up."""
        self.store.remove(f"apart/{prompt}/")
        self.store.remove(f"judged/{prompt}/")

    # -- what a plan gets wrong ------------------------------------------------------------------------------------

    def has_errors(self, plan: str, run: int) -> bool:
        """Whether it is there of a generation, for a plan's repair."""
        return f"errors/{plan}/{run}" in self.store

    def put_errors(self, plan: str, run: int, sums: dict[tuple[int, str], ErrorSums]) -> None:
        for (phase, layer), each in sums.items():
            self.store.put_arrays(f"errors/{plan}/{run}/{phase}/{layer}", dict(vars(each)))
        self.store.put_json(f"errors/{plan}/{run}", len(sums))

    def errors(self, plan: str, run: int) -> dict[tuple[int, str], ErrorSums]:
        found: dict[tuple[int, str], ErrorSums] = {}
        for name in self.store.names(f"errors/{plan}/{run}/"):
            _, _, _, phase, layer = name.split("/", 4)
            found[int(phase), layer] = ErrorSums(**self.store.get_arrays(name))
        return found

    def remove_errors(self) -> None:
        self.store.remove("errors/")
