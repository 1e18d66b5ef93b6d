"""The CPU backend: compiled code where there is a compiler for it (``compiled``), else torch's operators, as here.

A few rows' kept blocks are gathered, multiplied, put through a softmax and multiplied again. Query blocks are taken in
chunks small enough for their logits to stay in cache, rows with similar numbers of kept blocks together. A tail needs
no pass of its own: summaries lie behind the blocks in the same table, so that a row's list simply goes on with them,
and one softmax covers both. A thread takes whole heads where they divide well, so that threads need not wait for one
another behind every operator; else operators are split. Heads that keep every block go to torch's own attention: beside
compiled code, only where all heads of a call do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffsparse.entry import TAILS
from diffsparse.heads import SKIP, TAIL
from diffsparse.kernels.backends.cpu import compiled as compiled_code
from diffsparse.kernels.backends.cpu.rows import HeadRows, closed_keys, head_rows
from diffsparse.kernels.backends.cpu.table import Workspace, fill_table
from diffsparse.kernels.backends.cpu.workers import on_workers
from diffsparse.kernels.call import AttentionCall

__all__ = ["run"]

# Below, a call takes about a millisecond, and threads would wait for the interpreter's lock.
_MIN_KEPT = 1 << 14


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, D]`` in the inputs' dtype, log-sum-exp fp32 ``[B, S, H]`` (empty unless asked for)."""
    batch, seq, heads, _ = call.q.shape
    n = call.num_blocks
    out = torch.empty(call.q.shape, dtype=call.q.dtype)
    lse = torch.empty((batch, seq, heads) if call.return_lse else (0,), dtype=torch.float32)
    kept = call.index.row_ptr.diff().view(heads, n).sum(1).tolist()
    real = (call.tokens.block_start.diff(dim=1) > 0).sum(1).tolist()
    order_of, modes = call.tokens.head_order.tolist(), call.heads.table.tolist()
    full = [kept[h] == real[order_of[h]] ** 2 and not modes[h][SKIP] for h in range(heads)]
    if all(full) and not call.return_lse:
        return _dense(call, call.q, call.k, call.v), lse
    compiled = compiled_code.can_attend(call)
    dense, todo = [], []
    for h in range(heads):
        if modes[h][SKIP]:
            out[:, :, h] = 0
            if call.return_lse:
                lse[:, :, h] = -math.inf
        elif full[h] and not call.return_lse and not compiled:
            dense.append(h)
        else:
            todo.append(h)
    threads = torch.get_num_threads()
    kept_keys = batch * call.block_size * sum(kept[h] for h in todo)
    workers = threads if not compiled and _divide_well(batch * len(todo), kept_keys, threads) else 1
    listed = [(h, head_rows(call, h, order_of[h], TAILS[modes[h][TAIL]], threads // workers)) for h in todo]
    if compiled:
        compiled_code.attend(call, listed, out, lse)
    else:
        # What takes longest is taken first, from the end.
        jobs = sorted(((b, h, rows) for h, rows in listed for b in range(batch)), key=lambda job: job[2].work)

        def until_all_are_taken(_: int) -> None:
            space = Workspace()
            while True:
                try:
                    b, h, rows = jobs.pop()
                except IndexError:
                    return
                _attend(call, rows, b, h, out, lse, space)

        on_workers(workers, until_all_are_taken, range(workers))
    if dense:
        out[:, :, dense] = _dense(call, *(x[:, :, dense] for x in (call.q, call.k, call.v)))
    return out, lse


def _divide_well(jobs: int, kept: int, threads: int) -> bool:
    """Whether heads are to be given to threads whole: none idles for long, and there is enough to do for it to pay.

    ``kept``: key positions that the query blocks of all these heads keep.
    """
    return threads > 1 and kept >= _MIN_KEPT and (jobs % threads == 0 or jobs >= 4 * threads)


def _dense(call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    return out.transpose(1, 2).contiguous()


def _attend(
    call: AttentionCall, head: HeadRows, b: int, h: int, out: torch.Tensor, lse: torch.Tensor, space: Workspace
) -> None:
    """One head of one item: fills ``out[b, :, h]`` and, where asked for, ``lse[b, :, h]``."""
    block, dim, used = call.block_size, call.q.shape[3], head.num_rows
    keys, values, variance = fill_table(call, head, b, h, space)
    query = call.q[b, :, h].index_select(0, head.query_token).float().view(used, block, dim).mul_(call.scale)
    square = query.square().mul_(0.5) if variance is not None else None
    closed = head.closed
    if call.key_mask is not None:
        closed = closed_keys(head, call.num_blocks, head.valid & call.key_mask[b][head.key_token])

    # One more block, of rows that attend nothing.
    result = space.take("result", used + 1, block, dim)
    result[used] = 0.0
    row_lse = torch.full((used + 1, block), -math.inf) if call.return_lse else None
    for chunk, (low, high) in zip(head.chunks, closed.spans):
        begin, end, size = chunk.begin, chunk.end, chunk.end - chunk.begin
        exact = chunk.widest * block
        width = exact + head.num_summaries
        fetched = (len(chunk.fetched), block * dim)
        key = torch.index_select(keys, 0, chunk.fetched, out=space.take("key", *fetched))
        value = torch.index_select(values, 0, chunk.fetched, out=space.take("value", *fetched))
        key, value = (x.view(size, -1, dim)[:, :width] for x in (key, value))
        logits = space.take("logits", size, block, width)
        torch.bmm(query[begin:end], key.transpose(1, 2), out=logits)
        if low < high:
            bias = closed.bias[head.index[begin:end, low:high]]
            logits[:, :, low * block : high * block] += bias.view(size, 1, -1)
        if chunk.tail_bias is not None:
            extra = chunk.tail_bias
            if square is not None and variance is not None:
                extra = torch.baddbmm(extra, square[begin:end], variance.T.expand(size, -1, -1))
            logits[:, :, exact:] += extra
        if row_lse is None and call.key_mask is None:
            torch.bmm(torch.softmax(logits, -1, out=logits), value, out=result[begin:end])
            continue
        # Every key of a row may be masked out, and -inf - -inf is NaN.
        top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        torch.bmm(logits, value, out=result[begin:end]).div_(total.where(total > 0, 1.0))
        if row_lse is not None:
            row_lse[begin:end] = (top + total.log())[..., 0]

    out[b, :, h] = result.view(-1, dim).index_select(0, head.place)
    if row_lse is not None:
        lse[b, :, h] = row_lse.view(-1)[head.place]
