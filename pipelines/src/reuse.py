"""Attention outputs of earlier steps, kept for the steps that use them again.

One :class:`ReuseStore` a model. What it holds belongs to one generation: it is dropped when the scheduler gets new
timesteps, when the noise level rises, when a forward raises, and head by head as soon as no later step can use it.
Blocks that were picked for several steps (``diffsparse.pipelines.picking``) are dropped by the same signs.

Each guidance branch has outputs of its own. Branches are told apart by the prompt's tensor, which pipelines keep over a
generation, by switches among the arguments, and by how many like calls came before at the same noise level (a scheduler
of second order calls the model twice at most levels).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.entry import HeadEntry
from diffsparse.pipelines.picking import PickStore
from diffsparse.reuse import serves

__all__ = ["EightBits", "Group", "ReuseStep", "ReuseStore", "groups_of"]

# The argument that tells guidance branches apart, by what diffusers' models call it.
_PROMPTS = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats", "text_bth", "class_labels")
# Every window of a long clip is at noise levels of its own there, of which the forward tells one.
_SLIDING = "enable_diffusion_forcing"
# A model may get its timestep in bf16, so that a level and the scheduler's own differ by so much.
_ROUNDING = 5e-3


@dataclass(frozen=True, eq=False)
class Group:
    """Heads of a layer with the same ``reuse``: int64 ``[n]`` on the CPU."""

    reuse: float
    heads: torch.Tensor


def groups_of(entries: Sequence[HeadEntry]) -> tuple[Group, ...]:
    """The heads of a layer whose outputs are used again, by how long they serve."""
    found: dict[float, list[int]] = {}
    for head, entry in enumerate(entries):
        if entry.execution.reuse:
            found.setdefault(entry.execution.reuse, []).append(head)
    return tuple(Group(reuse, torch.tensor(heads)) for reuse, heads in sorted(found.items()))


@dataclass(frozen=True, eq=False)
class EightBits:
    """Outputs of some heads, ``[B, S, n, D]``, in 8 bits with a scale for each token and head."""

    values: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, out: torch.Tensor) -> EightBits:
        # Rounding moves a value by 1/254 of the largest of its row at most, far less than a step changes it.
        scale = out.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
        return cls((out / scale).round_().to(torch.int8), scale)

    def to(self, device: torch.device | str) -> EightBits:
        return EightBits(self.values.to(device), self.scale.to(device))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.values * self.scale).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class _Held:
    level: float
    phase: int
    outputs: EightBits


@dataclass(frozen=True)
class ReuseStep:
    """One forward, as the store sees it.

    ``branch``: of guidance. ``ahead``: the noise level of the next step that may use what this one puts out; -1 where
    none may, None where the scheduler's steps do not tell.
    """

    branch: int
    level: float
    phase: int
    ahead: float | None


_Key = tuple[int, int, int, float]  # branch, layer, which of its calls in the forward, reuse


class ReuseStore:
    """What the layers of one model put out, by guidance branch, layer and heads.

    ``peak``: the most bytes that were held at a time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.picks = PickStore()
        self._held: dict[_Key, _Held] = {}
        self._timesteps: weakref.ref[torch.Tensor] | None = None
        self._levels: list[float] = []
        self._level = -1.0
        self._branches: dict[tuple[Any, ...], int] = {}
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._prompts: dict[int, tuple[weakref.ref[torch.Tensor], tuple[Any, ...]]] = {}
        self._places: dict[tuple[Group, torch.device], torch.Tensor] = {}
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(held.outputs.nbytes for held in self._held.values())

    def clear(self) -> None:
        """Forget all outputs."""
        self._held.clear()
        self.picks.clear()
        self._branches.clear()
        self._seen.clear()
        self._prompts.clear()
        self._level = -1.0

    def begin(
        self,
        scheduler: Any,
        level: float,
        phase_of: Callable[[float], int | None],
        arguments: Mapping[str, Any],
    ) -> ReuseStep | None:
        """A forward at a noise level; None where outputs of other forwards cannot be told from its own.

        ``phase_of``: the plan's phase at a level. ``arguments``: of the forward, by name.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or arguments.get(_SLIDING):
            return None
        if self._timesteps is None or self._timesteps() is not timesteps:
            self.clear()
            self._timesteps = weakref.ref(timesteps)
            steps = int(scheduler.config.get("num_train_timesteps", 1000))
            self._levels = [t / steps for t in timesteps.tolist()]
        if level > self._level + 1e-6 and self._level >= 0:
            self.clear()  # sections of a long clip go through the same levels again
        if level != self._level:
            self._level = level
            self._seen.clear()
            self._drop_dead()
        phase, prompt = phase_of(level), self._prompt(arguments)
        if phase is None:
            self._held.clear()  # a dense step ends what serves
            self.picks.clear()
        if prompt is None or phase is None:
            return None
        key = (prompt, *(f"{n}={v!r}" for n, v in sorted(arguments.items()) if _is_switch(v)))
        self._seen[key] += 1
        branch = self._branches.setdefault((*key, self._seen[key]), len(self._branches))
        ahead = self._next_level(level)
        if ahead is not None and phase_of(ahead) != phase:
            ahead = -1.0
        return ReuseStep(branch, level, phase, ahead)

    def _prompt(self, arguments: Mapping[str, Any]) -> int | None:
        """Which prompt it is: the same tensor object, or the same view of one, is the same prompt."""
        found = next((arguments[n] for n in _PROMPTS if arguments.get(n) is not None), None)
        while isinstance(found, (list, tuple)) and found:
            found = found[0]
        if not isinstance(found, torch.Tensor):
            return None
        base = found if found._base is None else found._base
        view = (found.storage_offset(), found.shape, found.stride())
        for number, (known, how) in self._prompts.items():
            if known() is base and how == view:
                return number
        self._count += 1
        self._prompts[self._count] = (weakref.ref(base), view)
        return self._count

    def _drop_dead(self) -> None:
        """Forget branches whose prompt is gone: where it is a new tensor at every step, nothing is used again."""
        dead = {number for number, (known, _) in self._prompts.items() if known() is None}
        if not dead:
            return
        gone = {branch for key, branch in self._branches.items() if key[0] in dead}
        self._prompts = {n: known for n, known in self._prompts.items() if n not in dead}
        self._held = {key: held for key, held in self._held.items() if key[0] not in gone}
        self.picks.drop(gone)

    def _next_level(self, level: float) -> float | None:
        if not self._levels or min(abs(known - level) for known in self._levels) > _ROUNDING:
            return None
        return max((known for known in self._levels if known < level - _ROUNDING / 10), default=-1.0)

    def recalled(
        self, step: ReuseStep, layer: int, number: int, groups: Sequence[Group], shape: Sequence[int]
    ) -> tuple[Group, ...]:
        """The groups of a layer whose outputs serve a call of this shape, ``[B, S, H, D]``.

        ``number``: which of the layer's calls in this forward it is.
        """
        found = []
        for group in groups:
            held = self._held.get((step.branch, layer, number, group.reuse))
            if held is None or held.phase != step.phase or not serves(held.level, step.level, group.reuse):
                continue
            if tuple(held.outputs.values.shape) == (*shape[:2], len(group.heads), shape[3]):
                found.append(group)
        return tuple(found)

    def shape_of(self, step: ReuseStep, layer: int, number: int, groups: Sequence[Group]) -> tuple[int, ...] | None:
        """The shape ``(B, S, D)`` of what serves a layer's call, where all of its groups are served alike; or None."""
        shapes = set()
        for group in groups:
            held = self._held.get((step.branch, layer, number, group.reuse))
            if held is None or held.phase != step.phase or not serves(held.level, step.level, group.reuse):
                return None
            shapes.add((*held.outputs.values.shape[:2], held.outputs.values.shape[3]))
        return shapes.pop() if len(shapes) == 1 else None

    def exchange(
        self,
        out: torch.Tensor,
        step: ReuseStep,
        layer: int,
        number: int,
        groups: Sequence[Group],
        recalled: Sequence[Group],
    ) -> None:
        """Put the outputs that are recalled into ``out``, ``[B, S, H, D]``, and keep those that a later step needs."""
        for group in groups:
            key = (step.branch, layer, number, group.reuse)
            heads = self._heads_on(out.device, group)
            if group in recalled:
                out.index_copy_(2, heads, self._held[key].outputs.read(out.dtype))
                continue
            self._held.pop(key, None)  # before the next ones take their room
            if step.ahead is None or serves(step.level, step.ahead, group.reuse):
                self._held[key] = _Held(step.level, step.phase, EightBits.of(out.index_select(2, heads)))
        self.peak = max(self.peak, self.nbytes)

    def _heads_on(self, device: torch.device, group: Group) -> torch.Tensor:
        """A group's heads on a device, copied there once."""
        key = (group, device)
        if key not in self._places:
            self._places[key] = group.heads.to(device)
        return self._places[key]

    def end(self, step: ReuseStep, complete: bool) -> None:
        """Drop what no later step can use; all of it where the forward raised."""
        if not complete:
            self.clear()
        elif step.ahead is not None:
            ahead = step.ahead
            if ahead == -1.0:
                self.picks.drop({step.branch})
            self._held = {
                key: held
                for key, held in self._held.items()
                if key[0] != step.branch or serves(held.level, ahead, key[3])
            }


def _is_switch(value: Any) -> bool:
    """Whether an argument tells what a forward is for: what guidance leaves out, for instance."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, (bool, int, str)) for v in value)
    return isinstance(value, (bool, int, str))
