"""One policy: what is told of a layer before it runs is what runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.break_even import work_of
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, CurveOrder, RasterOrder, TileOrder
from diffsparse.patterns import Band, Empty, Full, Radial, Window
from diffsparse.pipelines import policy
from diffsparse.pipelines.policy import Machine, judge_arguments, judge_call, judge_layer, machine_for, misfit
from diffsparse.preset_plans import preset
from diffsparse.work import head_work
from tests.helpers import break_even

GRIDS = [TokenGrid(3, 12, 12), TokenGrid(1, 13, 21), TokenGrid(2, 9, 10, text_before=70, text_after=5)]
NEAR = Window((1, 0.4, None))
ENTRIES = [
    HeadEntry(TileOrder(1, 8, 8), NEAR, execution=Execution(tail="moments")),
    HeadEntry(AxisOrder("WHF"), Band(0.1), execution=Execution(numerics="int8")),
    HeadEntry(CurveOrder(), Radial(), execution=Execution(tail="mean", numerics="fp8")),
    HeadEntry(RasterOrder(), Full(), execution=Execution(tail="centroids")),
    HeadEntry(RasterOrder(), Empty(), execution=Execution(tail="centroids")),
    HeadEntry(TileOrder(1, 8, 8), NEAR, execution=Execution("skip")),
]


table = partial(break_even.table, device="a device", heads=4, head_dim=64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_work_is_the_same_from_entries_and_from_block_lists(grid: TokenGrid, block_size: int, packed: bool) -> None:
    built = work_of(build_layout(grid, ENTRIES, block_size, packed=packed))
    told = [head_work(entry, grid, block_size) for entry in ENTRIES]
    for one, other in zip(built, told, strict=True):
        assert one.density == pytest.approx(other.density, abs=1e-12)
        assert one.blocks == pytest.approx(other.blocks, abs=1e-12)
        assert (one.tail, one.gathered, one.skipped, one.numerics) == (
            other.tail, other.gathered, other.skipped, other.numerics,
        )  # fmt: skip
    machine = Machine("cpu", None, table(0.3, 1.4))
    assert judge_layer(built, grid.seq_len, machine).time == pytest.approx(
        judge_layer(told, grid.seq_len, machine).time
    )


def test_a_layers_verdict() -> None:
    grid = TokenGrid(3, 12, 12)
    sparse = [head_work(ENTRIES[0], grid, 64)]
    full = [head_work(HeadEntry(pattern=Band(1.0), execution=Execution(numerics="int8")), grid, 64)]
    plain = Machine("cpu", None, None)
    found = judge_layer(sparse, grid.seq_len, plain)
    assert (found.reason, found.time) == (None, None) and found.density == pytest.approx(sparse[0].density)
    assert judge_layer(full, grid.seq_len, plain).reason == policy.FULL
    assert judge_layer(full, grid.seq_len, Machine("gluon_sm90", None, None, ("int8",))).reason is None
    assert judge_layer(full, grid.seq_len, Machine("gluon_sm90", None, None, ("fp8",))).reason == policy.FULL
    slow = judge_layer(sparse, grid.seq_len, Machine("cpu", None, table(1.1, 1.2)))
    assert (slow.reason, slow.density, slow.time) == (policy.SLOWER, 1.0, 1.0)
    fast = judge_layer(sparse, grid.seq_len, Machine("cpu", None, table(0.3, 0.9)))
    assert fast.reason is None and fast.time is not None and 0.3 <= fast.time < 0.9
    nothing = judge_layer(sparse, grid.seq_len, Machine("reference", "no kernel", table(0.3, 0.9)))
    assert nothing.reason == "no kernel"


def test_the_plans_word_comes_before_any_grid() -> None:
    plan = preset("window", dense_layers=("first",))
    assert policy.entries_of(plan, None, "second", 3) == policy.OUTSIDE
    assert policy.entries_of(plan, 0, "first", 3) == policy.NOT_IN_PLAN
    assert policy.entries_of(preset("dense"), 0, "second", 3) == policy.DENSE_ENTRIES
    assert policy.entries_of(plan, 0, "second", 3) == plan.entries * 3


def test_a_machine_is_asked_about_under_auto_alone() -> None:
    cpu = torch.device("cpu")
    assert machine_for("auto", cpu, torch.float32, 64).kernel == "cpu"
    assert machine_for("auto", cpu, torch.float32, 64).without_kernel is None
    assert "got torch.float64" in str(machine_for("auto", cpu, torch.float64, 64).without_kernel)
    by_name = machine_for("reference", cpu, torch.float64, 64)
    assert (by_name.kernel, by_name.without_kernel, by_name.table) == ("reference", None, None)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        machine_for("cpu", cpu, torch.float64, 64)


def test_a_call() -> None:
    grid = TokenGrid(3, 12, 12)
    layout = build_layout(grid, [HeadEntry(pattern=NEAR)] * 2, 64)
    q = torch.randn(2, grid.seq_len, 2, 16)
    assert judge_call(q, q, q, None, True) == (None, None)
    assert judge_arguments(0.0, False) is None and judge_arguments(0.1, False) == policy.DROPOUT
    assert judge_arguments(0.1, True, {}, "a mesh") == policy.PARALLEL
    assert judge_call(q, q[:, :, :1], q[:, :, :1], None, True)[0] == policy.GROUPED
    assert judge_call(q, q[:1], q[:1], None, True)[0] == policy.SHAPES
    assert judge_call(q.clone().requires_grad_(), q, q, None, True)[0] == policy.GRADIENTS
    with torch.no_grad():
        assert judge_call(q.clone().requires_grad_(), q, q, None, True)[0] is None
    keys = torch.ones(2, grid.seq_len, dtype=torch.bool)
    assert judge_call(q, q, q, keys, False)[0] == judge_call(q, q, q, keys.float(), True)[0] == policy.OTHER_MASK
    reason, key_mask = judge_call(q, q, q, keys, True)
    assert reason is None and key_mask is not None and key_mask.shape == keys.shape
    assert misfit(layout, q, q, q, None) is None
    assert misfit(layout, q, q, q, keys) == policy.MASKED_VIDEO
    half, one = q[:, : grid.seq_len // 2], q[:, :, :1]
    assert misfit(layout, half, half, half, None) == policy.OTHER_TOKENS
    assert misfit(layout, one, one, one, None) == policy.OTHER_HEADS
    assert policy.told(policy.OTHER_TOKENS, layout, 216, 2) == "216 tokens, the grid 3x12x12 has 432"
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert "must be contiguous" in str(misfit(layout, q, turned, q, None))
