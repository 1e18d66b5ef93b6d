"""Dense attention by name, and the race between what is there."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffsparse.grid import TokenGrid
from diffsparse.kernels import dense
from diffsparse.kernels.dense import DENSE_KERNELS, OWN_WAY, cannot_run_dense, dense_attention, dense_heads_, race_dense
from tests.kernels.cases import inputs
from tests.tolerance import ATTENTION, assert_near

GRID = TokenGrid(3, 7, 9)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(
    "kernel", [name for name in DENSE_KERNELS if cannot_run_dense(name, torch.empty(1, 1, 1, 16)) is None]
)
def test_every_kernel_that_runs_here_is_attention(kernel: str) -> None:
    q, k, v = inputs(GRID, 3, 16, batch=2)
    out = dense_attention(q, k, v, kernel=kernel)
    assert out.shape == q.shape and out.is_contiguous()
    assert_near(out.double(), exact(q, k, v), ATTENTION)
    half = dense_attention(q, k, v, kernel=kernel, scale=0.5)
    assert_near(half.double(), exact(0.5 * 4 * q, k, v), ATTENTION)


def test_keys_that_are_masked_out() -> None:
    q, k, v = inputs(GRID, 3, 16, batch=2)
    mask = torch.ones(2, GRID.seq_len, dtype=torch.bool)
    mask[1, 150:] = False
    out = dense_attention(q, k, v, kernel="flash_sdpa", key_mask=mask)
    assert_near(out.double(), exact(q, k, v, mask[:, None, None]), ATTENTION)
    with pytest.raises(ValueError, match="dense attention by diffsparse: it masks text tokens only"):
        dense_attention(q, k, v, kernel="diffsparse", key_mask=mask)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("cudnn_sdpa", "it runs on a GPU, q is on cpu"),
        ("flash_attention_4", "not installed"),
        ("diffsparse_int8", "gluon_sm90 backend runs tensors on a Hopper GPU, got cpu"),
        ("fastest", "unknown dense kernel 'fastest'; there are cudnn_sdpa"),
    ],
)
def test_what_cannot_run_says_why(kernel: str, reason: str) -> None:
    q, k, v = inputs(GRID, 1, 16)
    if kernel in DENSE_KERNELS and cannot_run_dense(kernel, q) is None:
        pytest.skip(f"{kernel} can run on this machine, so there is no reason to be told")
    with pytest.raises(ValueError, match=reason):
        dense_attention(q, k, v, kernel=kernel)


def test_the_operator_is_well_formed() -> None:
    q, k, v = inputs(GRID, 2, 16)
    torch.library.opcheck(dense._dense_op, (q, k, v, None, 0.25, "flash_sdpa"))


def test_a_race_names_the_fastest_and_every_other() -> None:
    q, k, v = inputs(GRID, 3, 16)
    race = race_dense(q, k, v, own=lambda: exact(q, k, v).float(), budget_ms=1)
    assert race.fastest == min(race.ms, key=lambda name: race.ms[name])
    assert {"flash_sdpa", "diffsparse", OWN_WAY} <= set(race.ms)
    assert set(race.ms) | set(race.excluded) == {*DENSE_KERNELS, OWN_WAY}
    assert race.excluded["cudnn_sdpa"] == "it runs on a GPU, q is on cpu" and str(race).startswith(race.fastest)


def test_a_kernel_that_is_wrong_or_fails_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(GRID, 3, 16)
    real = dense._sdpa

    def wrong(*args: Any) -> torch.Tensor:
        return real(*args) * 1.1

    monkeypatch.setattr(dense, "_sdpa", wrong)
    race = race_dense(q, k, v, kernels=("flash_sdpa", "diffsparse"), budget_ms=1)
    assert race.fastest == "diffsparse" and race.excluded["flash_sdpa"].startswith("its output is off by 0.1 ")

    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor it")

    monkeypatch.setattr(dense, "_sdpa", fails)
    with pytest.raises(RuntimeError, match="no dense attention runs here: flash_sdpa: RuntimeError: no kernel"):
        race_dense(q, k, v, kernels=("flash_sdpa",), budget_ms=1)


@pytest.mark.parametrize(("off", "taken"), [(0.019, True), (0.03, False)])
def test_every_kernel_that_races_is_held_to_the_same_limit(
    off: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(GRID, 3, 16)
    real = dense.sparse_attention
    monkeypatch.setattr(dense, "sparse_attention", lambda *args, **options: real(*args, **options) * (1 + off))
    race = race_dense(q, k, v, kernels=("flash_sdpa", "diffsparse"), budget_ms=1)
    assert ("diffsparse" in race.ms) is taken
    assert taken or race.excluded["diffsparse"] == f"its output is off by {off:.2g} (relative), at most 0.02 is taken"


def test_kernels_in_8_bits_run_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(GRID, 3, 16)
    monkeypatch.setattr(dense, "cannot_run_dense", lambda *args: None)  # as on a Hopper GPU
    race = race_dense(q, k, v, kernels=("flash_sdpa", "diffsparse_int8", "diffsparse_fp8"), budget_ms=1)
    assert set(race.ms) == {"flash_sdpa"}
    for name in ("diffsparse_int8", "diffsparse_fp8"):
        assert race.excluded[name].startswith("it multiplies in 8 bits")


@pytest.mark.parametrize("kernel", ["flash_attention_3", "flash_attention_4", "xformers"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_other_packages_get_what_they_take(kernel: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels need a GPU; what is tried here is the call, on stand-ins: ``[B, S, H, D]``, and the scale."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: float) -> Any:
        ((name, scale),) = options.items()
        assert name == ("scale" if kernel == "xformers" else "softmax_scale")
        out = exact(q * scale * q.shape[3] ** 0.5, k, v).float()
        return (out, None) if with_lse and kernel != "xformers" else out

    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "xformers", "xformers.ops"):
        module = ModuleType(name)
        module.flash_attn_func = module.memory_efficient_attention = attend  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v = inputs(GRID, 2, 16)
    out = dense._PACKAGE_CALLS[kernel](q, k, v, 0.5)
    assert_near(out.double(), exact(2 * q, k, v), ATTENTION)


@pytest.mark.parametrize("chosen", [(), (1,), (0, 2)])
def test_some_heads_are_overwritten(chosen: tuple[int, ...]) -> None:
    q, k, v = inputs(GRID, 3, 16, batch=2)
    heads = torch.tensor([h in chosen for h in range(3)])
    out = torch.zeros_like(q)
    dense_heads_(out, q, k, v, heads, kernel="flash_sdpa")
    want = exact(q, k, v) * heads[:, None]
    assert_near(out.double(), want, ATTENTION)
    torch.library.opcheck(dense._dense_heads_op, (out, q, k, v, heads, None, 0.25, "flash_sdpa"))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_the_race_on_a_gpu(masked: bool) -> None:
    q, k, v = inputs(TokenGrid(4, 24, 30), 4, 128, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(q.shape[:2], dtype=torch.bool, device="cuda") if masked else None
    race = race_dense(q, k, v, key_mask=mask, budget_ms=5)
    assert race.fastest in race.ms and "efficient_sdpa" in race.ms, race.excluded
    wrong = {name: why for name, why in race.excluded.items() if "is off by" in why}
    assert not wrong
    heads = torch.tensor([True, False, False, True])
    out = torch.zeros_like(q)
    dense_heads_(out, q, k, v, heads, kernel=race.fastest, key_mask=mask)
    want = exact(q, k, v) * heads.cuda()[:, None]
    assert float((out.double() - want).norm() / want.norm()) < 2e-2
