"""How far two ways to compute the same numbers may lie apart: what rounding explains, and no more.

Two sums of the same ``length`` products, taken in another order or with other instructions, differ by about
``eps * sqrt(length)`` of the largest value, where ``eps`` is that of the data type: a rounding is at most half of that,
and roundings add up as a random walk does. So do those of ``sums`` that follow on each other. What is asked for depends
on what is computed, then, and on no machine's instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ATTENTION", "GENERATION", "MODEL", "Work", "assert_near", "near"]


@dataclass(frozen=True)
class Work:
    """``sums`` that follow on each other, each of ``length`` products; differences end up ``gain`` times as large.

    dtype: in which it is computed; that of the values where None, and float32 where they were made doubles to compare
    them.
    """

    length: int
    sums: int = 1
    gain: float = 1.0
    dtype: torch.dtype | None = None

    def tolerance(self, found: torch.Tensor, want: torch.Tensor) -> float:
        """The largest difference of two elements that rounding explains; none of whole numbers."""
        if not want.is_floating_point():
            return 0.0
        eps = max(torch.finfo(d).eps for d in (torch.float32, self.dtype or found.dtype, self.dtype or want.dtype))
        finite = want[want.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        return eps * (self.length * self.sums) ** 0.5 * self.gain * largest


#: One call: a logit is a sum over a head's channels, an output one over the keys.
ATTENTION = Work(length=512, sums=2)
#: The tiny transformers of the tests: two or three layers of about eight sums each, the longest over all tokens.
MODEL = Work(length=256, sums=24)
#: A generation with them: guidance of 5 takes five times one call's output less four times that of another.
GENERATION = Work(length=256, sums=24, gain=9.0)


def assert_near(found: torch.Tensor, want: torch.Tensor, work: Work) -> None:
    """The two agree but for rounding. Infinities have to agree, and NaN agrees with nothing."""
    torch.testing.assert_close(found, want, rtol=0, atol=work.tolerance(found, want))


def near(found: torch.Tensor, want: torch.Tensor, work: Work) -> bool:
    """Whether they do."""
    return bool(torch.allclose(found, want, rtol=0, atol=work.tolerance(found, want)))
