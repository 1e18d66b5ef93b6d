"""Features of diffusers beside a plan, with every transformer class: what the table of supported models says.

The oracle is the same model with the same feature, whose attention is torch's own under the plan's token masks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.pipelines import (
    architecture_of,
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.families import FAMILIES
from diffsparse.pipelines.families.tested import COMMON, features_of, more
from tests.pipelines.claims import shows
from tests.pipelines.models import CASES, Case, masked_attention, mixed_plan, run
from tests.tolerance import GENERATION, MODEL, assert_near

CLASSES = sorted(name for family in FAMILIES for name in family.classes)


@cache
def cases() -> dict[str, Case]:
    """The first case of each class."""
    found: dict[str, Case] = {}
    for case in CASES.values():
        found.setdefault(type(case.build()).__name__, case)
    return found


def _bfloat16(model: Any) -> None:
    """As ``from_pretrained`` does it: what the class wants in float32 stays so.

    But not Helios's scale of keys: it would make them float32, with which diffusers itself fails.
    """
    kept = set(model._keep_in_fp32_modules or ()) - {"history_key_scale"}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not kept & set(name.split(".")):
            value.data = value.data.bfloat16()


def _lora(model: Any) -> None:
    """On every projection of the layers that the plan is for."""
    import peft

    paths = [
        f"{layer}.{name}"
        for layer in architecture_of(model).layers
        for name, module in model.get_submodule(layer).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=paths, init_lora_weights=False))


def _fused(model: Any) -> None:
    model.fuse_qkv_projections()


def _layerwise_casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _group_offload(model: Any) -> None:
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


def _attention_backend(model: Any) -> None:
    model.set_attention_backend("_native_math")


def _pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


# Each switches the feature on and returns the model, where it is another one. Compiling is in test_compile.py.
FEATURES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": _bfloat16,
    "LoRA": _lora,
    "fused projections": _fused,
    "layerwise casting": _layerwise_casting,
    "group offload": _group_offload,
    "attention backend": _attention_backend,
    "pickle": _pickle,
}


def test_every_common_feature_is_here() -> None:
    assert {*FEATURES, "compiled blocks"} == set(COMMON)


def _low(value: Any) -> Any:
    """The same inputs in bfloat16."""
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _low(item) for key, item in value.items()}
    return type(value)(_low(item) for item in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("feature", FEATURES)
def test_beside(feature: str, name: str, native_afterwards: None) -> None:
    case, switch_on = cases()[name], FEATURES[feature]
    inputs = case.inputs(*case.shapes[0])
    if feature == "bfloat16":
        inputs = _low(inputs)
    model = case.build()
    plan = mixed_plan(model)
    if feature not in features_of(name):
        with pytest.raises((AttributeError, RuntimeError, ValueError)):  # diffusers', without a plan
            run(switch_on(model) or model, inputs)
        return
    model = switch_on(model) or model
    dense = run(model, inputs)
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    for first in ("feature", "plan"):
        model = case.build()
        if first == "plan":
            enable_sparse_attention(model, plan)
        model = switch_on(model) or model
        if first == "feature":
            enable_sparse_attention(model, plan)
        _check_close(run(model, inputs), expected, dense)
        summary = sparse_attention_summary(model).transformers["transformer"]
        assert (summary.sparse_calls, summary.dense_calls) == (len(case.layers) * case.calls, 0)
        disable_sparse_attention(model)
        assert torch.equal(run(model, inputs), dense)


def _check_close(found: torch.Tensor, expected: torch.Tensor, dense: torch.Tensor) -> None:
    if found.dtype == torch.float32:
        assert_near(found, expected, GENERATION)
    else:  # rounded in other places, so near it as a whole
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()
    assert not torch.equal(expected, dense)


@shows("first block cache", *[name for name in CLASSES if "first block cache" in more(name)])
@pytest.mark.parametrize("name", CLASSES)
def test_first_block_cache(name: str) -> None:
    """Of two forwards the second one leaves out what comes after the first block."""
    from diffusers import FirstBlockCacheConfig

    case = cases()[name]
    inputs = case.inputs(*case.shapes[0])

    def twice(model: Any) -> torch.Tensor:
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        with model.cache_context("cond"):
            return torch.stack([run(model, inputs), run(model, inputs)])

    if "first block cache" not in more(name):
        with pytest.raises((AttributeError, IndexError, TypeError, ValueError)):  # diffusers', without a plan
            twice(case.build())
        return
    model = case.build()
    plan = mixed_plan(model)
    with tap_attention(model, masked_attention(plan)):
        expected = twice(model)
    model = case.build()
    enable_sparse_attention(model, plan)
    assert_near(twice(model), expected, GENERATION)
    layers = sparse_attention_summary(model).transformers["transformer"].layers
    assert [layer.dense_calls for layer in layers] == [0] * len(layers)
    calls = [layer.sparse_calls for layer in layers]
    assert calls[0] == max(calls) == 2 * case.calls and min(calls) == case.calls
    model.disable_cache()
    assert_near(run(model, inputs), expected[0], GENERATION)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_files_are_unchanged_and_loaded_again_is_dense(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    model, inputs = case.build(), case.inputs(*case.shapes[0])
    dense = run(model, inputs)
    model.save_pretrained(tmp_path / "before")
    enable_sparse_attention(model, mixed_plan(model))
    run(model, inputs)
    model.save_pretrained(tmp_path / "after")
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in ("before", "after")
    )
    assert before == after
    loaded = type(model).from_pretrained(tmp_path / "after").eval()
    assert not sparse_attention_summary(loaded).enabled
    disable_sparse_attention(model)
    for hook in model._forward_hooks.values():  # the test model's own
        loaded.register_forward_hook(hook)
    # Not bitwise: weights lie at other addresses, and some of torch's kernels take other paths by alignment.
    assert_near(run(loaded, inputs), dense, MODEL)
