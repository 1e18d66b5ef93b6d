"""What a backend says of itself, and the facts of a call by which it may refuse it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.entry import TAILS
from diffsparse.kernels.call import AttentionCall
from diffsparse.tokens import TokenLayout

__all__ = ["Backend", "CallFacts", "KernelBackend", "unknown_tail"]

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALF)


@dataclass(frozen=True)
class CallFacts:
    """What decides whether a backend can run a call: types and shapes, never values.

    tails: those that heads of the call have, ``none`` left aside; empty where nobody asked.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    tails: Collection[str] = ()

    @classmethod
    def of(cls, q: torch.Tensor, tails: Collection[str] = ()) -> CallFacts:
        """Of a call with these queries ``[batch, seq, heads, head_dim]``."""
        return cls(q.device, q.dtype, q.shape[3], tails)


@runtime_checkable
class Backend(Protocol):
    """A way of computing block-sparse attention. One object a backend; see :class:`KernelBackend` for a start."""

    @property
    def name(self) -> str:
        """What ``backend=`` takes."""
        ...

    @property
    def devices(self) -> Collection[str]:
        """Device types (``cpu``, ``cuda``, ...) on which ``backend="auto"`` tries it; empty: only by name."""
        ...

    @property
    def tails(self) -> Collection[str] | None:
        """The tails that it knows; None: every registered one."""
        ...

    @property
    def head_dims(self) -> range | None:
        """The head_dims that it takes; None: any."""
        ...

    @property
    def numerics(self) -> Mapping[str, Collection[int]]:
        """What it has beside ``auto``, each with the head_dims that it is to be had in."""
        ...

    def cannot_run(self, facts: CallFacts | None) -> str | None:
        """Why it cannot run such a call (None: any call on this machine), in one line; None where it can."""
        ...

    def lists(self, packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
        """The lists of a packed index that serves all items of a batch: :meth:`run` gets them, not the bits."""
        ...

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """The output ``[batch, seq, heads, head_dim]`` in q's dtype and the model's order of tokens, and the
        log-sum-exp fp32 ``[batch, seq, heads]``, which may be empty unless the call asks for it."""
        ...


def unknown_tail(backend: Backend, tails: Collection[str]) -> str | None:
    """What a backend says of the first of these tails that it does not know, or None."""
    known = backend.tails
    unknown = [tail for tail in tails if tail not in known] if known is not None else []
    if known is None or not unknown:
        return None
    having = ", ".join(tail for tail in known if tail != "none")
    return f"the {backend.name} backend does not know the tail {min(unknown)!r}; it has {having or 'none'}"


class KernelBackend:
    """A backend that refuses by what it states: subclasses set the attributes, and override :meth:`missing` and
    :meth:`run`."""

    name: str
    devices: Collection[str] = ()
    dtypes: Collection[torch.dtype] | None = _FLOATS
    tails: Collection[str] | None = TAILS
    head_dims: range | None = None
    numerics: Mapping[str, Collection[int]] = {}

    def missing(self, device: torch.device | None) -> str | None:
        """What this machine, or tensors on ``device`` (None: wherever), lack; None where nothing does."""
        return None

    def cannot_run(self, facts: CallFacts | None) -> str | None:
        """As :meth:`Backend.cannot_run`."""
        if (reason := self.missing(None if facts is None else facts.device)) is not None or facts is None:
            return reason
        if self.dtypes is not None and facts.dtype not in self.dtypes:
            *most, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"the {self.name} backend takes {', '.join(most)}{' or ' if most else ''}{last}, got {facts.dtype}"
        dims = self.head_dims
        if dims is not None and facts.head_dim not in dims:
            return (
                f"the {self.name} backend takes head_dim {dims[0]} to {dims[-1]} in multiples of {dims.step}, "
                f"got {facts.head_dim}"
            )
        return unknown_tail(self, facts.tails)

    def way(self) -> str:
        """Which of its ways it takes on this machine, in a word by which measured times are kept; empty: it has one."""
        return ""

    def about_way(self) -> str:
        """What a bug report should say of that way, in a line."""
        return self.way()

    def lists(self, packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
        """As :meth:`Backend.lists`, by torch's operators. On a GPU it waits for the lists' lengths."""
        return packed.unpacked(tokens)

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Backend.run`."""
        raise NotImplementedError
