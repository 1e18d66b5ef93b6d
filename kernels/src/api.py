"""The public call: arguments are checked here, before anything is launched."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.kernels.backends import about_way, backend_names
from diffsparse.kernels.checks import cannot_run
from diffsparse.kernels.inputs import input_error
from diffsparse.kernels.operands import as_operands
from diffsparse.kernels.ops import sparse_attention_op
from diffsparse.kernels.select import pick_blocks
from diffsparse.layout import BlockLayout

__all__ = ["available_backends", "backend_ways", "sparse_attention"]


def available_backends() -> dict[str, str | None]:
    """Every backend, registered ones too, with None where this machine can run it, else the reason why not."""
    return {name: cannot_run(name) for name in backend_names()}


def backend_ways() -> dict[str, str]:
    """How backends that have several ways run on this machine: the CPU's compiled kernel, or why it is not compiled."""
    return {name: about for name in backend_names() if (about := about_way(name))}


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    kv_len: torch.Tensor | None = ...,
    numerics: str = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    kv_len: torch.Tensor | None = ...,
    numerics: str = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    numerics: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks that a layout keeps, with each head's order, tail and mode.

    Args:
        q, k, v: ``[batch, seq, heads, head_dim]`` of one shape, dtype and device; any strides, last axis contiguous.
        layout: for this ``seq`` and number of heads, on the same device. Where heads have an online selection, their
            blocks are picked from q and k first.
        scale: factor of the logits; ``head_dim ** -0.5`` where None.
        kv_len: valid tokens of each item, int32 ``[batch]``, or a bool key mask ``[batch, seq]``. Only text may be
            masked out. On a GPU its values are taken on trust, since reading them would stall the device.
        numerics: ``"auto"``, what each head has in the layout, of which ``auto`` is the precision of q, k and v;
            ``"int8"`` or ``"fp8"`` for all heads: products of queries and keys in that, those with values in fp8,
            queries and keys turned and keys and values smoothed first. Heads with the tail ``moments`` stay in the
            precision of q, k and v. Asked for here it takes ``backend="gluon_sm90"`` and head_dim 64 or 128; what a
            layout asks for is run in the precision of q, k and v elsewhere, with a line in the log.
        backend: ``"auto"``, or one of :func:`available_backends`, which then runs or raises.
        return_lse: return the log-sum-exp too.

    Returns:
        The output ``[batch, seq, heads, head_dim]`` in q's dtype and the model's token order, corrected where the
        layout has a repair; with ``return_lse`` also fp32 ``[batch, seq, heads]``, the natural logarithm of the sum of
        all weights that entered the output, tails included, as it is without a repair. Where a query attends nothing (a
        skipped head; a row without kept blocks and without a tail) the output is 0, before a repair, and the
        log-sum-exp -inf.

    Raises:
        ValueError: on any argument that does not fit, with the value received and what is allowed.
        NotImplementedError: in backward.
    """
    reason = input_error(q, k, v, layout, scale=scale, kv_len=kv_len, numerics=numerics, backend=backend)
    if reason is not None:
        raise ValueError(reason)
    return run_checked(
        q, k, v, layout, scale=scale, kv_len=kv_len, numerics=numerics, backend=backend, return_lse=return_lse
    )


def run_checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    numerics: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
    index: BlockIndex | None = None,
) -> Any:
    """:func:`sparse_attention` of arguments with which ``inputs.input_error`` has found nothing wrong.

    ``index``: the blocks, where they have been picked from q and k already.
    """
    if index is None and layout.heads.picks is not None:
        index = pick_blocks(layout, q, k, v, scale)[0]
    out, lse = sparse_attention_op(
        q,
        k,
        v,
        *as_operands(layout, index),
        kv_len,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        return_lse,
        backend,
        numerics,
    )
    return (out, lse) if return_lse else out
