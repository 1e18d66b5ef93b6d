"""One clip of an evaluation beside its dense twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffsparse.search import metrics
from diffsparse.search.generate import Clip

__all__ = ["ClipReport", "clip_report"]


@dataclass(frozen=True)
class ClipReport:
    """One sparse clip beside its dense twin. Times in seconds; the lists of defects are mostly empty.

    ``border_error``, ``last_frame_error``: squared error along the edges over that of the middle, and of the last frame
    over the others; ``frame_errors``: mean squared error of every frame (``metrics``).
    """

    prompt: str
    seed: int
    psnr: float
    worst_frame_psnr: float
    ssim: float | None
    lpips: float | None
    above_other_seed: float | None
    dense_loop_seconds: float
    sparse_loop_seconds: float
    dense_seconds: float
    sparse_seconds: float
    dense_defects: list[str]
    sparse_defects: list[str]
    border_error: float | None = None
    last_frame_error: float | None = None
    frame_errors: list[float] | None = None

    @property
    def loop_speedup(self) -> float | None:
        return self.dense_loop_seconds / self.sparse_loop_seconds if self.sparse_loop_seconds else None


def clip_report(dense: Clip, sparse: Clip, other_seed: float | None = None, model: Any = None) -> ClipReport:
    """A sparse clip beside its dense twin; LPIPS by ``model`` (of ``metrics.load_lpips``) where there is one."""
    value = metrics.psnr(sparse.frames, dense.frames)
    return ClipReport(
        prompt=dense.prompt,
        seed=dense.seed,
        psnr=value,
        worst_frame_psnr=min(metrics.frame_psnr(sparse.frames, dense.frames)),
        ssim=metrics.ssim(sparse.frames, dense.frames),
        lpips=metrics.lpips_distance(model, sparse.frames, dense.frames) if model is not None else None,
        above_other_seed=None if other_seed is None else value - other_seed,
        dense_loop_seconds=dense.loop_seconds,
        sparse_loop_seconds=sparse.loop_seconds,
        dense_seconds=dense.seconds,
        sparse_seconds=sparse.seconds,
        dense_defects=metrics.find_defects(dense.frames),
        sparse_defects=metrics.find_defects(sparse.frames, dense.frames),
        border_error=metrics.border_error(sparse.frames, dense.frames),
        last_frame_error=metrics.last_frame_error(sparse.frames, dense.frames),
        frame_errors=metrics.frame_errors(sparse.frames, dense.frames),
    )
