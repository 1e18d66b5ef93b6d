import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.carry import carry_mask
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, PhaseOrder, RasterOrder, TileOrder
from diffsparse.patterns import (
    Band,
    Bitmap,
    Columns,
    Diagonals,
    Empty,
    Full,
    GridStripes,
    Intersection,
    Radial,
    Sink,
    Union,
    Window,
)
from diffsparse.patterns.window import axis_neighbourhood
from tests.vocabulary.strategies import grids, orders, token_rules, windows


def tokens(pattern, grid):
    """The token-by-token mask in row-major order: blocks of one token are exact."""
    return pattern.block_mask(grid, RasterOrder(), 1)


@given(token_rules, grids, orders, st.sampled_from([4, 16, 64]))
@settings(max_examples=150, deadline=None)
def test_a_block_mask_never_drops_a_pair_that_the_token_rule_keeps(pattern, grid, order, block_size):
    blocks = order.partition(grid, block_size)
    block_of = np.empty(grid.num_visual, np.int64)
    block_of[blocks.permutation] = np.repeat(np.arange(blocks.num_blocks), blocks.lengths)
    kept = pattern.block_mask(grid, order, block_size)[block_of][:, block_of]
    assert not (tokens(pattern, grid) & ~kept).any()


@given(windows, grids, st.sampled_from([(1, 8, 8), (2, 4, 4), (1, 2, 3)]))
@settings(max_examples=80, deadline=None)
def test_windows_are_exact_on_tiles(pattern, grid, tile):
    """On boxes a product mask keeps a pair of blocks if and only if it keeps a pair of their tokens."""
    order = TileOrder(*tile)
    blocks = order.partition(grid, tile[0] * tile[1] * tile[2])
    ordered = tokens(pattern, grid)[blocks.permutation][:, blocks.permutation]
    starts = blocks.start[:-1]
    wanted = np.logical_or.reduceat(np.logical_or.reduceat(ordered, starts, 0), starts, 1)
    assert np.array_equal(pattern.block_mask(grid, order, tile[0] * tile[1] * tile[2]), wanted)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_the_clamp_gives_every_query_the_same_number_of_keys(n, window, stride):
    assert (axis_neighbourhood(n, window, stride).sum(1) == min(window, n)).all()


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5))
def test_dilated_windows_stay_in_their_residue_class(n, window, dilation):
    allowed = axis_neighbourhood(n, window, 1, dilation)
    q, k = np.nonzero(allowed)
    assert ((q - k) % dilation == 0).all()
    assert allowed.diagonal().all()


def test_a_window_as_wide_as_the_grid_is_full_and_stride_equal_to_window_is_blocked():
    grid = TokenGrid(3, 5, 7)
    assert Window((None, 5, 1.0)).block_mask(grid, RasterOrder(), 64).all()
    assert np.array_equal(axis_neighbourhood(8, 4, 4), np.kron(np.eye(2, dtype=bool), np.ones((4, 4), bool)))


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "density"),
    [(18, 0.2, 1, 0.287), (20, 0.8, 1, 0.353), (30, 0.95, 0, 0.275), (64, 0.95, 0, 0.175), (128, 0.95, 0, 0.110)],
)
def test_radial_code_rule_has_the_published_densities(frames, decay, sink, density):
    mask = Radial(decay, "code", sink).block_mask(TokenGrid(frames, 48, 80), RasterOrder(), 128)
    assert abs(mask.mean() - density) < 0.003


