"""Distances between clips, and the detector of broken ones."""

from __future__ import annotations

import math

import pytest
import torch

from diffsparse.search import metrics
from diffsparse.search.statistics import mean_of


def clip(frames: int = 5, size: int = 16) -> torch.Tensor:
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_psnr_of_a_known_error() -> None:
    a = torch.full((2, 3, 8, 8), 0.5)
    assert metrics.psnr(a + 0.1, a) == pytest.approx(20.0, abs=1e-4)
    assert metrics.psnr(a, a) == metrics.MAX_PSNR
    assert metrics.psnr(a + 1e-9, a) == metrics.MAX_PSNR


def test_psnr_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a = clip()
    b = (a + 0.05 * torch.randn(a.shape)).clamp(0, 1)
    assert metrics.psnr(b, a) == pytest.approx(float(peak_signal_noise_ratio(b, a, data_range=1.0)), abs=1e-3)


def test_psnr_of_frames() -> None:
    a = torch.full((2, 3, 8, 8), 0.5)
    b = a.clone()
    b[1] += 0.1
    assert metrics.frame_psnr(b, a) == [metrics.MAX_PSNR, pytest.approx(20.0, abs=1e-4)]


def test_not_a_number_shows() -> None:
    a = clip()
    b = a.clone()
    b[0, 0, 0, 0] = math.nan
    assert math.isnan(metrics.psnr(b, a))


def test_clips_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(clip(5), clip(4))
    with pytest.raises(ValueError, match="frames, channels"):
        metrics.ssim(clip()[0], clip()[0])


def test_ssim() -> None:
    a = clip()
    assert metrics.ssim(a, a) == pytest.approx(1.0, abs=1e-5)
    noisy = metrics.ssim((a + 0.3 * torch.randn(a.shape)).clamp(0, 1), a)
    assert noisy is not None and noisy < 0.9
    assert metrics.ssim(clip(size=8), clip(size=8)) is None  # smaller than its window


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (1, 3, 11, 29), (2, 1, 37, 12)])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_ssim_is_that_of_torchmetrics(shape: tuple[int, ...], noise: float) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    random = torch.Generator().manual_seed(1)
    a = torch.rand(shape, generator=random, dtype=torch.float64)
    b = (a + noise * torch.randn(shape, generator=random, dtype=torch.float64)).clamp(0, 1)
    wanted = float(torch.stack([theirs(x[None], y[None], data_range=1.0) for x, y in zip(b, a, strict=True)]).mean())
    # They sum 121 rounded weights in one pass, we two times 11.
    assert metrics.ssim(b, a) == pytest.approx(wanted, abs=11**2 * float(torch.finfo(torch.float32).eps))
    if not noise:
        assert metrics.ssim(b, a) == 1.0


def test_ssim_is_not_a_number_where_a_pixel_is_none() -> None:
    a = clip()
    b = a.clone()
    b[0, 0, 8, 8] = math.nan
    assert math.isnan(metrics.ssim(b, a) or 0.0)


def broken(kind: str) -> torch.Tensor:
    good = clip()
    if kind == "nan":
        good[2, 1, 3, 3] = math.inf
    elif kind == "black":
        good *= 0.005
    elif kind == "flat":
        good = torch.linspace(0.2, 0.9, 5)[:, None, None, None].expand_as(good).clone()
    elif kind == "frozen":
        good = good[:1].expand_as(good).clone()
    return good


@pytest.mark.parametrize("kind", ["nan", "black", "flat", "frozen"])
def test_broken_clips_are_named(kind: str) -> None:
    assert metrics.find_defects(broken(kind)) == [kind]


def test_good_clips_pass() -> None:
    assert metrics.find_defects(clip()) == []
    assert metrics.find_defects(clip(frames=1)) == []  # an image cannot be frozen
    dark = clip() * 0.05
    assert metrics.find_defects(dark) == []  # a night scene


def test_frozen_beside_its_twin() -> None:
    still = clip()[:1] + 0.001 * torch.rand(5, 3, 16, 16)
    assert metrics.find_defects(still) == []
    assert metrics.find_defects(still, still) == []
    assert metrics.find_defects(still, clip()) == ["frozen"]


def test_means_have_a_t_interval() -> None:
    mean = mean_of([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, None, math.nan])
    assert mean is not None and mean.n == 6 and mean.mean == 2.0
    # 2.5706 is the 97.5% quantile of t with five degrees of freedom; the variance of the values is 0.8.
    half = 2.5706 * math.sqrt(0.8 / 6)
    assert (mean.low, mean.high) == (pytest.approx(2 - half, rel=1e-4), pytest.approx(2 + half, rel=1e-4))


def test_means_of_few_or_equal_values() -> None:
    assert mean_of([None, math.inf]) is None
    for n in range(1, 6):
        few = mean_of([3.0 + i for i in range(n)])
        assert few is not None and (few.low, few.high) == (None, None)
    equal = mean_of([3.0] * 6)
    assert equal is not None and (equal.low, equal.high) == (3.0, 3.0)
