"""The way of q from diffusers' attention to a kernel and back: short, and through each module once."""

from __future__ import annotations

import importlib
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from diffsparse.pipelines import patch, sparse_attention
from diffsparse.presets import preset
from tests.pipelines.models import hunyuan, hunyuan_inputs, run, wan, wan_inputs

#: Functions between the one that stands for ``dispatch_attention_fn`` and the backend.
MOST = 10


def _module(frame: FrameType) -> str | None:
    name = frame.f_globals.get("__name__", "")
    return name if name.startswith("diffsparse.") and frame.f_code.co_filename != "<string>" else None


def path_of_q(model: torch.nn.Module, inputs: dict[str, Any]) -> list[tuple[str, str]]:
    """``(module, function)`` for every function of the package that gets q, in one call of a layer."""
    found: list[tuple[str, str]] = []
    start: list[int] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        module, code = _module(frame), frame.f_code
        if event != "call" or module is None:
            return
        if code is patch.routed_dispatch.__code__ and not start:
            start.append(frame.f_locals["query"].untyped_storage().data_ptr())
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names]
        if start and any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == start[0] for x in given):
            found.append((module, code.co_name))

    sys.setprofile(watch)
    try:
        run(model, inputs)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_q_takes_few_steps_and_no_way_back(masked: bool) -> None:
    model, inputs = (hunyuan(), hunyuan_inputs(3, 7, 9)) if masked else (wan(layers=1), wan_inputs(3, 7, 9))
    plan = preset("window", tail="none")
    with sparse_attention(model, plan):
        run(model, inputs)  # whatever is worked out once is known from here on
        path = path_of_q(model, inputs)
    assert path[0] == ("diffsparse.pipelines.patch", "routed_dispatch")
    again = path.index(path[0], 1) if path[0] in path[1:] else len(path)  # the next layer
    steps = [step for step in path[1:again] if not step[0].startswith("diffsparse.kernels.backends.")]
    told = "\n".join(".".join(step) for step in path[:again])
    assert len(steps) <= MOST, told
    modules = [module for module, _ in groupby(module for module, _ in path[:again])]
    assert len(modules) == len(set(modules)), f"a module is left and entered again:\n{told}"
    assert {"diffsparse.pipelines.policy", "diffsparse.kernels.ops"} <= set(modules), told


def test_a_module_of_diffusers_that_is_loaded_later_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may get a processor from one while a plan is attached to it, or in the middle of a run."""
    package = importlib.import_module("diffusers.models.transformers")
    (tmp_path / "transformer_later.py").write_text(
        "import torch.nn.functional as F\nfrom ..attention_dispatch import dispatch_attention_fn\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    name = f"{package.__name__}.transformer_later"
    with sparse_attention(wan(layers=1), "window"):
        later: Any = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    assert later.dispatch_attention_fn is patch.routed_dispatch
    assert later.F.scaled_dot_product_attention is patch.routed_sdpa
    assert torch.nn.functional.scaled_dot_product_attention is not patch.routed_sdpa
    assert not type(later.__spec__.loader).__module__.startswith("diffsparse")  # it is its own loader's again