def test_radial_paper_rule_token_by_token():
    """Equation 5 written out on a grid small enough for a loop, with more frames than tokens per frame."""
    grid = TokenGrid(9, 1, 3)
    s, mask = 3, tokens(Radial(), grid)
    for q in range(grid.num_visual):
        for k in range(grid.num_visual):
            distance = abs(q // s - k // s)
            doubling = 2 ** int(np.floor(np.log2(max(distance, 1))))
            near = doubling <= s and abs(q % s - k % s) + 1 <= s / doubling
            site = distance % -(-doubling // s) == 0 and q % s == k % s
            assert mask[q, k] == (near or site), (q, k)


@pytest.mark.parametrize("pattern", [Radial(), Radial(0.3), Radial(0.5, sink_frames=2), Radial(0.2, "code", 1)])
@pytest.mark.parametrize("height, width", [(16, 16), (19, 23), (64, 64)])
def test_radial_on_an_image_has_rows_for_frames(pattern, height, width):
    image, video = TokenGrid(1, height, width), TokenGrid(height, 1, width)
    mask = pattern.block_mask(image, RasterOrder(), 64)
    assert np.array_equal(mask, pattern.block_mask(video, RasterOrder(), 64))
    assert pattern.rule == "code" or mask.diagonal().all()  # the published code keeps nothing of frames so small


def test_radial_thins_out_with_the_distance_of_rows():
    mask = Radial(0.5).block_mask(TokenGrid(1, 64, 64), RasterOrder(), 64)  # a block is a row
    assert mask.all()  # whole rows always touch: it pays on tiles and on more tokens
    mask = Radial(0.5).block_mask(TokenGrid(1, 256, 256), TileOrder(1, 8, 8), 64)
    assert 0.02 < mask.mean() < 0.3
    assert len(set(mask.sum(1).tolist())) > 1


def test_radial_code_rule_is_refused_off_the_raster():
    with pytest.raises(ValueError, match="raster order only"):
        Radial(rule="code").block_mask(TokenGrid(2, 16, 16), TileOrder(1, 8, 8), 64)


@pytest.mark.parametrize(
    ("window", "stride", "q_tile", "k_tile", "share"),
    [
        ((18, 24, 24), (2, 8, 8), (2, 8, 8), (2, 8, 8), 11.11),
        ((18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11),
        ((30, 40, 40), (1, 32, 8), (4, 8, 8), (2, 8, 8), 2.40),
    ],
)
def test_visited_tiles_of_strided_windows(window, stride, q_tile, k_tile, share):
    grid = TokenGrid(30, 48, 80)
    queries, keys = (TileOrder(*t).partition(grid, int(np.prod(t))) for t in (q_tile, k_tile))
    assert round(1 / Window(window, stride).pairs(queries, keys).mean(), 2) == share


@given(grids.filter(lambda g: g.num_visual > 3), st.integers(1, 12), st.integers(0, 11), st.integers(0, 11))
def test_grid_as_a_union_equals_its_permuted_block_form(grid, stride, key, query):
    """In phase order the stripes are one dense run of columns and one of rows."""
    stride = min(stride, grid.num_visual)
    key, query = key % stride, query % stride
    pattern = GridStripes(stride, (key / stride,), (query / stride,))
    permutation = PhaseOrder(stride).permutation(grid)
    ordered = tokens(pattern, grid)[permutation][:, permutation]
    lengths = [len(range(p, grid.num_visual, stride)) for p in range(stride)]
    first = np.concatenate([[0], np.cumsum(lengths)])
    wanted = np.zeros_like(ordered)
    wanted[:, first[key] : first[key + 1]] = True
    wanted[first[query] : first[query + 1]] = True
    assert np.array_equal(ordered, wanted)


def test_bands_follow_the_order():
    grid = TokenGrid(4, 4, 4)
    mask = Band(0.1).block_mask(grid, AxisOrder("HWF"), 4)
    assert mask.diagonal().all()
    assert Band(0).block_mask(grid, RasterOrder(), 4).sum() == 16
    assert Band(1).block_mask(grid, RasterOrder(), 4).all()


def test_combinations():
    grid, order = TokenGrid(3, 8, 8), TileOrder(1, 4, 4)
    a, b, c = Window((1, None, None)), Sink(1), Window((None, 2, 2))
    masks = [p.block_mask(grid, order, 16) for p in (a, b, c)]
    assert np.array_equal((a | b).block_mask(grid, order, 16), masks[0] | masks[1])
    assert np.array_equal(((a | b) & c).block_mask(grid, order, 16), (masks[0] | masks[1]) & masks[2])
    assert (a | b | c).parts == (a, b, c)
    assert str(a | b) == "window(1xallxall) | sink(1 frames)"


def test_a_bitmap_runs_exactly_on_its_grid_and_is_carried_elsewhere():
    grid, order = TokenGrid(2, 9, 9), TileOrder(1, 8, 8)
    mask = np.random.default_rng(0).random((8, 8)) < 0.4
    bitmap = Bitmap.from_mask(mask, grid, order, 64, Window((1, None, None)))
    assert np.array_equal(bitmap.mask, mask)
    assert np.array_equal(bitmap.block_mask(TokenGrid(2, 9, 9, text_after=7), order, 64), mask)
    other = TokenGrid(9, 9, 2)  # as many tokens, another shape
    assert bitmap.is_carried(other, order, 64) and not bitmap.is_carried(grid, order, 64)
    assert np.array_equal(bitmap.block_mask(other, order, 64), carry_mask(mask, grid, other, order, 64))
    # An entry in another order has blocks of another kind.
    raster = RasterOrder()
    assert np.array_equal(bitmap.block_mask(other, raster, 64), bitmap.fallback.block_mask(other, raster, 64))
    assert not bitmap.fits(grid, RasterOrder(), 64)
    with pytest.raises(ValueError, match="8 blocks"):
        Bitmap.from_mask(mask[:4], grid, order, 64)


@pytest.mark.parametrize(
    "pattern", [Full(), Empty(), Window((1, 0.5, 0.5)), Radial(), Sink(1), Band(0.1), GridStripes("frame", (0.5,))]
)
def test_patterns_draw_themselves(pattern):
    picture = pattern.preview(TokenGrid(3, 10, 12), TileOrder(1, 8, 8))
    assert picture.mode == "RGB"
    assert min(picture.size) >= 256
    colours = {c for _, c in picture.getcolors()}
    mask = pattern.block_mask(TokenGrid(3, 10, 12), TileOrder(1, 8, 8), 64)
    assert len(colours) == len(set(mask.reshape(-1).tolist()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window((0, 1, 1)),
        lambda: Window((1.5, 1, 1)),
        lambda: Window((True, 1, 1)),
        lambda: Window((1, float("nan"), 1)),
        lambda: Window(()),
        lambda: Window((1, 1)),
        lambda: Window([1, 1, 1]),
        lambda: Window((10**30, 1, 1)),
        lambda: Window((1, 1, 1), stride=(0, 1, 1)),
        lambda: Window((1, 1, 1), stride=(1, 1)),
        lambda: Window((1, 1, 1), dilation=(1.0, 1, 1)),
        lambda: Diagonals(((0, 0),)),
        lambda: Diagonals(((0, 0, 10**30),)),
        lambda: Diagonals(half_width=(0, 0)),
        lambda: Diagonals(half_width=(0, 1.5, 0)),
        lambda: Diagonals(half_width=(0, -1, 0)),
        lambda: Radial(decay=0),
        lambda: Radial(decay=float("nan")),
        lambda: Radial(rule="other"),
        lambda: Radial(min_span=64.0),
        lambda: Sink(),
        lambda: Sink(1, 5),
        lambda: Sink(1.5),
        lambda: Band(1.5),
        lambda: Band(True),
        lambda: Columns(((0.5, 0.2, 0, 1, 0, 1),)),
        lambda: Columns(((0, 1, 0, 1),)),
        lambda: Columns(None),
        lambda: GridStripes("column"),
        lambda: GridStripes(True),
        lambda: GridStripes("frame", (1.0,)),
        lambda: GridStripes("frame", 0.5),
        lambda: Union(()),
        lambda: Intersection((5,)),
        lambda: Bitmap(TokenGrid(1, 8, 8), RasterOrder(), 64.0, b"a"),
        lambda: Bitmap(TokenGrid(1, 20000, 20000), RasterOrder(), 64, b"a"),
        lambda: HeadEntry(TileOrder(1, 8, 8), Sink(1) | Radial(rule="code")),
        lambda: HeadEntry(pattern="full"),
    ],
)
def test_bad_parameters_are_refused(make):
    words = r"window|diagonals|radial|sink|band|column|grid|union|intersection|bitmap|entry"
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert len(str(caught.value)) < 200
