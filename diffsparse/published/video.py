"""Published methods made for video and images, each as a function from its options to what every head runs."""

from __future__ import annotations

from diffsparse.entry import Execution, HeadEntry
from diffsparse.order import CurveOrder, RasterOrder, TileOrder
from diffsparse.patterns import Window
from diffsparse.published.base import Published, picked, tiles
from diffsparse.selection import Budget, OnlineSelection

__all__ = ["VIDEO"]


def xattention(block_size: int, *, tau: float = 0.9, stride: int = 8, tail: str = "none") -> HeadEntry:
    """XAttention (arXiv 2503.16428): antidiagonal sums, and in every row the fewest blocks that hold ``tau`` of them.

    As published for HunyuanVideo: blocks of 128 in the model's order, stride 8, tau 0.9 or 0.95, 5 of 50 steps dense,
    picked in every call. The published code also keeps the first block of keys, which the paper does not ask for: not
    so here.
    """
    rule = OnlineSelection("antidiagonal", Budget("top_p", tau), (("stride", stride),))
    return picked(RasterOrder(), rule, tail)


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
    return picked(RasterOrder(), rule, tail)


def draft(block_size: int, *, density: float = 0.25, tail: str = "none") -> HeadEntry:
    """DraftAttention (arXiv 2505.14708): pooled queries and keys on tiles of 8 x 16, a share of each head's pairs.

    As published for Wan2.1: 25% kept, dense above a timestep of 925 of 1000. Its first layer is dense, which
    ``dense_layers`` can say for a model. For HunyuanVideo its code has ``density=0.1`` and no dense step.
    """
    return picked(tiles(block_size), OnlineSelection("pooled", Budget("quantile", density)), tail)


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
    return picked(CurveOrder(), OnlineSelection("sampled_max", budget, (("samples", samples),)), tail)


def sla(block_size: int, *, density: float = 0.05, tail: str = "none") -> HeadEntry:
    """SLA (arXiv 2509.24006), its critical set without its training: the best 5% of each row by pooled queries and
    keys.

    As published: blocks of 64, no dense step. What it leaves to linear attention needs weights that are trained with
    it, so here it is dropped, or attended by a ``tail``. Without either, expect the picture to suffer.
    """
    return picked(RasterOrder(), OnlineSelection("pooled", Budget("density", density)), tail)


def vmoba(block_size: int, *, tau: float = 0.25, tail: str = "none") -> HeadEntry:
    """VMoBA (arXiv 2506.23858) without its training: mean keys, the fewest pairs of a head that hold ``tau``.

    As published: the first 25% of the steps dense. There each query picks for itself; blocks are slabs,
    tiles and boxes from layer to layer, and similarities are scaled to [0, 1] before they are added up. Here blocks of
    queries pick, blocks are tiles, and weights of a softmax are added up, which keeps fewer blocks at the same tau.
    """
    return picked(tiles(block_size), OnlineSelection("key_means", Budget("top_p_head", tau), (("beside", 1),)), tail)


def sol(block_size: int, *, tau: float = 1.0, tail: str = "mean") -> HeadEntry:
    """Sol-Attn (arXiv 2607.24027): blocks whose mean score stands out by ``tau`` standard deviations, means of the
    rest.

    As published: blocks of 64, tau 1, and the first block and those beside the diagonal always kept. It names no dense
    steps: those are this library's choice.
    """
    rule = OnlineSelection("spread", Budget("score", tau), (("beside", 2), ("first", 1)))
    return picked(RasterOrder(), rule, tail)


def subblock(block_size: int, *, density: float = 0.25, parts: int = 4, tail: str = "none") -> HeadEntry:
    """SubBlock of SGLang (sgl-project/sglang, pull request 34148): scores from 4 x 4 parts of two blocks.

    As published: 75% of the blocks dropped, the first 10 steps dense, of 50 here.
    """
    rule = OnlineSelection("sub_block", Budget("density", density), (("parts", parts),))
    return picked(tiles(block_size), rule, tail)


def sparge(block_size: int, *, tau: float = 0.98, similarity: float = 0.6, tail: str = "none") -> HeadEntry:
    """SpargeAttn (arXiv 2502.18137): means on a Hilbert curve, top-p of each row, and all that is not alike in itself.

    As published: tau 0.98 and a similarity of 0.6, the defaults of its code, no dense step. There both are tuned for
    each head, blocks are 128 queries by 64 keys and run in 8 bits, and what still turns out small is skipped inside the
    kernel.
    """
    rule = OnlineSelection("self_similar", Budget("top_p", tau), (("similarity", similarity),))
    return picked(CurveOrder(), rule, tail)


