"""Published methods that pick blocks while the model runs or by a fixed window, each as a plan for any model.

They are written from the papers' formulas. Each docstring says what is kept of the method and what is not. Blocks,
budgets and parameters are those that the authors use for video. Their dense steps are counted; here they go by noise
level, which is the same where a scheduler's levels fall evenly, and later where it is shifted towards noise: then more
steps are dense. A method's text is dense here as everywhere in this library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffsparse.entry import Execution, HeadEntry
from diffsparse.order import CurveOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Full, Window
from diffsparse.selection import Budget, OnlineSelection

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True)
class Published:
    """One method. ``entry``: what every head runs, from the method's options and the size of blocks. ``block_size`` and
    ``sparse_below``: the method's own. ``line``: what it does, and where it is from."""

    line: str
    entry: Callable[..., HeadEntry]
    block_size: int
    sparse_below: float


def _tiles(block_size: int) -> TokenOrder:
    return TileOrder(1, 8, 8) if block_size == 64 else TileOrder(1, 8, 16)


def _picked(order: TokenOrder, rule: OnlineSelection, tail: str) -> HeadEntry:
    return HeadEntry(order, Full(), rule, Execution(tail=tail))


def xattention(block_size: int, *, tau: float = 0.9, stride: int = 8, tail: str = "none") -> HeadEntry:
    """XAttention (arXiv 2503.16428): antidiagonal sums, and in every row the fewest blocks that hold ``tau`` of them.

    As published for HunyuanVideo: blocks of 128 in the model's order, stride 8, tau 0.9 or 0.95, 5 of 50 steps dense,
    picked in every call. The published code also keeps the first block of keys, which the paper does not ask for: not
    so here.
    """
    rule = OnlineSelection("antidiagonal", Budget("top_p", tau), (("stride", stride),))
    return _picked(RasterOrder(), rule, tail)


def adaspa(
    block_size: int,
    *,
    density: float = 0.2,
    rows: int = 64,
    search_at: tuple[float, ...] = (0.4,),
    tail: str = "none",
) -> HeadEntry:
    """AdaSpa (arXiv 2502.21079): exact attention mass by blocks, the best of each row, searched twice.

    As published: blocks of 64, a fifth of them, of which heads with a good recall give half to others, 10 of 50 steps
    dense, searches at steps 10 and 30, which are the first sparse step here and the noise levels ``search_at``. Its
    search keeps log-sum-exps, which saves time and changes no block.
    """
    rule = OnlineSelection("mass", Budget("recall_heads", density), (("rows", rows),), tuple(search_at))
    return _picked(RasterOrder(), rule, tail)


def sparsed(block_size: int, *, density: float = 0.3, rows: int = 128, tail: str = "none") -> HeadEntry:
    """SparseD (arXiv 2509.24014): exact attention mass by blocks, the best of each row, picked once.

    As published for diffusion language models: blocks of 128, the first 20% of the steps dense, 30% kept.
    """
    rule = OnlineSelection("mass", Budget("density", density), (("rows", rows),), "once")
    return _picked(RasterOrder(), rule, tail)


def minference(block_size: int, *, density: float = 0.25, rows: int = 64, tail: str = "none") -> HeadEntry:
    """MInference (arXiv 2407.02490): vertical lines and slashes, estimated from a few rows, in every call.

    Published for causal language models, with the last 64 queries, single columns and diagonals, and numbers of them
    that were searched for each head. Here rows are spread over the video, lines are as wide as a block, and all heads
    have one ``density``, which is this library's choice, as are the dense steps.
    """
    rule = OnlineSelection("vertical_slash", Budget("density", density), (("rows", rows),))
    return _picked(RasterOrder(), rule, tail)


def draft(block_size: int, *, density: float = 0.25, tail: str = "none") -> HeadEntry:
    """DraftAttention (arXiv 2505.14708): pooled queries and keys on tiles of 8 x 16, a share of each head's pairs.

    As published for Wan2.1: 25% kept, dense above a timestep of 925 of 1000. Its first layer is dense, which
    ``dense_layers`` can say for a model. For HunyuanVideo its code has ``density=0.1`` and no dense step.
    """
    return _picked(_tiles(block_size), OnlineSelection("pooled", Budget("quantile", density)), tail)


def blade(
    block_size: int,
    *,
    mass: float = 0.95,
    least: float = 0.05,
    most: float = 0.17,
    samples: int = 32,
    tail: str = "mean",
) -> HeadEntry:
    """Video-BLADE (arXiv 2508.10774), its mask without its training: sampled weights, their largest in each block.

    As published for Wan2.1: 95% of the mass, 5 to 17% of the blocks, 32 samples of a block of 128, no dense step. Its
    model is distilled with that mask. Its second branch attends means of all keys; here the tail attends means of the
    blocks that are dropped. Tokens are on a Hilbert curve, there on a Gilbert curve; samples are evenly spaced, there
    at random.
    """
    budget = Budget("top_p", mass, least=least, most=most)
    return _picked(CurveOrder(), OnlineSelection("sampled_max", budget, (("samples", samples),)), tail)


