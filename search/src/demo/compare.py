"""What the Generate tab shows at the end: speed, distance, and where the two clips differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffsparse.search import metrics
from diffsparse.search.clip_report import ClipReport, clip_report
from diffsparse.search.demo.live import Made
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.report import can_write_videos, write_video
from diffsparse.search.sheet import contact_sheet, frame_sheet

__all__ = ["Comparison", "compare"]

GAIN = 8.0
SHEET_FRAMES = 9


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two clips of one prompt and seed, dense and sparse, both with the same settings.

    ``rows``: name and value of every figure, as text. ``video``: the clips side by side, where one could be written.
    """

    dense: Made
    sparse: Made
    settings: GenerationSettings
    report: ClipReport
    frame_psnr: list[float]
    rows: list[tuple[str, str]]
    video: Path | None

    @property
    def num_frames(self) -> int:
        return len(self.frame_psnr)

    def sheet(self) -> Image.Image:
        """Frames of both clips under each other, with a heat map of their difference."""
        title = f"dense above, sparse below, their difference times {GAIN:g} as a heat map"
        clips = [(self.report.prompt, self.dense.clip.frames, self.sparse.clip.frames)]
        return contact_sheet(clips, frames=SHEET_FRAMES, gain=GAIN, title=title)

    def frame(self, index: int) -> Image.Image:
        """One frame of both clips and the heat map of its difference, large."""
        index = min(max(index, 0), self.num_frames - 1)
        caption = f"frame {index + 1} of {self.num_frames}:  PSNR {self.frame_psnr[index]:.1f} dB"
        return frame_sheet(self.dense.clip.frames[index], self.sparse.clip.frames[index], caption=caption, gain=GAIN)


def _rows(report: ClipReport, frames: list[float], sparse: Made) -> list[tuple[str, str]]:
    speed = report.loop_speedup
    rows = [
        ("speed-up of the denoising loop", "-" if speed is None else f"{speed:.2f}x"),
        ("denoising loop", f"{report.dense_loop_seconds:.1f} s dense, {report.sparse_loop_seconds:.1f} s sparse"),
        ("whole call", f"{report.dense_seconds:.1f} s dense, {report.sparse_seconds:.1f} s sparse"),
        ("PSNR to dense", f"{report.psnr:.2f} dB"),
    ]
    if len(frames) > 1:
        worst = min(range(len(frames)), key=frames.__getitem__)
        rows.append(("worst frame", f"{frames[worst]:.2f} dB, frame {worst + 1} of {len(frames)}"))
    rows.append(("SSIM to dense", "-" if report.ssim is None else f"{report.ssim:.4f}"))
    summary = sparse.summary
    if summary is not None:
        if summary.density is not None:
            rows.append(("attention computed, whole trajectory", f"{summary.density:.3f} of dense"))
        for transformer in summary.transformers.values():
            calls = f"{transformer.sparse_calls} sparse, {transformer.dense_calls} dense"
            rows.append((f"attention calls ({transformer.name})", calls))
            if transformer.dense_reasons:
                why = "; ".join(f"{count} x {reason}" for reason, count in transformer.dense_reasons.items())
                rows.append(("dense because", why))
    for side, defects in (("dense", report.dense_defects), ("sparse", report.sparse_defects)):
        if defects:
            rows.append((f"the {side} clip is broken", ", ".join(defects)))
    return rows


def compare(dense: Made, sparse: Made, folder: Path, settings: GenerationSettings) -> Comparison:
    """The figures of a pair; a video of both is written to ``folder`` where the extra ``viz`` is here."""
    report = clip_report(dense.clip, sparse.clip)
    frames = metrics.frame_psnr(sparse.clip.frames, dense.clip.frames)
    video = None
    if len(frames) > 1 and can_write_videos():
        labels = (f"dense {report.dense_loop_seconds:.1f} s", f"sparse {report.sparse_loop_seconds:.1f} s")
        video = write_video(dense.clip.frames, sparse.clip.frames, folder / "dense_and_sparse.mp4", labels)
    return Comparison(dense, sparse, settings, report, frames, _rows(report, frames, sparse), video)
