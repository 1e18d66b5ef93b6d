"""A few queries against all keys of a call: their outputs, and what each block of keys is worth to them.

``plain`` says in torch what is computed; ``device`` has the kernels, and ``host`` launches them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffsparse.kernels.backends.installed import no_triton_for
from diffsparse.kernels.rows import plain

if TYPE_CHECKING:
    from diffsparse.kernels.rows.plain import Summaries

__all__ = ["attend_rows", "block_errors", "no_rows_kernel", "plain"]

#: The largest head_dim that a GPU's registers hold a tile's sums of. Blocks of fp32 keys do not fit beside them.
_MAX_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16)


def no_rows_kernel(q: torch.Tensor) -> str | None:
    """Why torch takes these queries ``[..., D]``, or None where kernels do."""
    if (reason := no_triton_for(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or q.shape[-1] > _MAX_DIM:
        return f"the kernels take float16 or bfloat16 and heads of up to {_MAX_DIM}; got {q.dtype}, {q.shape[-1]}"
    return None


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of some queries: outputs ``[B, R, H, D]`` and log-sum-exps ``[B, R, H]``, both in fp32.

    q, k, v: ``[B, S, H, D]``, the last axis contiguous. rows: int64 ``[R]``. key_mask: bool ``[B, S]``, False where a
    key takes no part. A query without any key gets 0 and -inf. fp64 stays fp64. Nothing waits for the device.
    """
    if no_rows_kernel(q) is not None or any(x.stride(3) != 1 for x in (q, k, v)):
        return plain.attend_rows(q, k, v, rows, scale, key_mask)
    from diffsparse.kernels.rows.host import launch_attend

    return launch_attend(q, k, v, rows, scale, key_mask)


def block_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    summaries: Summaries,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaving out one block of keys does to each query, by each kind of tail, and the block's attention mass.

    q: ``[H, R, D]``. k, v: ``[H, N, W, D]``, the keys of each block and anything finite behind its ``length``, int64
    ``[N]``. out, lse: fp32 ``[H, R, D]`` and ``[H, R]``, of dense attention.
    Returns fp32 ``[tails, H, N, R]``, squared errors in the order of ``entry.TAILS``, and ``[H, N, R]``.
    """
    weights = plain.tail_weights(q, lse, length, summaries, scale)
    if no_rows_kernel(q) is not None:
        return plain.block_errors(q, k, v, length, out, lse, summaries, weights, scale)
    from diffsparse.kernels.rows.host import launch_errors

    return launch_errors(q, k, v, length, out, lse, summaries, weights, scale)
