"""Hypothesis strategies for grids and orders, ragged ones included."""

from hypothesis import strategies as st

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder

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
