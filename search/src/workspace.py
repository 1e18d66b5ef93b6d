"""What the stages of a search share: what is asked for and measured, and the pipeline to measure more with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.pipelines import find_transformers
from diffsparse.search.apart import Apart
from diffsparse.search.candidates import orders_for
from diffsparse.search.config import SearchConfig
from diffsparse.search.generate import Clip, GenerationSettings
from diffsparse.search.inputs import Input
from diffsparse.search.layers import common_architecture
from diffsparse.search.observe import Recording, call_levels, record
from diffsparse.search.ranks import Ranks
from diffsparse.search.section import Section
from diffsparse.search.shortened import find_asked, shortens
from diffsparse.search.store import SearchStore
from diffsparse.search.stored_search import Probe, Stage, StoredSearch, Validation

__all__ = ["Probe", "Stage", "Validation", "Workspace"]

#: Host memory for dense clips of validation: two of 81 frames of 720p. More are generated again for every comparison.
MAX_CLIP_BYTES = 2**31


class Masks(Protocol):
    """What masks compute."""

    def levels(self, part: int, layer: str, order: TokenOrder, device: torch.device) -> list[torch.Tensor]:
        """By densities, for each window of parts: uint8 ``[heads of the order, NB, NB]``."""


class Workspace(StoredSearch):
    """The state that stages share; everything costly is in the store, and read and written through the names here.

    ``masks``: what is judged here where that is not masks of the prompts before.
    """

    masks: Masks | None = None

    def __init__(
        self,
        pipe: Any,
        prompts: tuple[Input, ...],
        config: SearchConfig,
        store: SearchStore,
        progress: bool,
        say: Callable[[str], None],
        on_stage: Callable[[str, int, int], None],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(common_architecture(pipe), len(prompts), config, store, progress, say, on_stage)
        self.pipe, self.prompts = pipe, prompts
        # For what all of them share: the device and the data type.
        self.transformer = next(iter(find_transformers(pipe).values()))
        self.recording: Recording | None = None
        self.dense_clips: dict[int, Clip] = {}
        #: The processes that share the search, and where they put what is to be added up; None: this one alone.
        self.ranks = ranks
        self.apart: Apart | None = None
        #: Of other prompts than the first, on the host: what ranks exchange.
        self.recordings: dict[int, Recording] = {}
        #: Whether all ranks have the recording of the first prompt.
        self.recording_given = False

    @property
    def also(self) -> Workspace | None:
        """The same at the second size, where there is one."""
        found = super().also
        assert found is None or isinstance(found, Workspace)
        return found

    def _other_size(self, config: SearchConfig, store: Section) -> StoredSearch:
        prompts = (self.prompts[0], self.prompts[min(1, self.prompts_traced - 1)])
        return Workspace(self.pipe, prompts, config, store, self.progress, self.say, self.on_stage)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(getattr(self.pipe, "_execution_device", next(self.transformer.parameters()).device))

    def layer_orders(self, grid: TokenGrid) -> list[TokenOrder]:
        """The orders that are tried on a grid; the first costs least to gather."""
        return orders_for(grid.visual_only(), self.config.block)

    def dense_clip(self, case: int, generate: Callable[[], Clip]) -> Clip:
        """The dense clip of a validation case, kept for the next comparison as long as there is room for it."""
        if case in self.dense_clips:
            return self.dense_clips[case]
        clip = generate()
        if clip.frames.nbytes + sum(c.frames.nbytes for c in self.dense_clips.values()) <= MAX_CLIP_BYTES:
            self.dense_clips[case] = clip
        return clip

    # -- steps -----------------------------------------------------------------------------------------------------

    def settings(self, steps: int) -> GenerationSettings:
        """Of a generation in which at least so many steps run, all else as it is searched for.

        A pipeline that leaves out first steps is asked for more; how many, is found out once and kept.
        """
        if shortens(self.pipe, self.prompts[0]) == 1:
            return self.config.settings(steps)
        if (name := f"asked/{steps}") not in self.store:
            levels = partial(call_levels, self.pipe, self.prompts[0], self.config.seed)
            asked = find_asked(self.pipe, self.prompts[0], steps, lambda n: levels(self.config.settings(n)))
            self.store.put_json(name, asked)
        return self.config.settings(int(self.store.get_json(name)))

    def call_levels(self) -> list[float]:
        """The noise level of every model call of the generation that the plan is for."""
        name = f"levels/{self.config.steps}"
        if name not in self.store:
            settings = self.config.settings(self.config.steps)
            self.store.put_json(name, call_levels(self.pipe, self.prompts[0], self.config.seed, settings))
        return super().call_levels()

    def dense_recording(self) -> Recording:
        """The recorded generation of the first prompt; run again where an earlier process made it."""
        if self.recording is None:
            settings = self.settings(self.config.trace_steps)
            self.recording = record(self.pipe, self.prompts[0], self.config.seed, settings, None)
        return self.recording
