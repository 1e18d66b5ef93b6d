"""Published methods made for language models, read for video: nothing is causal, and rows are not the last ones."""

from __future__ import annotations

import math

from diffsparse.entry import HeadEntry
from diffsparse.order import RasterOrder
from diffsparse.published.base import Published, picked
from diffsparse.selection import Budget, OnlineSelection

__all__ = ["LANGUAGE"]


def sparsed(block_size: int, *, density: float = 0.3, rows: int = 128, tail: str = "none") -> HeadEntry:
    """SparseD (arXiv 2509.24014): exact attention mass by blocks, the best of each row, picked once.

    As published for diffusion language models: blocks of 128, the first 20% of the steps dense, 30% kept.
    """
    rule = OnlineSelection("mass", Budget("density", density), (("rows", rows),), "once")
    return picked(RasterOrder(), rule, tail)


def minference(block_size: int, *, density: float = 0.25, rows: int = 64, tail: str = "none") -> HeadEntry:
    """MInference (arXiv 2407.02490): vertical lines and slashes, estimated from a few rows, in every call.

    Published for causal language models, with the last 64 queries, single columns and diagonals, and numbers of them
    that were searched for each head. Here rows are spread over the video, lines are as wide as a block, and all heads
    have one ``density``, which is this library's choice, as are the dense steps.
    """
    rule = OnlineSelection("vertical_slash", Budget("density", density), (("rows", rows),))
    return picked(RasterOrder(), rule, tail)


def flexprefill(
    block_size: int, *, gamma: float = 0.9, tau: float = 0.1, rows: int = 64, tail: str = "none"
) -> HeadEntry:
    """FlexPrefill (arXiv 2502.20766): means for heads that they describe, vertical lines and slashes for the others.

    As published: blocks of 128, tau 0.1, the fewest pairs of a head that hold 0.9. There the last block of queries
    tells; here four blocks over the video. A pair of blocks weighs what its column and its diagonal weigh together,
    where there each is cut off by itself. Dense steps are this library's choice.
    """
    rule = OnlineSelection("switch", Budget("top_p_head", gamma), (("rows", rows), ("tau", tau)))
    return picked(RasterOrder(), rule, tail)


def sale(block_size: int, *, tau: float = 0.008, samples: int = 16, tail: str = "none") -> HeadEntry:
    """SALE (arXiv 2505.24179): queries and keys in four bits, against what the first and the own block weigh.

    As published: blocks of 64 queries, and a threshold whose calibration for each head begins at 0.008 and halves it;
    here all heads have one. There all queries and keys are multiplied in four bits, by a kernel; here ``samples`` of
    each block. Dense steps are this library's choice.
    """
    rule = OnlineSelection("low_bit", Budget("score", math.log(tau)), (("samples", samples),))
    return picked(RasterOrder(), rule, tail)


def anchor(block_size: int, *, theta: float = 12.0, tail: str = "none") -> HeadEntry:
    """AnchorAttention (arXiv 2505.23520): keys that fall behind the first and the own block by no more than a bound.

    Blocks of 128 as published; the bound of 12 was not checked against the paper. There single columns of keys are
    gathered; here blocks are kept, for their best key, which keeps more. Dense steps are this library's choice.
    """
    return picked(RasterOrder(), OnlineSelection("anchor", Budget("score", -theta)), tail)


def proxyattn(
    block_size: int, *, gamma: float = 0.9, heads: int = 4, samples: int = 16, tail: str = "none"
) -> HeadEntry:
    """ProxyAttn (arXiv 2509.24745): groups of heads are scored together, and each keeps what it needs.

    As published: blocks of 128. It is made for heads that share keys; where each head has its own, as here, mean
    queries and keys of several heads tell less. A head's need is read from its mean queries and keys. ``gamma``, the
    size of the groups and the dense steps are this library's choice.
    """
    rule = OnlineSelection("proxy", Budget("top_p", gamma), (("samples", samples), ("together", heads)))
    return picked(RasterOrder(), rule, tail)


def hip(block_size: int, *, density: float = 0.125, samples: int = 4, tail: str = "none") -> HeadEntry:
    """HiP (arXiv 2406.09827): from coarse to fine, only the halves of the best nodes are looked at.

    As published: at each level as many nodes go on as are kept in the end, told by the key in their middle. There keys
    are single tokens or few; here blocks. ``density`` and the dense steps are this library's choice.
    """
    rule = OnlineSelection("tree", Budget("density", density), (("samples", samples), ("share", density)))
    return picked(RasterOrder(), rule, tail)


LANGUAGE: dict[str, Published] = {
    "sparsed": Published("exact mass by blocks, picked once (arXiv 2509.24014)", sparsed, 128, 0.8),
    "minference": Published("vertical lines and slashes from a few rows (arXiv 2407.02490)", minference, 64, 0.9),
    "flexprefill": Published("means, or lines and slashes, head by head (arXiv 2502.20766)", flexprefill, 128, 0.9),
    "sale": Published("products in four bits, against near blocks (arXiv 2505.24179)", sale, 64, 0.9),
    "anchor": Published("how far keys fall behind near blocks (arXiv 2505.23520)", anchor, 128, 0.9),
    "proxyattn": Published("groups of heads scored together (arXiv 2509.24745)", proxyattn, 128, 0.9),
    "hip": Published("a tree search from coarse to fine (arXiv 2406.09827)", hip, 64, 0.9),
}
