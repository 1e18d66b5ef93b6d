"""What backends say of themselves, and backends that a user's code adds."""

from __future__ import annotations

import logging

import pytest
import torch

from diffsparse.blocks import BlockIndex
from diffsparse.grid import TokenGrid
from diffsparse.kernels import (
    BACKENDS,
    Backend,
    CallFacts,
    KernelBackend,
    available_backends,
    check,
    checks,
    dense,
    register_backend,
    sparse_attention,
)
from diffsparse.kernels.backends import candidates, find_backend, registry
from diffsparse.kernels.backends.reference.forward import run as run_reference
from diffsparse.kernels.call import AttentionCall
from diffsparse.layout import build_layout
from diffsparse.tokens import TokenLayout
from tests.kernels.cases import head, inputs, random_layout
from tests.tolerance import ATTENTION, assert_near

GRID = TokenGrid(2, 8, 8)


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    checks._log_once.cache_clear()


class Mine(KernelBackend):
    name = "mine"
    devices = ("cpu",)
    dtypes = (torch.float32,)
    head_dims = range(32, 65, 32)
    tails = ("none", "mean")

    def __init__(self) -> None:
        self.ran = 0

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        self.ran += 1
        return run_reference(call)


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_tells_what_it_takes(name: str) -> None:
    backend = find_backend(name)
    assert isinstance(backend, Backend) and backend.name == name
    assert available_backends()[name] == backend.cannot_run(None)


def test_the_best_backend_of_a_device_comes_first() -> None:
    assert [b.name for b in candidates("cpu")] == ["cpu", "reference"]
    assert [b.name for b in candidates("cuda")] == ["gluon_sm90", "triton", "reference"]
    assert [b.name for b in candidates("xpu")] == ["gluon_sm90", "triton", "reference"]


def test_a_registered_backend_runs_by_name_and_under_auto() -> None:
    backend = Mine()
    register_backend(backend)
    assert available_backends()["mine"] is None
    layout = random_layout(GRID, [head(), head(tail="mean")], 64, 0.5)
    q, k, v = inputs(GRID, 2, 32)
    want = sparse_attention(q, k, v, layout, backend="reference")
    assert torch.equal(sparse_attention(q, k, v, layout, backend="mine"), want)
    assert torch.equal(sparse_attention(q, k, v, layout), want)
    assert backend.ran == 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (CallFacts(torch.device("cpu"), torch.float64, 32), "the mine backend takes float32, got torch.float64"),
        (
            CallFacts(torch.device("cpu"), torch.float32, 48),
            "the mine backend takes head_dim 32 to 64 in multiples of 32, got 48",
        ),
        (
            CallFacts(torch.device("cpu"), torch.float32, 32, ("mean", "moments")),
            "the mine backend does not know the tail 'moments'; it has mean",
        ),
    ],
)
def test_a_backend_says_why_not(facts: CallFacts, message: str) -> None:
    assert Mine().cannot_run(facts) == message


def test_what_a_registered_backend_refuses_is_raised_or_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    backend = Mine()
    register_backend(backend)
    layout = random_layout(GRID, [head()], 64, 0.5)
    q, k, v = inputs(GRID, 1, 16)
    message = "the mine backend takes head_dim 32 to 64 in multiples of 32, got 16"
    assert check(q, k, v, layout, backend="mine") == message
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, layout, backend="mine")
    with caplog.at_level(logging.INFO, logger="diffsparse"):
        sparse_attention(q, k, v, layout)
    assert [r.getMessage() for r in caplog.records] == [f"backend mine passed over: {message}"]
    assert not backend.ran


