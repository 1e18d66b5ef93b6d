"""What one attention head runs: an order, a pattern, who picks the blocks, and how they are executed."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffsparse.messages import shown
from diffsparse.order import RasterOrder, TokenOrder
from diffsparse.patterns import Full, Pattern
from diffsparse.selection import OnlineSelection
from diffsparse.tails import TAILS, tail_names

__all__ = ["MODES", "NUMERICS", "SELECTIONS", "TAILS", "Execution", "HeadEntry"]

MODES = ("exact", "skip")
NUMERICS = ("auto", "int8", "fp8")
SELECTIONS = ("static",)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")


@dataclass(frozen=True)
class Execution:
    """How a head's blocks are computed.

    ``mode``: ``exact`` computes the kept blocks; ``skip`` leaves the whole head out (its output is zero).
    ``tail``: what dropped blocks contribute: ``none``; ``mean`` attends each once through its mean key and value, with
    ``ln n`` added to the logit; ``moments`` also adds half the variance of the block's logits under a diagonal
    covariance of its keys (the second cumulant); ``centroids`` attends it through two mean keys and values, each with
    its half of ``n``: the block is cut at the median of its keys along their principal axis, because values vary with
    their keys, and one mean value for all of them is the largest error of the other tails; or a tail that
    ``diffsparse.register_tail`` made known.
    ``numerics``: ``auto`` is the precision of q, k and v. ``int8`` multiplies queries and keys in int8, ``fp8`` in
    float8 (e4m3); both multiply probabilities and values in float8. On a device without products in 8 bits such a head
    runs in the precision of q, k and v. The variances of the tail ``moments`` do not exist in 8 bits.
    ``reuse``: the head's output serves until the noise level has fallen by this much, and is then computed anew
    (``diffsparse.reuse``), in [0, 1]; 0 computes it at every step.
    """

    mode: str = "exact"
    tail: str = "none"
    numerics: str = "auto"
    reuse: float = 0.0

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("tail", self.tail, tail_names())
        _choice("numerics", self.numerics, NUMERICS)
        if self.numerics != "auto" and self.tail == "moments":
            raise ValueError(
                f"the tail 'moments' cannot run with numerics {self.numerics!r}: take 'mean' or 'centroids'"
            )
        if isinstance(self.reuse, bool) or not isinstance(self.reuse, (int, float)) or not 0 <= self.reuse <= 1:
            raise ValueError(f"reuse is a difference of noise levels in [0, 1], got {shown(self.reuse)}")
        if self.reuse and self.mode == "skip":
            raise ValueError("a head that is skipped has no output to use again: reuse must be 0")


@dataclass(frozen=True)
class HeadEntry:
    """One head's choice of ``(order, pattern, selection, execution)``.

    ``selection``: who picks the blocks. ``static``: the pattern. An :class:`~diffsparse.selection.OnlineSelection`: a
    rule picks them from q and k at denoising time, among those that the pattern keeps.
    """

    order: TokenOrder = field(default_factory=RasterOrder)
    pattern: Pattern = field(default_factory=Full)
    selection: str | OnlineSelection = "static"
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if not isinstance(self.order, TokenOrder) or not isinstance(self.pattern, Pattern):
            raise ValueError(f"an entry takes an order and a pattern, got {shown((self.order, self.pattern))}")
        if not isinstance(self.selection, OnlineSelection) and self.selection not in SELECTIONS:
            raise ValueError(
                f"selection must be one of {', '.join(SELECTIONS)}, or an OnlineSelection; got {shown(self.selection)}"
            )
        self.pattern.check_order(self.order)

    @property
    def online(self) -> OnlineSelection | None:
        """The rule that picks this head's blocks, where one does and the head is computed at all."""
        found = self.selection if isinstance(self.selection, OnlineSelection) else None
        return None if self.execution.mode == "skip" else found

    @property
    def is_whole(self) -> bool:
        """True where a call that computes this head is plain attention over everything."""
        how = self.execution
        whole = isinstance(self.pattern, Full) and self.selection == "static"
        return whole and how.mode == "exact" and how.numerics == "auto"

    @property
    def is_dense(self) -> bool:
        """True where this entry is plain attention over everything, at every step."""
        return self.is_whole and not self.execution.reuse

    def __str__(self) -> str:
        if self.execution.mode == "skip":
            return "skip"
        tail = "" if self.execution.tail == "none" else f" +{self.execution.tail}"
        order = "" if self.order.is_raster else f" @{self.order}"
        numerics = "" if self.execution.numerics == "auto" else f" in {self.execution.numerics}"
        reuse = f" reused for {self.execution.reuse:.3g}" if self.execution.reuse else ""
        blocks = str(self.pattern)
        if self.online is not None:
            blocks = str(self.online) if isinstance(self.pattern, Full) else f"{self.online} within {self.pattern}"
        return f"{blocks}{order}{tail}{numerics}{reuse}"
