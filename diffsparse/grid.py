"""The shape of one attention call: text tokens around a box of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffsparse.messages import shown

__all__ = ["TokenGrid"]


@dataclass(frozen=True)
class TokenGrid:
    """Text tokens before and after a row-major ``(frames, height, width)`` box of latent tokens.

    All sizes are in tokens as attention sees them, that is after patchifying. An image is a video of one frame.

    >>> TokenGrid(21, 45, 80, text_after=256).seq_len
    75856
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TokenGrid.{name} must be an integer of at least 1, got {shown(value)}")
        for name in ("text_before", "text_after"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"TokenGrid.{name} must be an integer of at least 0, got {shown(value)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(frames, height, width)``."""
        return (self.frames, self.height, self.width)

    @property
    def num_visual(self) -> int:
        """Visual tokens, ``frames * height * width``."""
        return self.frames * self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        """``height * width``."""
        return self.height * self.width

    @property
    def seq_len(self) -> int:
        """All tokens of the call, text included."""
        return self.text_before + self.num_visual + self.text_after

    def visual_only(self) -> TokenGrid:
        """The same box without text."""
        return TokenGrid(self.frames, self.height, self.width)

    def coordinates(self) -> np.ndarray:
        """Latent coordinates of the visual tokens in row-major order, int32 ``[num_visual, 3]`` as ``(f, h, w)``."""
        axes = np.indices(self.shape, dtype=np.int32)
        return axes.reshape(3, -1).T.copy()

    @classmethod
    def parse(cls, text: str) -> TokenGrid:
        """Read ``"T,H,W"`` (``x`` works as a separator too)."""
        parts = text.replace("x", ",").split(",")
        try:
            frames, height, width = (int(p) for p in parts)
        except ValueError:
            raise ValueError(
                f"a grid is three integers T,H,W in latent tokens, for example 5,32,32; got {shown(text)}"
            ) from None
        return cls(frames, height, width)

    def __str__(self) -> str:
        text = "x".join(str(n) for n in self.shape)
        if self.text_before:
            text = f"{self.text_before}+{text}"
        if self.text_after:
            text = f"{text}+{self.text_after}"
        return text
