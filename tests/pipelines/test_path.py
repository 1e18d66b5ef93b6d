"""The way of q from diffusers' attention to a kernel and back: short, and through each module once."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from diffsparse.kernels import BACKENDS, ops
from diffsparse.pipelines import attend, patch, sparse_attention, state
from diffsparse.pipelines.context import CTX
from diffsparse.preset_plans import preset
from tests.pipelines.models import CASES, run, wan

#: Functions between the one that stands for diffusers' attention and the backend.
MOST = 10
OP = "diffsparse.kernels.ops"
Step = tuple[str, str]
COMPILED = [("wan", patch.routed_dispatch), ("hunyuan", patch.routed_dispatch), ("cogvideox", patch.routed_sdpa)]


def _module(frame: FrameType) -> str | None:
    name = frame.f_globals.get("__name__", "")
    return name if name.startswith("diffsparse.") and frame.f_code.co_filename != "<string>" else None


def _given(frame: FrameType) -> Iterator[torch.Tensor]:
    """The tensors among a function's arguments, those too that come in a tuple or as the q of a call."""
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = frame.f_locals.get(name)
        parts = value if isinstance(value, tuple) else (value, getattr(value, "q", None))
        yield from (part for part in parts if isinstance(part, torch.Tensor))


def path_of_q(model: torch.nn.Module, inputs: dict[str, Any], start: Callable[..., Any]) -> list[Step]:
    """``(module, function)`` for every function of the package that gets q, in the first call of a layer.

    From ``start``, whose first argument q is, to the function of a backend that runs the call.
    """
    found: list[Step] = []
    q: list[torch.Tensor] = []  # held, so that nothing else gets its memory

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        module, code = _module(frame), frame.f_code
        if event != "call" or module is None or (found and is_backend(found[-1])):
            return
        if code is start.__code__ and not q and (start.__module__ == OP or CTX.layer is not None):
            q.append(frame.f_locals[code.co_varnames[0]])
        if q and any(x.untyped_storage().data_ptr() == q[0].untyped_storage().data_ptr() for x in _given(frame)):
            found.append((module, code.co_name))

    sys.setprofile(watch)
    try:
        run(model, inputs)
    finally:
        sys.setprofile(None)
    return found


def is_backend(step: Step) -> bool:
    return step[0].startswith(tuple(f"diffsparse.kernels.backends.{name}" for name in BACKENDS))


def check_path(path: list[Step], *through: str, runs: bool = True) -> None:
    """That a way is short and has no way back, and ends in a backend if one ``runs``."""
    told = "\n".join(".".join(step) for step in path)
    assert is_backend(path[-1]) is runs, told
    steps = [step for step in path[1:] if not is_backend(step)]
    assert len(steps) <= MOST, told
    modules = [module for module, _ in groupby(module for module, _ in path)]
    assert len(modules) == len(set(modules)), f"a module is left and entered again:\n{told}"
    assert set(through) <= set(modules), told


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("wan", patch.routed_dispatch),
        ("hunyuan", patch.routed_dispatch),  # with a mask over keys
        ("cogvideox", patch.routed_sdpa),
        ("mochi", patch.routed_sdpa),
    ],
)
def test_q_takes_few_steps_and_no_way_back(
    name: str, start: Callable[..., Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_is_packed", lambda *args: packed)
    case = CASES[name]
    model, inputs = case.build(), case.inputs(*case.shapes[0])
    with sparse_attention(model, preset("window", tail="none")):
        run(model, inputs)  # whatever is worked out once is known from here on
        path = path_of_q(model, inputs, start)
    assert path[0] == (patch.__name__, start.__name__)
    check_path(path, "diffsparse.pipelines.policy", OP)


@pytest.mark.parametrize(("name", "start"), COMPILED)
def test_what_compiled_code_is_traced_from_is_as_short(
    name: str, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that Dynamo takes up, run as they are: it asks no profiler."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(*case.shapes[0])
    with sparse_attention(model, preset("window", tail="none")):
        run(model, inputs)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        path = path_of_q(model, inputs, start)
    assert path[:3] == [(patch.__name__, start.__name__), (attend.__name__, "attend"), (attend.__name__, "_compiled")]
    check_path(path, "diffsparse.pipelines.policy", OP)


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize(("name", "start"), COMPILED)
def test_q_takes_few_steps_in_compiled_code(name: str, start: Callable[..., Any]) -> None:
    """From the graph's call of the operator to the backend; and by the graph's own word, what led up to that call."""
    traced: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        targets = [(node, str(node.target)) for node in graph.graph.nodes]
        traced.extend(node.stack_trace or "" for node, target in targets if "diffsparse.sparse_attention" in target)
        return graph.forward

    torch._dynamo.reset()
    case = CASES[name]
    model, inputs = case.build(), case.inputs(*case.shapes[0])
    for block in {layer.rpartition(".")[0] for layer in case.layers}:
        model.get_submodule(block).compile(fullgraph=True, backend=keep)
    with sparse_attention(model, preset("window", tail="none")):
        run(model, inputs)
        path = path_of_q(model, inputs, ops.sparse_attention_op._init_fn)
    check_path(path, OP)
    torch._dynamo.reset()
    sources = re.findall(r'File ".*/(diffsparse/[\w/]+)\.py", line \d+, in (\w+)', traced[0])
    steps = [(file.replace("/", "."), function) for file, function in sources]
    assert steps[:3] == [(patch.__name__, start.__name__), (attend.__name__, "attend"), (attend.__name__, "_compiled")]
    check_path(steps, "diffsparse.kernels.api", runs=False)


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
