"""Enable and disable."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffsparse.kernels.backends import find_backend, unknown_tail
from diffsparse.kernels.checks import cannot_run
from diffsparse.pipelines.dense import DENSE_BACKENDS
from diffsparse.pipelines.family import architecture_of, find_transformers
from diffsparse.pipelines.hooks import attach, detach, is_attached
from diffsparse.pipelines.resolve import resolve_plans
from diffsparse.pipelines.state import ModelState, state_of
from diffsparse.plan import Architecture, PlanError, SparsityPlan

__all__ = ["disable_sparse_attention", "enable_sparse_attention", "sparse_attention"]

logger = logging.getLogger("diffsparse")


def enable_sparse_attention(
    pipe_or_transformer: Any,
    plan: Any = "auto",
    *,
    backend: str = "auto",
    strict: bool = True,
    timing: bool = False,
    dense_backend: str | None = None,
) -> None:
    """Compute only the attention blocks that a plan keeps, in every self-attention layer of the denoiser.

    Args:
        pipe_or_transformer: a diffusers pipeline (both transformers of Wan 2.2 are covered) or a transformer.
        plan: a ``SparsityPlan``; a folder or Hub id of one; the name of a preset, such as
            ``"conservative"`` (:func:`diffsparse.presets`); a dict of these by component (``{"transformer": ...,
            "transformer_2": ...}``; one that is left out stays dense); or ``"auto"``: the plan in the model folder's
            ``sparse_plan`` if it is for this architecture, else the one cached for it, else the preset ``online``,
            with a warning. A log line says which.
        backend: the kernel, ``"auto"`` or one of ``diffsparse.kernels.BACKENDS``; one asked for by name runs or raises.
            With ``"auto"`` everything stays dense if there is no kernel for the device, and a layer stays dense if the
            device's break-even table says that sparse attention would be slower there; the summary gives the reason.
            Without a table every layer runs sparse (`diffsparse bench break-even` makes one).
        strict: refuse a plan for another architecture. With False, layers that the plan and the model do not share run
            dense and are listed in the summary.
        timing: on a GPU, time every attention call for the summary with two CUDA events; nothing waits for them. Their
            cost on a GPU is not measured, so this is off by default. On a CPU calls are always timed, which takes
            about a microsecond a call. Calls in compiled code are not timed.
        dense_backend: None leaves every dense call to the model's own attention, bit for bit. ``"fastest"`` measures
            once for each shape what is installed (the model's own, cuDNN's, FlashAttention's and the memory-efficient
            kernel of torch, FlashAttention-3 and -4, xformers, the kernel of this package with every block kept) and
            runs dense steps, layers and heads on the fastest that agrees with the model's own. An uncompiled model
            measures in the first call of a shape that needs it, on that call's q, k and v. For compiled blocks it
            measures before the forward, on random inputs and without the model's own attention. Nothing is measured
            while code is traced; a transformer that was compiled as a whole from outside keeps its own attention.
            Dense heads leave the sparse kernel only if a kernel of torch or of another package is faster. The summary
            names what ran and every time.

    What cannot run sparse (causal, gradients needed, an unknown mask, ...) runs dense; it is logged once with its
    reason and counted in ``sparse_attention_summary``. One transformer runs in several threads at once only uncompiled.

    Raises:
        RuntimeError: already enabled; disable first.
        UnsupportedModelError: no known transformer.
        PlanError: the plan cannot be read, or is for another architecture.
        ValueError: an unknown backend or dense_backend, a backend that does not know a tail of the plan, or a component
            that is not a transformer.
    """
    transformers = find_transformers(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, torch.nn.Module) else pipe_or_transformer
    if backend != "auto" and (reason := cannot_run(backend)) is not None:
        raise ValueError(reason)
    if dense_backend not in DENSE_BACKENDS:
        raise ValueError(
            f"unknown dense_backend {dense_backend!r}; it is None (the model's own attention) or 'fastest' (measured)"
        )
    for name, transformer in transformers.items():
        if is_attached(transformer):
            raise RuntimeError(f"sparse attention is already enabled on {name}; call disable_sparse_attention first")
    states: dict[str, ModelState] = {}
    for name, (chosen, source) in resolve_plans(pipe, transformers, plan).items():
        architecture = architecture_of(transformers[name])
        asked = find_backend(backend)
        if asked is not None and (reason := unknown_tail(asked, chosen.tails)) is not None:
            raise ValueError(f"the plan of {name} cannot run: {reason}. backend='auto' takes one that does, by layer")
        states[name] = ModelState(
            transformers[name],
            component=name,
            pipe=pipe,
            plan=chosen,
            source=source,
            backend=backend,
            skipped=_fit(chosen, architecture, name, strict),
            timing=timing,
            dense_backend=dense_backend,
        )
    for name, state in states.items():
        attach(transformers[name], state)


def disable_sparse_attention(pipe_or_transformer: Any) -> None:
    """Back to dense attention, bit for bit. Does nothing where sparse attention is not enabled."""
    for transformer in find_transformers(pipe_or_transformer).values():
        state = state_of(transformer)
        if state is not None and state.tap is None:
            detach(transformer)


@contextmanager
def sparse_attention(
    pipe_or_transformer: Any,
    plan: Any = "auto",
    *,
    backend: str = "auto",
    strict: bool = True,
    timing: bool = False,
    dense_backend: str | None = None,
) -> Iterator[Any]:
    """``with sparse_attention(pipe, plan): ...``, dense again afterwards in any case. Gives the pipeline."""
    options: dict[str, Any] = {"backend": backend, "strict": strict, "timing": timing, "dense_backend": dense_backend}
    enable_sparse_attention(pipe_or_transformer, plan, **options)
    try:
        yield pipe_or_transformer
    finally:
        disable_sparse_attention(pipe_or_transformer)


def _fit(plan: SparsityPlan, model: Architecture, component: str, strict: bool) -> dict[str, str]:
    """Layers that must run dense because plan and model do not share them, with the reason."""
    problems = plan.check_architecture(model)
    named = [] if plan.is_uniform else list(plan.layers)
    lacking = [n for n in dict.fromkeys([*named, *plan.schedule.dense_layers]) if n not in model.layers]
    if lacking and not any(p.startswith("layers:") for p in problems):
        problems.append(
            f"the plan names {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}, which the model lacks"
        )
    heads = plan.index.shape[2]
    if not plan.is_uniform and heads != model.heads and not any(p.startswith("heads:") for p in problems):
        problems.append(f"heads: the plan has {heads!r}, the model {model.heads!r}")
    repair = plan.fitted_repair
    if repair is not None and repair.head_dim != model.head_dim and not any(p.startswith("head_dim") for p in problems):
        problems.append(f"head_dim: the plan's repair is for {repair.head_dim}, the model has {model.head_dim}")
    if not problems:
        return {}
    if strict:
        raise PlanError(
            f"the plan is not for this model ({component}, {model.model_class}): {'; '.join(problems)}. "
            "strict=False runs what fits and leaves the other layers dense"
        )
    logger.warning(
        "%s: the plan is for another model (%s); what does not fit runs dense", component, "; ".join(problems)
    )
    skipped = dict.fromkeys(lacking, "the model lacks this layer")
    if not plan.is_uniform:
        if repair is not None and repair.head_dim != model.head_dim:
            why = f"the plan's repair is for heads of {repair.head_dim}, the model has {model.head_dim}"
            skipped.update(dict.fromkeys(model.layers, why))
        elif heads != model.heads:
            skipped.update(dict.fromkeys(model.layers, f"the plan has {heads} heads, the model {model.heads}"))
        else:
            skipped.update({n: "the plan lacks this layer" for n in model.layers if n not in plan.layers})
    return skipped
