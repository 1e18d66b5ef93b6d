"""Pictures, by Pillow: patterns over measured attention, and dense and sparse frames under each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.plan import SparsityPlan
from diffsparse.search.density import call_density

if TYPE_CHECKING:
    from diffsparse.search.measured import PooledAttention

__all__ = [
    "colour_ramp",
    "contact_sheet",
    "frame_sheet",
    "head_cell",
    "heat_of",
    "kept_share",
    "plan_sheet",
    "side_by_side_frames",
]

PAPER = (250, 250, 248)
INK = (28, 32, 38)
FAINT = (120, 126, 134)
RED = (196, 54, 46)
#: The attention scale, dark to bright, as OKLab (lightness, a, b): equal steps look equally far apart.
RAMP = ((0.20, 0.010, -0.055), (0.38, 0.075, -0.115), (0.55, 0.150, -0.045), (0.72, 0.130, 0.085), (0.87, 0.020, 0.165))
DECADES = 3.0  # of attention shown
MAX_BINS = 80
MAX_WIDTH = 5000


# -- colours -----------------------------------------------------------------------------------------------------------


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """OKLab ``[..., 3]`` to sRGB in [0, 1]. B. Ottosson, "A perceptual color space for image processing" (2020)."""
    l, a, b = np.moveaxis(lab, -1, 0)
    lms = np.stack(
        [
            l + 0.3963377774 * a + 0.2158037573 * b,
            l - 0.1055613458 * a - 0.0638541728 * b,
            l - 0.0894841775 * a - 1.2914855480 * b,
        ],
        -1,
    )
    linear = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@lru_cache(maxsize=1)
def _ramp_table() -> np.ndarray:
    anchors = np.array(RAMP)
    at = np.linspace(0, len(anchors) - 1, 256)
    lab = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)], -1)
    return _oklab_to_srgb(lab)


def colour_ramp(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to sRGB in [0, 1]: ``[..., 3]``."""
    return _ramp_table()[(np.nan_to_num(values).clip(0, 1) * 255).round().astype(int)]


