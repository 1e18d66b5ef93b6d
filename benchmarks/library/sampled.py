"""What a call of any size should give, at a few of its query rows: a check of the very call that is timed."""

from __future__ import annotations

import math

import torch

from diffsparse.entry import TAILS
from diffsparse.heads import SKIP, TAIL
from diffsparse.kernels.call import key_mask_of
from diffsparse.layout import BlockLayout
from diffsparse.repair import HeadRepair

__all__ = ["sampled_error", "tolerance"]

_LIMITS = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
_LIMIT_8_BITS = 4e-2


def tolerance(dtype: torch.dtype, numerics: str = "auto") -> float:
    """The relative error that a kernel may have at its inputs' precision.

    In float32 there is room for tf32 products, which GPU kernels use there.
    """
    return _LIMITS[dtype] if numerics == "auto" else _LIMIT_8_BITS


def sampled_error(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    kv_len: torch.Tensor | None = None,
    heads: int = 12,
    rows: int = 32,
    seed: int = 0,
) -> float:
    """``||out - exact|| / ||exact||`` over sampled query tokens, the exact values in fp64 from the layout's definition.

    ``heads`` heads (all where there are no more, else spread evenly) and ``rows`` tokens of each, in the first item;
    the first and the last token are always among them, since that is where short blocks are. Skipped heads must be
    zero: anything else there makes the error infinite. Raises ValueError for the ``centroids`` tail, whose halves are
    defined by :func:`diffsparse.kernels.reference_attention` alone.
    """
    total, seq = q.shape[2], q.shape[1]
    scale = q.shape[-1] ** -0.5
    mask = key_mask_of(kv_len, seq)
    draw = torch.Generator("cpu").manual_seed(seed)
    picked = sorted({round(i * (total - 1) / max(1, min(heads, total) - 1)) for i in range(min(heads, total))})
    off = size = 0.0
    for h in picked:
        if int(layout.heads.table[h, SKIP]):
            if bool(out[0, :, h].any()):
                return math.inf
            continue
        tail = TAILS[int(layout.heads.table[h, TAIL])]
        if tail == "centroids":
            raise ValueError("the sampled check knows no centroids tail: use reference_attention on a small case")
        tokens = torch.cat([torch.randint(seq, (max(0, rows - 2),), generator=draw), torch.tensor([0, seq - 1])])
        tokens = tokens.to(q.device)
        want = _rows(q, k, v, layout, h, tail, tokens, scale, mask)
        repair = layout.heads.repair
        if isinstance(repair, HeadRepair):
            want = _repaired(want, layout, repair, h, tokens)
        elif repair is not None:
            places = repair.places(layout.tokens.text_before, layout.tokens.num_visual, q.device)
            known = _rows(q, k, v, layout, h, tail, places, scale, mask)
            exact = _dense(q, k, v, h, places, scale, mask)
            want = _repaired_online(want, layout, tokens, places, known, exact)
        got = out[0, tokens.to(out.device), h].double()
        off += float((got - want).square().sum())
        size += float(want.square().sum())
    return (off / size) ** 0.5 if size else 0.0 if not off else math.inf


def _repaired(
    rows: torch.Tensor, layout: BlockLayout, repair: HeadRepair, head: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Outputs ``[len(tokens), D]`` of one head, corrected where they are visual and the head has a map."""
    cut = layout.tokens
    visual = (tokens >= cut.text_before) & (tokens < cut.text_before + cut.num_visual) & repair.used[head]
    change = rows @ repair.weight[head].double() + repair.bias[head].double()
    return torch.where(visual[:, None], rows + change, rows)


def _repaired_online(
    rows: torch.Tensor,
    layout: BlockLayout,
    tokens: torch.Tensor,
    places: torch.Tensor,
    known: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:
    """The same, by the ridge regression of ``exact`` on ``known``, the two outputs of the tokens ``places``."""
    cut = layout.tokens
    mean, error = known.mean(0), exact - known
    centred = known - mean
    products = centred.T @ centred
    ridge = products.diagonal().mean() * torch.eye(len(products), dtype=rows.dtype, device=rows.device)
    weight = torch.linalg.solve(products + ridge, centred.T @ (error - error.mean(0)))
    visual = (tokens >= cut.text_before) & (tokens < cut.text_before + cut.num_visual)
    found = torch.where(visual[:, None], rows + (rows - mean) @ weight + error.mean(0), rows)
    which = tokens[:, None] == places
    return torch.where(which.any(1)[:, None], exact[which.int().argmax(1)], found)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head: int,
    tokens: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention fp64 ``[len(tokens), D]`` of one head of the first item."""
    logits = q[0, tokens, head].double() * scale @ k[0, :, head].double().T
    if mask is not None:
        logits.masked_fill_(~mask[0], -math.inf)
    return logits.softmax(1) @ v[0, :, head].double()


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    head: int,
    tail: str,
    tokens: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Exact outputs fp64 ``[len(tokens), D]`` of one head of the first item."""
    n, order = layout.num_blocks, int(layout.tokens.head_order[head])
    start = layout.tokens.block_start[order].long()
    length = start.diff()
    block_of = torch.repeat_interleave(torch.arange(n, device=length.device), length)[
        layout.tokens.scatter[order].long()
    ]
    key, value = k[0, :, head].double(), v[0, :, head].double()
    keep = torch.zeros(len(tokens), n, dtype=torch.bool, device=key.device)
    for i, row in enumerate((head * n + block_of[tokens]).tolist()):
        kept = layout.index.col_idx[int(layout.index.row_ptr[0, row]) : int(layout.index.row_ptr[0, row + 1])].long()
        keep[i, kept] = True
    query = q[0, tokens, head].double() * scale
    logits = query @ key.T
    logits.masked_fill_(~keep[:, block_of], -math.inf)
    if mask is not None:
        logits.masked_fill_(~mask[0], -math.inf)
    if tail == "none":
        # A row that keeps nothing is 0, not NaN.
        return logits.softmax(1).nan_to_num_(0.0) @ value
    count = length.clamp(min=1).double()[:, None]
    zeros = torch.zeros(n, key.shape[1], dtype=torch.float64, device=key.device)
    mean_k, mean_v = (zeros.index_add(0, block_of, x) / count for x in (key, value))
    extra = query @ mean_k.T + count[:, 0].log()
    if tail == "moments":
        extra += 0.5 * query.square() @ (zeros.index_add(0, block_of, (key - mean_k[block_of]).square()) / count).T
    visual = (start[:-1] >= layout.grid.text_before) & (start[:-1] < layout.grid.text_before + layout.grid.num_visual)
    extra.masked_fill_(keep | ~(visual & (length > 0)), -math.inf)
    return torch.cat([logits, extra], 1).softmax(1) @ torch.cat([value, mean_v])
