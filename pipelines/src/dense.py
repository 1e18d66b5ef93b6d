"""``dense_backend="fastest"``: the dense kernel that won on a shape, measured once, runs a model's dense calls.

Only calls that are plain self-attention take part. Everything else (causal, dropout, gradients, an unknown mask, other
keys than queries) stays with the model's own attention.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.kernels.dense import OWN_WAY, DenseRace, dense_attention, race_dense

__all__ = ["DENSE_BACKENDS", "DenseChoice", "RaceKey", "serves_heads"]

logger = logging.getLogger("diffsparse")

#: What ``dense_backend`` may be. None is the model's own attention, untouched.
DENSE_BACKENDS = (None, "fastest")


@dataclass(frozen=True)
class RaceKey:
    """What a race is held for: ``[batch, seq, heads, head_dim]``, where, in what, and whether keys are masked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    masked: bool

    def __str__(self) -> str:
        batch, seq, heads, dim = self.shape
        text = f"{batch} x {seq} tokens, {heads} heads of {dim}, {str(self.dtype).removeprefix('torch.')}"
        return f"{text}, masked" if self.masked else text


def serves_heads(kernel: str) -> bool:
    """Whether a kernel runs dense heads apart from sparse ones. Those of this package run both in one go."""
    return not kernel.startswith("diffsparse")


class DenseChoice:
    """The races of one model so far. Copied and pickled with it, since they hold for any model of its shapes."""

    def __init__(self) -> None:
        self.races: dict[RaceKey, DenseRace] = {}
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"races": dict(self.races)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.races = state["races"]
        self.lock = threading.RLock()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        own: Callable[[], torch.Tensor],
    ) -> tuple[str, Callable[[], torch.Tensor]]:
        """The name of the fastest way to compute this call, and what runs it. ``own``: the model's.

        The first call of a shape holds the race, on its own q, k and v. While a CUDA graph is captured nothing can be
        timed: a shape that was not raced before then has the model's own.
        """
        key = RaceKey(tuple(q.shape), q.dtype, q.device, key_mask is not None)
        with self.lock:
            race = self.races.get(key)
            if race is None:
                if q.is_cuda and torch.cuda.is_current_stream_capturing():
                    return OWN_WAY, own
                race = self._keep(key, race_dense(q, k, v, key_mask=key_mask, scale=scale, own=own))
        if race.fastest == OWN_WAY:
            return OWN_WAY, own
        name = race.fastest
        return name, lambda: dense_attention(q, k, v, kernel=name, scale=scale, key_mask=key_mask)

    def for_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        own: Callable[[], torch.Tensor],
    ) -> str | None:
        """The kernel for the dense heads of a call that has sparse ones too, or None where they stay with those.

        By the race for all heads of the call. The model's own way computes all heads or none, so the next one counts.
        """
        self.run(q, k, v, key_mask, scale, own)
        race = self.races.get(RaceKey(tuple(q.shape), q.dtype, q.device, key_mask is not None))
        ranked = sorted((ms, name) for name, ms in race.ms.items() if name != OWN_WAY) if race is not None else []
        return ranked[0][1] if ranked and serves_heads(ranked[0][1]) else None

    def for_compiled(self, key: RaceKey) -> str | None:
        """The kernel for compiled code, raced on random inputs before it runs; None where none can run such a call.

        The model's own attention takes no part: it cannot be called from here.
        """
        with self.lock:
            race = self.races.get(key)
            if race is None:
                draw = torch.Generator(key.device).manual_seed(0)  # the process's own random numbers stay as they are
                q, k, v = (
                    torch.randn(*key.shape, generator=draw, device=key.device, dtype=key.dtype) for _ in range(3)
                )
                mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device) if key.masked else None
                try:
                    race = self._keep(key, race_dense(q, k, v, key_mask=mask))
                except RuntimeError as error:
                    logger.warning("dense_backend='fastest' leaves compiled code its own attention: %s", error)
                    race = self.races[key] = DenseRace(OWN_WAY, {}, {})
        return None if race.fastest == OWN_WAY else race.fastest

    def _keep(self, key: RaceKey, race: DenseRace) -> DenseRace:
        self.races[key] = race
        logger.info("fastest dense attention for %s: %s", key, race)
        return race
