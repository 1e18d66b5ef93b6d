"""An evaluation's files: figures, contact sheet, side-by-side videos."""

from __future__ import annotations

import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffsparse.saving import write_whole
from diffsparse.search.clip_report import ClipReport
from diffsparse.search.columns import shorten
from diffsparse.search.errors import writing
from diffsparse.search.evaluate import DenseSet, EvalReport
from diffsparse.search.sheet import contact_sheet, side_by_side_frames

__all__ = ["can_write_videos", "write_picture", "write_report", "write_video"]

FPS = 8
MAX_ROWS = 12


def can_write_videos() -> bool:
    """Whether imageio and its ffmpeg are here (the extra ``viz``)."""
    return find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None


def write_video(
    dense: torch.Tensor, sparse: torch.Tensor, file: Path, labels: tuple[str, str] = ("dense", "sparse"), fps: int = FPS
) -> Path:
    """The two clips side by side as an mp4, whole or not at all. Raises :class:`BadInput`."""
    from diffusers.utils import export_to_video

    frames = [frame / 255.0 for frame in side_by_side_frames(dense, sparse, labels)]
    partial = file.with_name(f".{os.getpid()}.{file.name}")
    with writing(file):
        try:
            export_to_video(frames, str(partial), fps=fps, quality=8)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    return file


def write_picture(picture: Any, file: Path, option: str = "--out") -> Path:
    """A picture of pillow's as a PNG, whole or not at all. Raises :class:`BadInput`."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    with writing(file, option):
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(file, content.getvalue())


def _caption(clip: ClipReport) -> str:
    text = f"{shorten(clip.prompt, 110)}\nseed {clip.seed}:  PSNR {clip.psnr:.1f} dB"
    if clip.above_other_seed is not None:
        text += f", {clip.above_other_seed:+.1f} dB over another seed"
    if clip.ssim is not None:
        text += f",  SSIM {clip.ssim:.3f}"
    return text


def write_report(folder: Path, report: EvalReport, dense: DenseSet, *, videos: bool = True) -> list[Path]:
    """``eval.json``, ``contact_sheet.png`` and ``clip_NN.mp4``; returns what was written. Raises :class:`BadInput`.

    Videos need the extra ``viz`` and more than one frame; without, they are left out.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        written = [write_whole(folder / "eval.json", text.encode())]
    pairs = list(zip(report.clips, dense.clips.values(), report.sparse_clips, strict=True))
    rows = [(_caption(clip), a.frames, b.frames) for clip, a, b in pairs[:MAX_ROWS]]
    speed = f", {report.loop_speedup:.2f}x faster" if report.loop_speedup else ""
    sheet = contact_sheet(rows, title=f"Dense and sparse with the same seeds ({report.plan}{speed})")
    written.append(write_picture(sheet, folder / "contact_sheet.png"))
    if not videos or not can_write_videos():
        return written
    for i, (clip, a, b) in enumerate(pairs):
        if a.frames.shape[0] < 2:
            continue
        labels = (f"dense {clip.dense_loop_seconds:.1f} s", f"sparse {clip.sparse_loop_seconds:.1f} s")
        written.append(write_video(a.frames, b.frames, folder / f"clip_{i:02d}.mp4", labels))
    return written
