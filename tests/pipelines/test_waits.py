"""Sparse attention makes the host wait for the device nowhere that the model itself does not.

Tensors on the ``meta`` device stand for those on a GPU: they have no values, so whatever asks for one (``item``,
``tolist``, ``bool``, ``nonzero``, a copy to the CPU) raises an error instead of waiting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.pipelines import enable_sparse_attention, hooks, sparse_attention_summary
from diffsparse.pipelines import family as families
from diffsparse.pipelines.family import family_of
from tests.pipelines.models import CASES, Case, mixed_plan, run

#: Families whose own attention processors ask for values: Mochi for the places of text tokens that are no padding.
PROCESSOR_WAITS = {"mochi"}
#: Families whose grid is told by values. Once in each forward, where the model itself waits for the same values next:
#: how many text tokens are no padding, or where the image begins. (And Framepack with a batch of one.)
FORWARD_WAITS = {"mochi", "lumina2", "ideogram4", "ideogram4_image"}
#: Once for each tensor of positions, which a pipeline makes once in a generation.
GENERATION_WAITS = {
    "flux", "flux2", "flux2_reference", "flux3", "kontext", "chroma", "bria", "bria_fibo", "ovis_image",
    "longcat_image", "krea2",
}  # fmt: skip

every_family = pytest.mark.parametrize("name", CASES)


def _valueless(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, dict):
        return {key: _valueless(item) for key, item in x.items()}
    return type(x)(_valueless(item) for item in x) if isinstance(x, (list, tuple)) else x


def _layer_inputs(model: torch.nn.Module, case: Case, inputs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What each attention layer is called with in one forward."""
    seen: list[tuple[str, Any, Any]] = []
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: seen.append((layer, args, kwargs)), with_kwargs=True
        )
        for layer in case.layers
    ]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@every_family
def test_attention_reads_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with their masks, called as the model calls them. The grid and the noise level are given here."""
    case = CASES[name]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    layers = _layer_inputs(model, case, inputs)
    assert sorted({layer for layer, _, _ in layers}) == sorted(case.layers)
    family, grid = family_of(model), case.grid(case.shapes[0])
    known = {cls: replace(family, grid=lambda config, arguments: grid) for cls in family.classes}
    monkeypatch.setattr(families, "_FAMILIES", {**families._FAMILIES, **known})
    monkeypatch.setattr(hooks, "noise_level", lambda state, arguments: 0.5)
    enable_sparse_attention(model, mixed_plan(model))
    model._forward_hooks = type(model._forward_hooks)(  # not those of the test's own model
        (key, hook) for key, hook in model._forward_hooks.items() if key == hooks.KEY
    )
    for layer in case.layers:
        model.get_submodule(layer).to("meta")

    def forward(*args: Any, **kwargs: Any) -> None:
        for layer, given, named in layers:
            model.get_submodule(layer)(*_valueless(given), **_valueless(named))

    model.forward = forward
    with torch.no_grad():
        if name in PROCESSOR_WAITS:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                model(**inputs)
            return
        model(**inputs)
    summary = sparse_attention_summary(model).transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (len(layers) * case.calls, 0)


@every_family
def test_which_grids_are_told_by_values(name: str) -> None:
    case = CASES[name]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    grid = family_of(model).grid
    assert grid(model.config, inputs) == case.grid(case.shapes[0])
    if name in FORWARD_WAITS | GENERATION_WAITS:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            grid(model.config, _valueless(inputs))
    else:
        assert grid(model.config, _valueless(inputs)) == case.grid(case.shapes[0])