def svg(block_size: int, *, density: float = 0.25, rows: int = 64, tail: str = "none") -> HeadEntry:
    """Sparse VideoGen (arXiv 2502.01776): each head sees near frames, or near places of all frames, call by call.

    As in its code: 64 rows tell which mask errs less, each mask keeps a quarter. Its scripts for Wan 2.1 have the first
    30% of the steps dense; here noise levels above 0.75 are. There tokens of heads that look through time get another
    order; here one order of boxes of four frames serves both masks, which keep what is nearest.
    """
    boxes = TileOrder(4, 4, 4) if block_size == 64 else TileOrder(4, 4, 8)
    rule = OnlineSelection("spatial_temporal", Budget("density", density), (("rows", rows), ("share", density)))
    return picked(boxes, rule, tail)


def lite(block_size: int, *, threshold: float = -10.0, samples: int = 32, tail: str = "none") -> HeadEntry:
    """LiteAttention (arXiv 2511.11062): what could be skipped at one step is skipped at all later ones.

    As published: a tile is skipped where its largest logit falls 10 behind the running maximum, the threshold of its
    code, no dense step. There the kernel sees that from all queries and keys as it computes them, which costs nothing;
    here ``samples`` of each block are asked in every call, against the largest of all keys. It can calibrate a
    threshold for each layer; here there is one.
    """
    budget, parameters = Budget("score", threshold), (("relative", 1), ("samples", samples))
    return picked(RasterOrder(), OnlineSelection("sampled_max", budget, parameters, "shrink"), tail)


def sparsepr(block_size: int, *, density: float = 0.22, parts: int = 16, tail: str = "mean") -> HeadEntry:
    """SparsePR (arXiv 2608.18484): blocks by the error of their means, and a repair from 64 exact rows of each call.

    As published: 22% kept, means of the rest, 64 exact rows, 10% of the steps dense. There tokens are put side by side
    by k-means of queries and of keys, and clusters are kept; here blocks are tiles. Its map has rank 16 and
    standardised outputs; here it is whole.
    """
    rule = OnlineSelection("tail_error", Budget("density", density), (("parts", parts),))
    return picked(tiles(block_size), rule, tail)


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


def sta(
    block_size: int,
    *,
    size: tuple[float, float, float] = (0.6, 0.5, 0.3),
    tile: tuple[int, int, int] = (6, 8, 8),
    tail: str = "none",
) -> HeadEntry:
    """Sliding tile attention (arXiv 2502.04507): all queries of a tile see the same tiles around it.

    As published for HunyuanVideo at 30 x 48 x 80 latents: tiles of 6 x 8 x 8, a window of 18 x 24 x 24, here as
    fractions of the grid, 15 of 50 steps dense. Its blocks are tiles; here parts of them. Windows that it searches for
    each head are not here: a searched plan of this library has such.
    """
    return gna(block_size, size=size, stride=tile, tail=tail)


VIDEO: dict[str, Published] = {
    "xattention": Published("antidiagonal sums, top-p of each row (arXiv 2503.16428)", xattention, 128, 0.9),
    "adaspa": Published("exact mass by blocks, searched twice (arXiv 2502.21079)", adaspa, 64, 0.8),
    "draft": Published("pooled queries and keys, a share of a head (arXiv 2505.14708)", draft, 128, 0.925),
    "blade": Published("sampled weights, their mask without training (arXiv 2508.10774)", blade, 128, 1.0),
    "sla": Published("the critical 5% without training (arXiv 2509.24006)", sla, 64, 1.0),
    "vmoba": Published("mean keys, top-p of a head, without training (arXiv 2506.23858)", vmoba, 64, 0.75),
    "sol": Published("scores against their spread, means of the rest (arXiv 2607.24027)", sol, 64, 0.9),
    "subblock": Published("parts of blocks, a share of each row (SGLang)", subblock, 64, 0.8),
    "sparge": Published("means on a Hilbert curve where blocks are alike (arXiv 2502.18137)", sparge, 64, 1.0),
    "svg": Published("near frames or near places, head by head (arXiv 2502.01776)", svg, 64, 0.75),
    "lite": Published("what could be skipped once is skipped later (arXiv 2511.11062)", lite, 128, 1.0),
    "sparsepr": Published("errors of means, and a repair in every call (arXiv 2608.18484)", sparsepr, 64, 0.9, 64),
    "gna": Published("one window in strides, nothing picked (arXiv 2504.16922)", gna, 128, 0.7),
    "sta": Published("a window in tiles, nothing picked (arXiv 2502.04507)", sta, 128, 0.7),
}
