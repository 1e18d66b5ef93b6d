"""The repair's kernel without a GPU, and the repair as a part of the operator."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.operands import as_operands, from_operands
from diffsparse.kernels.ops import sparse_attention_op
from diffsparse.kernels.repair import mend_, no_fused_pass
from diffsparse.kernels.select import select_blocks
from diffsparse.layout import BlockLayout
from diffsparse.repair import HeadRepair
from tests.kernels.apart import check_cases, compiled
from tests.kernels.cases import MIXED, inputs, random_layout
from tests.kernels.mend import SHAPES, Shape, maps, maps_of, output
from tests.tolerance import ATTENTION, Work, assert_near

GRID = TokenGrid(2, 9, 15, text_before=5, text_after=20)


def repaired(seed: int = 0, entries: Any = MIXED) -> BlockLayout:
    layout = random_layout(GRID, entries, 64, 0.4, seed)
    return replace(layout, heads=replace(layout.heads, repair=maps(len(entries), 16, seed=seed)))


def test_interpreted(repo_root: Path) -> None:
    pytest.importorskip("triton")
    check_cases(repo_root, 2 * len(SHAPES) + 1, "tests.kernels.mend")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(repo_root: Path, capability: int) -> None:
    pytest.importorskip("triton")
    kernels = compiled(repo_root, capability, "--repair")
    assert [k["case"] for k in kernels] == ["128-1-bfloat16", "128-8-bfloat16", "128-1-float32", "128-1-float32"]
    assert not any(k["tf32"] for k in kernels)
    assert not any(k["wgmma"] or k["mma"] for k in kernels[2:]), "fp32 in the precision of fp32"
    assert not any(k.get("spill_bytes") for k in kernels)


@pytest.mark.slow(reason="LLVM makes 36 kernels a GPU")
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_in_every_form(repo_root: Path, capability: int) -> None:
    pytest.importorskip("triton")
    kernels = compiled(repo_root, capability, "--repair", "--slow")
    assert len(kernels) == 36 and not any(k["tf32"] for k in kernels)
    assert all(k.get("spill_bytes", 0) < 128 for k in kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_products(shape: Shape, dtype: torch.dtype) -> None:
    """Without a GPU: what text and heads without a map hold stays, NaN and infinities too."""
    out, repair = output(shape, dtype), maps_of(shape)
    assert "on a GPU, got cpu" in str(no_fused_pass(out))
    finite = torch.where(out.isfinite(), out, 0.0)
    found = mend_(finite.clone(), repair, shape.before, shape.visual)
    visual = slice(shape.before, shape.before + shape.visual)
    want = finite.double()
    weight, bias = (x.double().expand(shape.batch, *x.shape[-n:]) for x, n in ((repair.weight, 3), (repair.bias, 2)))
    change = torch.einsum("bshd,bhde->bshe", want, weight) + bias[:, None]
    want[:, visual] += torch.where(repair.used[:, None], change, 0.0)[:, visual]
    assert_near(found.double(), want, Work(shape.dim, sums=2, dtype=dtype))
    mend_(out, repair, shape.before, shape.visual)
    assert bool(out[:, : shape.before].isnan().all()) and bool(out[:, visual.stop :].isnan().all())
    assert math.isinf(out[0, shape.before, 1, 0]) and bool(out[:, visual].nan_to_num(posinf=0.0).isfinite().all())


def test_operands_carry_it() -> None:
    layout = repaired()
    want = layout.heads.repair
    found = from_operands(*as_operands(layout))[2].repair
    assert want is not None and found is not None
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, want.tensors))
    plain = replace(layout, heads=replace(layout.heads, repair=None))
    assert from_operands(*as_operands(plain))[2].repair is None


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse: bool) -> None:
    q, k, v = inputs(GRID, len(MIXED), 16, batch=2)
    arguments = (q, k, v, *as_operands(repaired()), None, 0.1, return_lse, "auto", "auto")
    torch.library.opcheck(sparse_attention_op, arguments)


@pytest.mark.usefixtures("poison_empty")
def test_every_item_of_a_batch_with_lists_of_its_own() -> None:
    """Outputs of items are put together before they are repaired, once."""
    q, k, v = inputs(GRID, len(MIXED), 16, batch=2)
    layout = select_blocks("pooled", q, k, repaired(), 0.3)
    assert layout.index.batch == 2 and isinstance(layout.heads.repair, HeadRepair)
    out = sparse_attention(q, k, v, layout)
    assert_near(out.double(), reference_attention(q, k, v, layout)[0], ATTENTION)


def test_compiled_code_sees_one_operator() -> None:
    """The repair is a part of it, and layers with other maps share the graph."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any) -> torch.Tensor:
        return sparse_attention(q * 2, k, v, layout) + 1

    torch._dynamo.reset()
    traced = torch.compile(layer, backend=backend, fullgraph=True)
    q, k, v = inputs(GRID, len(MIXED), 16, batch=2)
    for seed in range(4):
        layout = repaired(seed)
        assert_near(traced(q, k, v, layout), layer(q, k, v, layout), ATTENTION)
    assert len(graphs) <= 2  # one more when the number of kept blocks turned out to vary
    called = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert [name for name in called if "mul" not in name and "add" not in name and "getitem" not in name] == [
        "diffsparse.sparse_attention.default"
    ]
    torch._dynamo.reset()
