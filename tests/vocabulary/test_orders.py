import numpy as np
import pytest
from hypothesis import given, settings

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, TileOrder, parse_order
from tests.vocabulary.strategies import grids, orders


@given(grids, orders)
@settings(max_examples=80, deadline=None)
def test_orders_are_bijections_and_blocks_cover_them(grid, order):
    permutation = order.permutation(grid)
    assert sorted(permutation.tolist()) == list(range(grid.num_visual))
    for block_size in (8, 64):
        blocks = order.partition(grid, block_size)
        assert blocks.lengths.min() >= 1
        assert blocks.lengths.max() <= block_size
        assert blocks.lengths.sum() == grid.num_visual
        coords = grid.coordinates()
        for block in range(blocks.num_blocks):
            boxes = blocks.boxes[blocks.owner == block]
            inside = coords[permutation[blocks.start[block] : blocks.start[block + 1]]]
            covered = (inside[:, None] >= boxes[None, :, ::2]) & (inside[:, None] <= boxes[None, :, 1::2])
            assert covered.all(2).any(1).all()


@given(orders)
def test_order_names_round_trip(order):
    assert parse_order(str(order)) == order


def test_a_tile_of_block_size_is_one_block_even_where_the_grid_is_ragged():
    blocks = TileOrder(1, 8, 8).partition(TokenGrid(1, 45, 80), 64)
    assert blocks.num_blocks == 6 * 10
    assert sorted(set(blocks.lengths.tolist())) == [40, 64]  # 45 = 5 * 8 + 5
    assert len(blocks.boxes) == blocks.num_blocks  # every tile is a box


def test_axis_order_makes_frames_of_a_site_neighbours():
    assert AxisOrder("HWF").permutation(TokenGrid(3, 2, 2))[:3].tolist() == [0, 4, 8]
    assert AxisOrder("FHW").is_raster


def test_phase_order_is_n_mod_stride_then_n_div_stride():
    assert PhaseOrder(4).permutation(TokenGrid(1, 1, 10)).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]
    assert PhaseOrder("row").permutation(TokenGrid(1, 2, 3)).tolist() == [0, 3, 1, 4, 2, 5]


def test_curve_visits_neighbours_one_after_another_in_a_cube():
    grid = TokenGrid(4, 4, 4)
    path = grid.coordinates()[CurveOrder().permutation(grid)]
    assert (np.abs(np.diff(path, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("text", ["tile(0,8,8)", "tile(1,8)", "FFH", "phase(0)", "phase(column)", "spiral", ""])
def test_bad_orders_say_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"order|tile|phase|stride"):
        parse_order(text)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, -2, 1), (1, 1, 2.5), (1, 1, 1, -1), (True, 1, 1)])
def test_bad_grids_name_the_field(values):
    with pytest.raises(ValueError, match=r"TokenGrid\.\w+ must be an integer"):
        TokenGrid(*values)


def test_grid_reads_and_writes():
    assert TokenGrid.parse("5,32,32") == TokenGrid.parse("5x32x32") == TokenGrid(5, 32, 32)
    assert str(TokenGrid(21, 45, 80, text_after=256)) == "21x45x80+256"
    with pytest.raises(ValueError, match="T,H,W"):
        TokenGrid.parse("5,32")
