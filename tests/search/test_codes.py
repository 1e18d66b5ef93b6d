"""Scores in a byte each."""

import numpy as np
import pytest
import torch

from diffsparse.search.codes import RANGE, from_codes, to_codes


@pytest.mark.parametrize("shape", [(1, 1), (5, 7, 7), (2, 3, 11, 11)])
def test_a_score_comes_back_within_five_percent(shape):
    draw = np.random.default_rng(0)
    values = np.exp(draw.normal(0, 4, shape)).astype(np.float32)
    codes, peak = to_codes(torch.from_numpy(values))
    assert codes.dtype == np.uint8 and codes.shape == shape and peak.shape == (*shape[:-2], 1, 1)
    found = from_codes(codes, peak).numpy()
    large = values > 2 * peak / RANGE
    assert (np.abs(found - values) <= 0.05 * values)[large].all() and (found <= peak).all()
    assert np.array_equal(found.max((-2, -1)), values.max((-2, -1)))


def test_nothing_stays_nothing_and_order_is_kept():
    values = np.sort(np.geomspace(1e-30, 3.0, 400)).reshape(20, 20).astype(np.float32)
    values[0, :5] = 0.0
    found = from_codes(*to_codes(torch.from_numpy(values))).numpy()
    assert (found[0, :5] == 0).all() and (np.diff(found.ravel()) >= 0).all()
    assert not from_codes(*to_codes(torch.zeros(3, 4, 4))).any()
    assert (from_codes(*to_codes(torch.full((2, 2), -1e-9))) == 0).all()  # what rounding left below 0
