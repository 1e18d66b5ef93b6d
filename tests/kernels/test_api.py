"""The public call: what it refuses, how it chooses, and how torch sees it."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import available_backends, check, checks, sparse_attention
from diffsparse.kernels.backends.installed import not_installed
from diffsparse.kernels.call import make_call
from diffsparse.kernels.operands import as_operands
from diffsparse.kernels.ops import sparse_attention_op
from tests.kernels.cases import MIXED, head, inputs, random_layout
from tests.tolerance import ATTENTION, assert_near

GRID = TokenGrid(2, 8, 9, text_after=10)
LAYOUT = random_layout(GRID, MIXED, 64, 0.4)
HEADS = len(MIXED)


def good() -> dict[str, Any]:
    q, k, v = inputs(GRID, HEADS, 32)
    return dict(q=q, k=k, v=v, layout=LAYOUT)


def replace_numerics(entry: HeadEntry) -> HeadEntry:
    if entry.execution.tail == "moments":
        return entry
    return replace(entry, execution=replace(entry.execution, numerics="int8"))


def odd_lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED = {
    "rank": (lambda a: dict(q=a["q"][0]), r"q must be \[batch, seq, heads, head_dim\]"),
    "shapes": (lambda a: dict(k=a["k"][:, :-1]), "one shape"),
    "dtypes": (lambda a: dict(v=a["v"].double()), "one dtype"),
    "integers": (lambda a: {n: a[n].long() for n in "qkv"}, "floating point"),
    "devices": (lambda a: dict(k=a["k"].to("meta")), "one device"),
    "strides": (lambda a: dict(q=a["q"].transpose(2, 3).contiguous().transpose(2, 3)), "last axis of q"),
    "length": (lambda a: {n: a[n][:, :-1] for n in "qkv"}, "153 tokens, the layout is for 154"),
    "heads": (lambda a: {n: a[n][:, :, :-1] for n in "qkv"}, "8 heads, the layout has 9"),
    "scale": (lambda a: dict(scale=-1.0), "scale must be positive"),
    "kv_len dtype": (lambda a: dict(kv_len=torch.ones(1)), "int32"),
    "kv_len shape": (lambda a: dict(kv_len=odd_lengths(1, 2)), r"\[1\] or \[1, 154\]; got"),
    "kv_len too long": (lambda a: dict(kv_len=odd_lengths(155)), "goes up to 155"),
    "kv_len masks video": (lambda a: dict(kv_len=odd_lengths(100)), "only text"),
    "mask masks video": (lambda a: dict(kv_len=torch.zeros(1, 154, dtype=torch.bool)), "only text"),
    "numerics": (lambda a: dict(numerics="fp8"), "numerics 'fp8' needs backend='gluon_sm90', got 'auto'"),
    "backend": (
        lambda a: dict(backend="cudnn"),
        "unknown backend 'cudnn'; allowed: auto, gluon_sm90, triton, cpu, reference",
    ),
    "triton on a CPU": (lambda a: dict(backend="triton"), "runs tensors on a GPU"),
    "fp64": (lambda a: {n: a[n].double() for n in "qkv"} | dict(backend="cpu"), "float32, float16 or bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_clear_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if case == "triton on a CPU" and not_installed():
        pytest.skip("triton is not installed")
    change, message = REFUSED[case]
    arguments = good()
    arguments |= change(arguments)
    with pytest.raises(ValueError, match=message) as caught:
        sparse_attention(**arguments)
    assert "\n" not in str(caught.value)
    # One function answers both "may I?" and "why not?".
    assert check(**arguments) == str(caught.value)


def test_check_passes_what_runs() -> None:
    assert check(**good(), raise_error=True) is None


def test_auto_passes_a_backend_over_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    checks._log_once.cache_clear()
    arguments = good()
    doubles = arguments | {n: arguments[n].double() for n in "qkv"}
    with caplog.at_level(logging.INFO, logger="diffsparse.kernels.checks"):
        for _ in range(3):
            assert sparse_attention(**doubles).dtype == torch.float64
    assert [r.getMessage() for r in caplog.records] == [
        "backend cpu passed over: the cpu backend takes float32, float16 or bfloat16, got torch.float64"
    ]


def test_available_backends() -> None:
    backends = available_backends()
    assert backends["cpu"] is None and backends["reference"] is None
    if not torch.cuda.is_available():
        assert backends["triton"]


def test_heads_in_8_bits_run_in_16_where_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    checks._log_once.cache_clear()
    a = good()
    a["layout"] = random_layout(GRID, [replace_numerics(e) for e in MIXED], 64, 0.4)
    assert a["layout"].heads.numerics == ("auto", "int8")
    with caplog.at_level(logging.INFO, "diffsparse"):
        for _ in range(2):
            assert torch.equal(sparse_attention(**a), sparse_attention(**good() | {n: a[n] for n in "qkv"}))
    told = [r.getMessage() for r in caplog.records if "8 bits" in r.getMessage()]
    assert told == ["heads with numerics int8 run in 16 bits or more: the backend cpu has no 8 bits"]


def test_which_heads_run_in_what() -> None:
    q, k, v = inputs(GRID, HEADS, 64)
    mixed = random_layout(GRID, [replace_numerics(e) for e in MIXED], 64, 0.4)
    assert make_call(q, k, v, mixed).kinds == ("auto", "int8")
    own = [int(e.execution.tail != "moments") for e in MIXED]
    assert make_call(q, k, v, mixed).head_kinds().tolist() == own
    # Asked for by the call: all heads but those that cannot.
    assert make_call(q, k, v, LAYOUT, numerics="fp8").kinds == ("auto", "fp8")
    assert make_call(q, k, v, LAYOUT, numerics="fp8").head_kinds().tolist() == [2 * kind for kind in own]
    plain = make_call(q, k, v, random_layout(GRID, [head()] * HEADS, 64, 0.4), numerics="int8")
    assert plain.kinds == ("int8",) and plain.head_kinds().tolist() == [1] * HEADS
    # A backend without 8 bits, or a head_dim that has none.
    assert checks.possible_numerics("gluon_sm90", 64, ("auto", "int8")) == ("auto", "int8")
    for backend, dim in (("triton", 64), ("gluon_sm90", 96)):
        assert checks.possible_numerics(backend, dim, ("int8",)) == ("auto",)


def test_import_loads_no_triton() -> None:
    code = "import sys, diffsparse.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(return_lse: bool, masked: bool) -> None:
    a = good()
    kv_len = odd_lengths(150) if masked else None
    arguments = (a["q"], a["k"], a["v"], *as_operands(LAYOUT), kv_len, 0.1, return_lse, "auto", "auto")
    torch.library.opcheck(sparse_attention_op, arguments)


def test_backward_says_that_there_is_none() -> None:
    a = good()
    a["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward"):
        sparse_attention(**a).sum().backward()


def test_compiled_code_sees_one_operator() -> None:
    """No graph break, and layers with other lists, tails and orders share one graph."""
    graphs = []

    def backend(module: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any) -> torch.Tensor:
        return sparse_attention(q * 2, k, v, layout) + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    a = good()
    out = compiled(a["q"], a["k"], a["v"], LAYOUT)
    assert_near(out, layer(a["q"], a["k"], a["v"], LAYOUT), ATTENTION)
    calls = [n for n in graphs[0].graph.nodes if "sparse_attention" in str(n.target)]
    assert len(calls) == 1
    for seed in range(1, 5):
        layout = random_layout(GRID, MIXED[::-1] if seed % 2 else MIXED, 64, 0.3, seed)
        assert_near(compiled(a["q"], a["k"], a["v"], layout), layer(a["q"], a["k"], a["v"], layout), ATTENTION)
    # The first layer, and one more when the number of kept blocks turned out to vary.
    assert len(graphs) <= 2
