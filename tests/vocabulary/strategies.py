"""Hypothesis strategies for grids, orders (ragged ones included) and patterns."""

from hypothesis import strategies as st

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder
from diffsparse.patterns import Columns, Diagonals, Empty, Full, GridStripes, Radial, Sink, Window

grids = st.builds(TokenGrid, st.integers(1, 6), st.integers(1, 13), st.integers(1, 13))
text_grids = st.builds(
    TokenGrid, st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 70), st.integers(0, 70)
)
sides = st.integers(1, 9)
orders = st.one_of(
    st.just(RasterOrder()),
    st.sampled_from(["FHW", "FWH", "HWF", "HFW", "WHF", "WFH"]).map(AxisOrder),
    st.builds(TileOrder, sides, sides, sides),
    st.just(TileOrder(1, 8, 8)),
    st.builds(PhaseOrder, st.one_of(st.integers(1, 40), st.sampled_from(["frame", "row"]))),
    st.just(CurveOrder()),
)

extents = st.one_of(st.none(), st.integers(1, 9), st.floats(0.05, 1.0))
windows = st.builds(
    Window,
    st.tuples(extents, extents, extents),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
)
diagonals = st.builds(
    Diagonals,
    st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=3).map(tuple),
    st.tuples(*[st.one_of(st.none(), st.integers(0, 3), st.floats(0, 1))] * 3),
)
stripes = st.builds(
    GridStripes,
    st.one_of(st.integers(1, 20), st.sampled_from(["frame", "row"])),
    st.lists(st.floats(0, 0.99), max_size=2).map(tuple),
    st.lists(st.floats(0, 0.99), max_size=2).map(tuple),
)
#: Patterns whose mask of tokens is known.
token_rules = st.one_of(
    st.just(Full()),
    st.just(Empty()),
    windows,
    diagonals,
    stripes,
    st.builds(Radial, st.floats(0.05, 1)),
    st.builds(Sink, st.integers(1, 3)),
    st.builds(Sink, st.just(0), st.integers(1, 50)),
    st.just(Columns(((0.0, 0.5, 0.25, 0.5, 0.0, 1.0), (0.0, 1.0, 0.9, 1.0, 0.9, 1.0)))),
)