def test_numerics_are_those_that_some_backend_has() -> None:
    class Eight(Mine):
        name = "eight"
        numerics = {"int8": (32,)}

    register_backend(Eight())
    layout = random_layout(GRID, [head()], 64, 0.5)
    q, k, v = inputs(GRID, 1, 32)
    assert check(q, k, v, layout, numerics="int8", backend="eight") is None
    assert check(q, k, v, layout, numerics="int8", backend="cpu") == (
        "numerics 'int8' needs backend='eight' or 'gluon_sm90', got 'cpu'"
    )
    assert check(q, k, v, layout, numerics="fp8", backend="eight") == (
        "numerics 'fp8' needs backend='gluon_sm90', got 'eight'"
    )
    assert checks.numerics_of("eight", 32) == ("int8",)
    assert checks.numerics_of("eight", 64) == checks.numerics_of("cpu", 32) == ()
    assert checks.possible_numerics("eight", 32, ("auto", "int8")) == ("auto", "int8")
    assert checks.possible_numerics("eight", 64, ("auto", "int8")) == ("auto",)


def test_a_backend_that_does_not_know_a_tail_is_passed_over_or_says_so() -> None:
    """The library's own tails too: it would leave out what they stand for."""
    backend = Mine()
    register_backend(backend)
    q, k, v = inputs(GRID, 2, 32)
    layout = random_layout(GRID, [head(tail="mean"), head(tail="moments")], 64, 0.5)
    message = "the mine backend does not know the tail 'moments'; it has mean"
    assert check(q, k, v, layout, backend="mine") == message
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, layout, backend="mine")
    assert torch.equal(sparse_attention(q, k, v, layout), sparse_attention(q, k, v, layout, backend="cpu"))
    assert not backend.ran


def test_a_backend_makes_the_lists_of_packed_layouts_in_its_own_way() -> None:
    made = []

    class Own(Mine):
        def lists(self, packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
            made.append(packed.is_packed)
            return super().lists(packed, tokens)

    backend = Own()
    register_backend(backend)
    entries = [head(), head(tail="mean")]
    q, k, v = inputs(GRID, 2, 32, batch=2)
    layout = build_layout(GRID, entries, 64, packed=True)
    want = sparse_attention(q, k, v, build_layout(GRID, entries, 64), backend="reference")
    assert torch.equal(sparse_attention(q, k, v, layout, backend="mine"), want)
    assert made == [True] and backend.ran == 1


def test_dense_attention_asks_registered_backends() -> None:
    class Eight(Mine):
        numerics = {"int8": (32,)}

        def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(call.numerics)
            return super().run(call)

    seen: list[str] = []
    q, k, v = inputs(GRID, 2, 32)
    assert dense.cannot_run_dense("diffsparse_int8", q) is not None
    register_backend(Eight())
    want = dense.dense_attention(q, k, v, kernel="flash_sdpa")
    for kernel in ("diffsparse", "diffsparse_int8"):
        assert dense.cannot_run_dense(kernel, q) is None
        assert_near(dense.dense_attention(q, k, v, kernel=kernel), want, ATTENTION)
    assert seen == ["auto", "int8"]
    wide = torch.empty(1, 8, 1, 64)
    assert dense.cannot_run_dense("diffsparse", wide) is None
    assert dense.cannot_run_dense("diffsparse_int8", wide) is not None


def test_what_is_no_backend_is_refused() -> None:
    class NoRun:
        name = "half"
        tails = head_dims = None
        devices = ()

    with pytest.raises(TypeError, match="NoRun is not a backend: it lacks cannot_run, lists, numerics, run"):
        register_backend(NoRun())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is a backend 'cpu' already"):
        cpu = Mine()
        cpu.name = "cpu"
        register_backend(cpu)
    for name in ("auto", "two words", ""):
        wrong = Mine()
        wrong.name = name
        with pytest.raises(ValueError, match="a backend's name is a word"):
            register_backend(wrong)
    assert tuple(available_backends()) == BACKENDS


def test_a_backend_may_take_the_place_of_another() -> None:
    mine = Mine()
    mine.name = "cpu"
    register_backend(mine, replace=True)
    layout = random_layout(GRID, [head()], 64, 0.5)
    sparse_attention(*inputs(GRID, 1, 32), layout)
    assert mine.ran == 1
