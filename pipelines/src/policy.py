"""Whether a layer's call runs sparse, or dense and why, and what it costs: asked here, decided nowhere else.

Two questions, since the first has one answer for many calls. What does the plan say of a layer on a grid and a machine
(:func:`entries_of`, then :func:`judge_layer`)? That needs no tensors, so that ``explain`` and the search get the answer
that a run gets. And is a call one that its layer's block lists are for (:func:`judge_call`, :func:`misfit`)? Compiled
code asks that while it is traced, so these two have no counters, no logging, and nothing that differs from layer to
layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffsparse.entry import NUMERICS, HeadEntry
from diffsparse.kernels.backends import last_resort
from diffsparse.kernels.break_even import find_table
from diffsparse.kernels.checks import choose_backend, no_kernel, numerics_of
from diffsparse.kernels.costs import CostTable, mean_of
from diffsparse.kernels.inputs import input_error, kv_len_error
from diffsparse.layout import BlockLayout
from diffsparse.plan import SparsityPlan
from diffsparse.work import HeadWork

# -- reasons -----------------------------------------------------------------------------------------------------------

# By the plan's word, or this machine's.
OUTSIDE = "noise level outside the plan's sparse range"
NOT_IN_PLAN = "dense layer of the plan"
DENSE_ENTRIES = "all heads are dense in the plan"
FULL = "every block is kept on this grid"
AS_MUCH = "kept blocks and the rows of the online repair are as much work as dense attention on this grid"
SLOWER = "dense attention is faster here, by the break-even table"

_NO_KERNEL = "no kernel for these tensors ({why}); backend={backend!r} runs all the same"

# The call is another one than plain self-attention in inference.
CAUSAL = "causal attention"
DROPOUT = "dropout"
PARALLEL = "context parallel"
EXTRA = "extra arguments for the attention backend"
GROUPED = "grouped heads"
SHAPES = "queries and keys differ in shape"
GRADIENTS = "gradients are needed"
OTHER_MASK = "a mask that is not a key-padding mask"

# The call is not the one that the layer's block lists are for.
OTHER_TOKENS = "another number of tokens than the grid has"
OTHER_HEADS = "another number of heads than the plan has"
MASKED_VIDEO = "a key mask over visual tokens"

# Of compiled code.
RAN_SPARSE = "sparse"
BY_PLAN = "dense by the plan"  # which word of it is known from the layouts
OTHER_KEYS = "keys of another length"  # no call of the layer's own
UNKNOWN_TEXT = "compiled code does not know the number of text tokens"
NOT_READY = "the layout was not ready when compiled code ran"

# A layer of which no call was counted.
UNSEEN = "no attention call was seen (a processor from outside diffusers?)"
FOREIGN = "queries and keys had different lengths only"
UNKNOWN = "compiled code left no word of what it did"


# -- a layer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What kernels can do for tensors of one kind.

    kernel: the backend that runs them. without_kernel: why they run dense under ``"auto"``, or None. table: what was
    measured of sparse over dense time, asked under ``"auto"`` alone. numerics: what the backend has beside ``auto``,
    which is 8 bits.
    """

    kernel: str
    without_kernel: str | None
    table: CostTable | None
    numerics: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "table": None if self.table is None else self.table.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Machine:
        table = None if data["table"] is None else CostTable.from_dict(data["table"])
        return cls(**{**data, "table": table, "numerics": tuple(data["numerics"])})


#: One that runs whatever a plan says: for what a plan asks for, wherever it runs.
ANY_MACHINE = Machine(kernel="any", without_kernel=None, table=None, numerics=tuple(n for n in NUMERICS if n != "auto"))


def machine_for(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, tails: Collection[str] = ()
) -> Machine:
    """What kernels can do. ``tails``: those that heads of a layer have (``HeadSpec.tails``).

    Raises ValueError, with the reason, for a backend that is asked for by name and cannot run such tensors.
    """
    probe = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    kernel, auto = choose_backend(backend, probe, tails), backend == "auto"
    why = no_kernel(probe, tails) if auto else None
    return Machine(
        kernel=kernel,
        without_kernel=None if why is None else _NO_KERNEL.format(why=why, backend=last_resort().name),
        table=find_table(device, head_dim, tails) if auto and why is None else None,
        numerics=numerics_of(kernel, head_dim),
    )


