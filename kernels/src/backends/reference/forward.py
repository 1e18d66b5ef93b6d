"""The oracle: block-sparse attention in plain torch, one query block at a time, with nothing left to cleverness."""

from __future__ import annotations

import math

import torch

from diffsparse.heads import SKIP, TAIL
from diffsparse.kernels.call import AttentionCall, make_call
from diffsparse.kernels.tails import find_tail
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.tails import tail_name

__all__ = ["reference_attention", "run"]


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every backend should compute, in ``dtype`` throughout.

    q, k, v: ``[B, S, H, D]``. Returns the output ``[B, S, H, D]``, repaired where the layout has a repair, and its
    log-sum-exp ``[B, S, H]``, both in ``dtype``.
    """
    call = make_call(q, k, v, layout, scale=scale, kv_len=kv_len)
    parts = [_compute(one, dtype) for one in call.by_lists()]
    out = torch.cat([out for out, _ in parts])
    repair = layout.heads.repair
    if isinstance(repair, OnlineRepair):
        _mend_online(out, call, repair)
    elif repair is not None:
        out = repair.apply_(out, layout.tokens.text_before, layout.tokens.num_visual)
    return out, torch.cat([lse for _, lse in parts])


def _mend_online(out: torch.Tensor, call: AttentionCall, online: OnlineRepair) -> None:
    """The online repair, item by item and head by head: the normal equations of ridge regression, solved."""
    tokens, dtype = call.tokens, out.dtype
    places = online.places(tokens.text_before, tokens.num_visual, out.device)
    visual = slice(tokens.text_before, tokens.text_before + tokens.num_visual)
    for b in range(out.shape[0]):
        keys = slice(None) if call.key_mask is None else call.key_mask[b]
        for h in range(out.shape[2]):
            q, k, v = (x[b, :, h].to(dtype) for x in (call.q, call.k, call.v))
            exact = (q[places] @ k[keys].T * call.scale).softmax(1) @ v[keys]
            x = out[b, places, h]
            mean_x, mean_e = x.mean(0), (exact - x).mean(0)
            centred = x - mean_x
            products = centred.T @ centred
            ridge = float(products.diagonal().mean()) or 1.0
            penalty = ridge * torch.eye(len(products), dtype=dtype, device=out.device)
            weight = torch.linalg.solve(products + penalty, centred.T @ (exact - x - mean_e))
            out[b, visual, h] += (out[b, visual, h] - mean_x) @ weight + mean_e
            out[b, places, h] = exact


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The backend: fp32 inside (fp64 for fp64 inputs), output in the inputs' dtype, log-sum-exp in fp32."""
    out, lse = _compute(call, torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    return out.to(call.q.dtype), lse.float()


def _compute(call: AttentionCall, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq, heads, _ = call.q.shape
    n = call.num_blocks
    out = torch.zeros(call.q.shape, dtype=dtype, device=call.q.device)
    lse = torch.full((batch, seq, heads), -math.inf, dtype=dtype, device=call.q.device)
    start_of, row_ptr, col_idx = (
        call.tokens.block_start.tolist(),
        call.index.row_ptr[0].tolist(),
        call.index.col_idx.tolist(),
    )
    modes, order_of = call.heads.table.tolist(), call.tokens.head_order.tolist()
    for h in range(heads):
        if modes[h][SKIP]:
            continue
        order, tail = order_of[h], find_tail(tail_name(modes[h][TAIL]))
        gather = call.tokens.gather[order].long()
        border = start_of[order]
        tokens = [gather[border[i] : border[i + 1]] for i in range(n)]
        visual = call.tokens.visual_blocks(order).tolist()
        for b in range(batch):
            q, k, v = (x[b, :, h].to(dtype) for x in (call.q, call.k, call.v))
            for i in range(n):
                if not len(tokens[i]):
                    continue
                kept = col_idx[row_ptr[h * n + i] : row_ptr[h * n + i + 1]]
                query = q[tokens[i]] * call.scale
                keys = torch.cat([tokens[j] for j in kept]) if kept else tokens[i][:0]
                if call.key_mask is not None:
                    keys = keys[call.key_mask[b, keys]]
                logits, values = [query @ k[keys].T], [v[keys]]
                if tail is not None:
                    listed = set(kept)
                    for j in (j for j in range(n) if visual[j] and j not in listed):
                        logit, value = tail.summaries(query, k[tokens[j]], v[tokens[j]])
                        logits.append(logit)
                        values.append(value)
                weights = torch.cat(logits, 1)
                if weights.shape[1]:
                    lse[b, tokens[i], h] = weights.logsumexp(1)
                    out[b, tokens[i], h] = weights.softmax(1) @ torch.cat(values)
    return out, lse