def _grey(values: np.ndarray) -> np.ndarray:
    """The muted twin of the ramp, for what is not computed: light, so that the coloured part stands out."""
    level = 0.93 - 0.23 * np.nan_to_num(values).clip(0, 1)
    return np.repeat(level[..., None], 3, -1) * np.array([1.0, 1.0, 1.01]).clip(0, 1)


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis to ``width`` pixels."""
    if draw.textlength(text, font=_font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", font=_font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "…"


# -- patterns ----------------------------------------------------------------------------------------------------------


def _bins(order: TokenOrder, grid: TokenGrid, block_size: int, m: int | None) -> tuple[np.ndarray, int]:
    """The bin of every visual token: runs of blocks of ``order``, at most :data:`MAX_BINS` of them."""
    partition = order.partition(grid, block_size)
    n = partition.num_blocks
    m = m or min(n, MAX_BINS)
    edges = np.linspace(0, n, m + 1).astype(int)  # as the search pools
    bins = np.empty(grid.num_visual, np.int64)
    bins[partition.permutation] = np.repeat(np.searchsorted(edges, np.arange(n), "right") - 1, partition.lengths)
    return bins, m


@lru_cache(maxsize=32)  # few orders occur in a plan of many heads
def _overlap(order: TokenOrder, shown: TokenOrder, visual: TokenGrid, block_size: int, m: int | None) -> np.ndarray:
    """Tokens that each block of ``order`` has in each bin of ``shown``: float ``[blocks, m]``."""
    bins, m = _bins(shown, visual, block_size, m)
    blocks = order.partition(visual, block_size)
    block_of = np.empty(visual.num_visual, np.int64)
    block_of[blocks.permutation] = np.repeat(np.arange(blocks.num_blocks), blocks.lengths)
    overlap = np.zeros((blocks.num_blocks, m))
    np.add.at(overlap, (block_of, bins), 1.0)
    overlap.setflags(write=False)
    return overlap


def kept_share(
    entry: HeadEntry, grid: TokenGrid, block_size: int, order: TokenOrder | None = None, m: int | None = None
) -> np.ndarray:
    """Which share of each bin's query-key pairs an entry computes exactly: float ``[m, m]`` in [0, 1].

    The bins are runs of blocks in ``order`` (the entry's own where None), whatever order the entry itself has.
    """
    visual = grid.visual_only()
    if entry.execution.mode == "skip":
        m = _bins(order or entry.order, visual, block_size, m)[1]
        return np.zeros((m, m))
    overlap = _overlap(entry.order, order or entry.order, visual, block_size, m)
    mask = entry.pattern.block_mask(visual, entry.order, block_size)
    size = overlap.sum(0).clip(1)
    return (overlap.T @ mask @ overlap) / np.outer(size, size)


def heat_of(pooled: np.ndarray) -> np.ndarray:
    """Attention on a log scale, the largest as 1 and :data:`DECADES` decades below as 0."""
    top = max(float(pooled.max()), 1e-12)
    return 1 + np.log10(np.maximum(pooled / top, 10**-DECADES)) / DECADES


def head_cell(share: np.ndarray, pooled: np.ndarray | None, pixels: int) -> Image.Image:
    """One head as a square of ``pixels``: the :func:`kept_share` ``[m, m]`` over the pooled attention, if known."""
    if pooled is None:
        kept, dropped = np.array([0.16, 0.30, 0.52]), np.array([0.90, 0.91, 0.92])
        rgb = dropped + (kept - dropped) * share[..., None]
    else:
        heat = heat_of(pooled)
        rgb = _grey(heat) + (colour_ramp(heat) - _grey(heat)) * share[..., None]
    smaller = share.shape[0] > pixels
    return _image(rgb).resize((pixels, pixels), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def _cell_pixels(m: int, columns: int) -> int:
    wanted = min(max(MAX_WIDTH // max(columns, 1) - 14, 28), 160)
    return max(1, round(wanted / m)) * m if m <= wanted else wanted


def plan_sheet(
    plan: SparsityPlan,
    grid: TokenGrid,
    attention: PooledAttention | None = None,
    *,
    phases: Sequence[int] | None = None,
    phase_names: Sequence[str] | None = None,
) -> Image.Image:
    """Every layer (rows) and head (columns, phase after phase): what is computed exactly, over the measured attention.

    Queries go downwards and keys to the right, both in the order that attention was measured in (else in the entry's).
    Coloured is what is computed, grey what is left out or summed up by a tail.
    """
    from diffsparse.search.show import family, tail_of

    phases = list(range(plan.schedule.num_phases)) if phases is None else list(phases)
    names = list(phase_names or [str(p) for p in range(plan.schedule.num_phases)])
    heads, layers = plan.index.shape[2], len(plan.layers)
    m = None if attention is None else attention.pooled.shape[-1]
    known: dict[tuple[HeadEntry, TokenOrder | None], np.ndarray] = {}

    def share_of(entry: HeadEntry, layer: str, head: int) -> np.ndarray:
        order = attention.orders[layer][head] if attention is not None and layer in attention.orders else None
        if (entry, order) not in known:
            known[entry, order] = kept_share(entry, grid, plan.block_size, order, m)
        return known[entry, order]

    densities = {
        i: call_density(plan.entries[i], grid, plan.block_size, plan.online_repair)
        for i in np.unique(plan.index[phases]).tolist()
    }
    dense = HeadEntry()
    bins = share_of(plan.entries[int(plan.index[phases[0], 0, 0])], plan.layers[0], 0).shape[0]
    pixels = _cell_pixels(bins, heads * len(phases))
    captions = pixels >= 72
    text = 11 if pixels < 120 else 12
    gap = max(3, pixels // 14)
    pad_y = 2 * (text + 3) + gap if captions else gap
    left, top, between = 92, 92, 2 * gap + 10
    block = heads * (pixels + gap) - gap
    width = left + len(phases) * block + (len(phases) - 1) * between + 24
    width = max(width, 560)
    height = top + layers * (pixels + pad_y) + 64
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    name = plan.architecture.model_class if plan.architecture else "any model"
    pen.text((24, 16), _fit(pen, f"Sparsity plan for {name}", width - 48, 20), INK, _font(20))
    steps = plan.schedule.dense_steps()
    line = f"{grid} tokens, blocks of {plan.block_size}, dense {' and '.join(steps) or 'at no step'}"
    pen.text((24, 42), _fit(pen, line, width - 48, 13), FAINT, _font(13))
    for column, phase in enumerate(phases):
        x0 = left + column * (block + between)
        mean = float(np.mean([densities[i] for i in plan.index[phase].reshape(-1).tolist()]))
        title = f"phase {names[phase]}   density {mean:.3f}"
        room = width - x0 - 24 if column == len(phases) - 1 else block + between - 12
        pen.text((x0, 66), _fit(pen, title, room, 14), INK, _font(14))
        for row, layer in enumerate(plan.layers):
            y = top + row * (pixels + pad_y)
            for head in range(heads):
                i = int(plan.index[phase, row, head])
                forced = layer in plan.schedule.dense_layers
                entry = dense if forced else plan.entries[i]
                share = share_of(entry, layer, head)
                x = x0 + head * (pixels + gap)
                pooled = None if attention is None else attention.pooled[phase, row, head]
                sheet.paste(head_cell(share, pooled, pixels), (x, y))
                pen.rectangle((x - 1, y - 1, x + pixels, y + pixels), outline=(200, 203, 208))
                if entry.execution.mode == "skip":
                    pen.line((x, y + pixels - 1, x + pixels - 1, y), RED, 2)
                if captions:
                    tail = tail_of(entry)
                    value = 1.0 if forced else densities[i]
                    first = f"{family(entry)}  {value:.2f}"
                    second = ("" if tail == "none" else f"+ {tail}") + f"  {entry.order}"
                    pen.text((x, y + pixels + 2), _fit(pen, first, pixels + gap - 3, text), INK, _font(text))
                    pen.text((x, y + pixels + 4 + text), _fit(pen, second.strip(), pixels, text), FAINT, _font(text))
    for row, layer in enumerate(plan.layers):
        y = top + row * (pixels + pad_y) + pixels // 2 - 8
        label = "all layers" if layer == "*" else layer.replace("blocks.", "").replace("transformer_", "")
        pen.text((14, y), _fit(pen, label, left - 22, 13), INK, _font(13))
    _legend(sheet, pen, height - 44, attention is not None)
    return sheet


def _legend(sheet: Image.Image, pen: ImageDraw.ImageDraw, y: int, measured: bool) -> None:
    x = 24
    if measured:
        values = np.linspace(0, 1, 96)[None].repeat(7, 0)
        for k, (label, rgb) in enumerate((("computed", colour_ramp(values)), ("left out", _grey(values)))):
            sheet.paste(_image(rgb), (x, y + 2 + 14 * k))
            pen.text((x + 104, y - 2 + 14 * k), label, INK, _font(12))
        note = f"attention from 1/{10**DECADES:.0f} of the head's largest (left) to the largest (right)"
        pen.text((x + 186, y - 2), note, FAINT, _font(12))
        pen.text((x + 186, y + 13), "queries down, keys across, in the order that was measured", FAINT, _font(12))
        return
    for label, colour in (("computed", (41, 77, 133)), ("left out", (230, 232, 235))):
        pen.rectangle((x, y, x + 14, y + 14), colour, (200, 203, 208))
        pen.text((x + 20, y), label, INK, _font(12))
        x += 92
    pen.text((x, y), "queries down, keys across, tokens in each head's order", FAINT, _font(12))


# -- clips -------------------------------------------------------------------------------------------------------------


def _frame(frame: torch.Tensor, height: int) -> Image.Image:
    """Float ``[channels, height, width]`` in [0, 1]; small frames are enlarged by a whole factor."""
    array = frame.nan_to_num(0.0).clamp(0, 1).permute(1, 2, 0).numpy()
    image = _image(array if array.shape[2] == 3 else array[..., :1].repeat(3, 2))
    if image.height * 2 <= height:
        factor = height // image.height
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    if image.height > height:
        return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)
    return image


def _difference(a: torch.Tensor, b: torch.Tensor, gain: float) -> torch.Tensor:
    """|a - b| averaged over the channels, times ``gain``, through the colour ramp: ``[3, height, width]``."""
    heat = ((a - b).abs().mean(0) * gain).clamp(0, 1).numpy()
    return torch.from_numpy(colour_ramp(heat)).permute(2, 0, 1)


def contact_sheet(
    rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]],
    *,
    frames: int = 6,
    height: int = 144,
    gain: float = 8.0,
    title: str = "dense above, sparse below",
) -> Image.Image:
    """One block of three strips for each ``(caption, dense clip, sparse clip)``: dense, sparse, their difference.

    A caption's further lines are printed small. ``gain`` amplifies the difference.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one clip")
    strips = []
    for caption, dense, sparse in rows:
        shown = np.unique(np.linspace(0, dense.shape[0] - 1, min(frames, dense.shape[0])).round().astype(int)).tolist()
        strips.append(
            (
                caption,
                [
                    [_frame(dense[i], height) for i in shown],
                    [_frame(sparse[i], height) for i in shown],
                    [_frame(_difference(dense[i], sparse[i], gain), height) for i in shown],
                ],
            )
        )
    gap, label, top = 4, 92, 60
    caption_height = 6 + 19 * max(len(caption.splitlines()) for caption, _, _ in rows)
    inner = max(sum(f.width + gap for f in block[0]) for _, block in strips)
    width = label + inner + 20
    total = top + sum(caption_height + sum(strip[0].height + gap for strip in block) + 18 for _, block in strips)
    sheet = Image.new("RGB", (width, total), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((20, 14), _fit(pen, title, width - 40, 20), INK, _font(20))
    y = top
    for caption, block in strips:
        lines = caption.splitlines()
        for i, line in enumerate(lines):
            pen.text((label, y + 19 * i), _fit(pen, line, inner, 14 - i), FAINT if i else INK, _font(14 - i))
        y += caption_height
        for name, strip in zip(("dense", "sparse", f"difference\nx {gain:g}"), block, strict=True):
            pen.multiline_text((20, y + strip[0].height // 2 - 9), name, FAINT, _font(13), spacing=2)
            x = label
            for frame in strip:
                sheet.paste(frame, (x, y))
                x += frame.width + gap
            y += strip[0].height + gap
        y += 18
    return sheet


def frame_sheet(
    dense: torch.Tensor, sparse: torch.Tensor, *, caption: str, height: int = 288, gain: float = 8.0
) -> Image.Image:
    """One frame of both clips and their difference, times ``gain``, beside each other; ``[channels, h, w]`` each."""
    panels = [
        ("dense", _frame(dense, height)),
        ("sparse", _frame(sparse, height)),
        (f"difference x {gain:g}", _frame(_difference(dense, sparse, gain), height)),
    ]
    gap, top = 8, 58
    width = sum(panel.width + gap for _, panel in panels) + gap
    sheet = Image.new("RGB", (width, top + panels[0][1].height + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), _fit(pen, caption, width - 2 * gap, 16), INK, _font(16))
    x = gap
    for name, panel in panels:
        pen.text((x, 34), _fit(pen, name, panel.width, 14), FAINT, _font(14))
        sheet.paste(panel, (x, top))
        x += panel.width + gap
    return sheet


def side_by_side_frames(
    dense: torch.Tensor, sparse: torch.Tensor, labels: tuple[str, str] = ("dense", "sparse"), height: int = 320
) -> list[np.ndarray]:
    """Frames of a video with the dense clip on the left and the sparse one on the right, uint8 ``[height, width, 3]``.

    Both sides of a frame are multiples of 16, which video encoders want.
    """
    bar, gap = 32, 8
    result = []
    for left, right in zip(dense, sparse, strict=True):
        a, b = _frame(left, height), _frame(right, height)
        width, tall = a.width + gap + b.width, a.height + bar
        canvas = Image.new("RGB", (-(-width // 16) * 16, -(-tall // 16) * 16), PAPER)
        pen = ImageDraw.Draw(canvas)
        for image, x, text in ((a, 0, labels[0]), (b, a.width + gap, labels[1])):
            pen.text((x + 8, 7), _fit(pen, text, image.width - 12, 16), INK, _font(16))
            canvas.paste(image, (x, bar))
        result.append(np.asarray(canvas))
    return result