def sla(block_size: int, *, density: float = 0.05, tail: str = "none") -> HeadEntry:
    """SLA (arXiv 2509.24006), its critical set without its training: the best 5% of each row by pooled queries and
    keys.

    As published: blocks of 64, no dense step. What it leaves to linear attention needs weights that are trained with
    it, so here it is dropped, or attended by a ``tail``. Without either, expect the picture to suffer.
    """
    return _picked(RasterOrder(), OnlineSelection("pooled", Budget("density", density)), tail)


def vmoba(block_size: int, *, tau: float = 0.25, tail: str = "none") -> HeadEntry:
    """VMoBA (arXiv 2506.23858) without its training: mean keys, the fewest pairs of a head that hold ``tau``.

    As published: the first 25% of the steps dense. There each query picks for itself and its own block is always in;
    blocks are slabs, tiles and boxes from layer to layer, and similarities are scaled to [0, 1] before they are added
    up. Here blocks of queries pick, blocks are tiles, and weights of a softmax are added up, which keeps fewer blocks
    at the same tau.
    """
    return _picked(_tiles(block_size), OnlineSelection("key_means", Budget("top_p_head", tau)), tail)


def sol(block_size: int, *, tau: float = 1.0, tail: str = "mean") -> HeadEntry:
    """Sol-Attn (arXiv 2607.24027): blocks whose mean score stands out by ``tau`` standard deviations, means of the
    rest.

    As published: blocks of 64, tau 1. It also keeps the blocks beside the diagonal and the first ones; here those are
    kept that the rule picks. It names no dense steps: those are this library's choice.
    """
    return _picked(RasterOrder(), OnlineSelection("spread", Budget("score", tau)), tail)


def subblock(block_size: int, *, density: float = 0.25, parts: int = 4, tail: str = "none") -> HeadEntry:
    """SubBlock of SGLang (sgl-project/sglang, pull request 34148): scores from 4 x 4 parts of two blocks.

    As published: 75% of the blocks dropped, the first 10 steps dense, of 50 here.
    """
    rule = OnlineSelection("sub_block", Budget("density", density), (("parts", parts),))
    return _picked(_tiles(block_size), rule, tail)


def gna(
    block_size: int,
    *,
    size: tuple[float, float, float] = (0.6, 0.5, 0.3),
    stride: tuple[int, int, int] = (16, 8, 8),
    tail: str = "none",
) -> HeadEntry:
    """Generalized neighbourhood attention (arXiv 2504.16922): a window in strides that fit the tiles.

    As published for HunyuanVideo at 30 x 48 x 80 latents: a window of 18 x 24 x 24, here as fractions of the grid, 15
    of 50 steps dense. Nothing is picked while the model runs.
    """
    tiles = TileOrder(1, 8, 8) if block_size == 64 else TileOrder(2, 8, 8)
    (t, h, w), (a, b, c) = size, stride  # lists are welcome
    return HeadEntry(tiles, Window((t, h, w), (a, b, c)), execution=Execution(tail=tail))


#: By name, with blocks and the noise level below which it is sparse.
PUBLISHED: dict[str, Published] = {
    "xattention": Published("antidiagonal sums, top-p of each row (arXiv 2503.16428)", xattention, 128, 0.9),
    "adaspa": Published("exact mass by blocks, searched twice (arXiv 2502.21079)", adaspa, 64, 0.8),
    "sparsed": Published("exact mass by blocks, picked once (arXiv 2509.24014)", sparsed, 128, 0.8),
    "minference": Published("vertical lines and slashes from a few rows (arXiv 2407.02490)", minference, 64, 0.9),
    "draft": Published("pooled queries and keys, a share of a head (arXiv 2505.14708)", draft, 128, 0.925),
    "blade": Published("sampled weights, their mask without training (arXiv 2508.10774)", blade, 128, 1.0),
    "sla": Published("the critical 5% without training (arXiv 2509.24006)", sla, 64, 1.0),
    "vmoba": Published("mean keys, top-p of a head, without training (arXiv 2506.23858)", vmoba, 64, 0.75),
    "sol": Published("scores against their spread, means of the rest (arXiv 2607.24027)", sol, 64, 0.9),
    "subblock": Published("parts of blocks, a share of each row (SGLang)", subblock, 64, 0.8),
    "gna": Published("one window in strides, nothing picked (arXiv 2504.16922)", gna, 128, 0.7),
}