def compute_dtype(module: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The precision of a model's attention, as far as it shows beforehand.

    Parameters may be stored in another one: in 8 bits with layerwise casting, as integers where they are quantised.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype = torch.float32
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            return parameter.dtype
        if parameter.dtype == torch.float64:
            dtype = torch.float64
    return dtype


@dataclass(frozen=True)
class LayerVerdict:
    """reason: why the layer runs dense, or None. density: of its calls. time: over dense, None where it is unknown."""

    reason: str | None
    density: float
    time: float | None


def entries_of(plan: SparsityPlan, phase: int | None, layer: str, heads: int) -> tuple[HeadEntry, ...] | str:
    """One layer's entries in a phase (None is a dense step), or why the plan has it dense whatever the grid."""
    if phase is None:
        return OUTSIDE
    entries = plan.layer_entries(phase, layer, heads)
    if entries is None:
        return NOT_IN_PLAN
    return DENSE_ENTRIES if all(entry.is_dense for entry in entries) else entries


def judge_layer(
    heads: Sequence[HeadWork], tokens: int, machine: Machine, costs: CostTable | None = None
) -> LayerVerdict:
    """Of heads whose work on a grid of ``tokens`` tokens is known, from entries or from a layout.

    costs: by which the time of a layer that runs sparse is predicted, as a search measures them and a plan records
    them; None: by the machine's table. They do not change whether it runs sparse: a run does not know them.
    """
    if machine.without_kernel is not None:
        return LayerVerdict(machine.without_kernel, 1.0, 1.0)
    # Heads in 8 bits are faster than dense attention with every block kept, too.
    eight = {head.numerics for head in heads} - {"auto"}
    in_8_bits = bool(eight) and eight <= set(machine.numerics)
    # What a rule keeps at most says little where its budget depends on the data and has no bound.
    unbounded = any(head.varies and head.density >= 1 for head in heads)
    if min(head.density for head in heads) >= 1 and not in_8_bits and not unbounded:
        return LayerVerdict(AS_MUCH if any(head.extra for head in heads) else FULL, 1.0, 1.0)
    time = machine.table.over_dense(heads, tokens) if machine.table is not None and not unbounded else None
    if time is not None and time >= 1:
        return LayerVerdict(SLOWER, 1.0, 1.0)
    told = time if costs is None else costs.over_dense(heads, tokens)
    return LayerVerdict(None, mean_of(head.density for head in heads), told)


# -- a call ------------------------------------------------------------------------------------------------------------


def judge_arguments(dropout_p: float, is_causal: bool, extra: Any = None, parallel: Any = None) -> str | None:
    """Why a call runs dense by what is asked of it beside its tensors, or None."""
    if parallel is not None:
        return PARALLEL
    if extra:
        return EXTRA
    if is_causal:
        return CAUSAL
    return DROPOUT if dropout_p else None


def judge_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, two_axes: bool
) -> tuple[str | None, torch.Tensor | None]:
    """Why a call is none of plain self-attention in inference, or None; and its key mask, bool ``[B, S]``, or None.

    ``two_axes``: a mask ``[B, S]`` is a key mask too (diffusers' dispatch takes it so, torch's function does not).
    """
    if k.shape != q.shape or v.shape != q.shape:
        return (GROUPED if k.shape[2] != q.shape[2] else SHAPES), None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return GRADIENTS, None
    if mask is None:
        return None, None
    key_mask = _key_mask(mask, q.shape[0], q.shape[1], two_axes)
    return (OTHER_MASK if key_mask is None else None), key_mask


def _key_mask(mask: Any, batch: int, seq: int, two_axes: bool) -> torch.Tensor | None:
    """A key-padding mask as bool ``[B, S]``, or None where the mask is another one. Reads no values."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return None
    if mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    elif mask.ndim != 2 or not two_axes or mask.shape[0] != batch or batch == seq:
        return None
    # Not `in`: where Dynamo takes the batch for a variable, it finds no number among variables.
    if mask.shape[1] != seq or (mask.shape[0] != 1 and mask.shape[0] != batch):
        return None
    return mask.expand(batch, seq)


def misfit(
    layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> str | None:
    """Why a layer's block lists are not for this call, or None."""
    tokens = layout.tokens
    if q.shape[1] != layout.seq_len:
        return OTHER_TOKENS
    if q.shape[2] != layout.num_heads:
        return OTHER_HEADS
    if key_mask is not None and tokens.num_visual == layout.seq_len:
        return MASKED_VIDEO
    return input_error(q, k, v, layout, kv_len=key_mask)


def masked_visual_tokens(layout: BlockLayout, key_mask: torch.Tensor | None) -> str | None:
    """What is wrong with the values of a key mask. They are read on a CPU alone."""
    return kv_len_error(key_mask, layout.seq_len, layout.tokens.text_before, layout.tokens.num_visual)


def told(reason: str, layout: BlockLayout, seq: int, heads: int) -> str:
    """A reason for readers, with the figures of the call."""
    if reason == OTHER_TOKENS:
        return f"{seq} tokens, the grid {layout.grid} has {layout.seq_len}"
    return f"{heads} heads here, the plan has {layout.num_heads}" if reason == OTHER_HEADS else reason
