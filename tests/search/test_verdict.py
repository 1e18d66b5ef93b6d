"""What an evaluation says at its end, and where in a clip its error lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsparse.search import metrics
from diffsparse.search.clip_report import ClipReport
from diffsparse.search.tables import eval_table
from diffsparse.search.verdict import verdict
from tests.search.evaluations import clip, report


def clips(*ssim: float | None, above: float | None = None) -> list[ClipReport]:
    return [replace(clip(i, 20.0), ssim=value, above_other_seed=above) for i, value in enumerate(ssim)]


@pytest.mark.parametrize(
    ("found", "broken", "begins"),
    [
        (clips(0.99, 0.951), False, "You would not see it: every clip is taken for its dense twin (worst SSIM 0.951)"),
        (clips(0.99, 0.9499), False, "You would see it side by side only"),
        (clips(0.99, 0.86), False, "You would see it side by side only"),
        (clips(0.99, 0.84), False, "You would see it: some clips differ plainly"),
        (clips(0.99), True, "Anyone would see it: some clips are broken"),
        (
            clips(None, above=12.5),
            False,
            "You would not see it: every clip is taken for its dense twin (worst clip +12.5",
        ),
        (clips(None, None, above=8.0), False, "You would see it side by side only"),
        (clips(None, above=3.0), False, "You would see it: some clips differ plainly"),
        (clips(None), False, "Look at the clips"),
        (clips(0.99, None), False, "Look at the clips"),
    ],
)
def test_one_sentence_for_the_worst_clip(found: list[ClipReport], broken: bool, begins: str) -> None:
    assert verdict(found, broken).startswith(begins)


def test_the_evaluation_ends_with_it() -> None:
    found = report(clips(0.99, 0.8))
    assert eval_table(found, width=80).replace("\n", " ").endswith(found.verdict)
    assert found.to_dict()["verdict"] == found.verdict


def test_where_the_error_lies() -> None:
    dense = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    even = dense + 0.1
    assert metrics.border_error(even, dense) == pytest.approx(1) == metrics.last_frame_error(even, dense)
    edges, last = even.clone(), even.clone()
    edges[:, :, :, :3] += 0.1  # three columns of 48: a sixteenth
    last[-1] += 0.1
    share = 3 * 32 / (32 * 48 - 28 * 42)
    assert metrics.border_error(edges, dense) == pytest.approx(1 + 3 * share, rel=1e-4)
    assert metrics.last_frame_error(last, dense) == pytest.approx(4, rel=1e-4)
    assert metrics.border_error(dense, dense) is None and metrics.last_frame_error(dense[:1], even[:1]) is None
    assert metrics.frame_errors(last, dense) == pytest.approx([0.01, 0.01, 0.01, 0.04], rel=1e-4)
    found = report([replace(clip(0, 20.0), border_error=2.0, last_frame_error=None)])
    assert "2.00 times the middle's along the edges" in eval_table(found, width=120)
    assert found.to_dict()["border_error"] == 2.0 and found.to_dict()["last_frame_error"] is None


def test_errors_are_told_frame_by_frame() -> None:
    some = [replace(clip(i, 20.0), frame_errors=errors) for i, errors in enumerate(([0.1, 0.2, 0.6], [0.1, 0.0, 0.2]))]
    found = report(some)
    assert found.frame_errors == pytest.approx([0.1, 0.1, 0.4])
    assert found.to_dict()["frame_errors"] == found.frame_errors
    assert found.to_dict()["clips"][1]["frame_errors"] == [0.1, 0.0, 0.2]
    assert "0.50 (frame 1) to 2.00 (frame 3) times the mean of all 3" in eval_table(found, width=120)
    for nothing in ([[0.0, 0.0]], [[0.1]], [[float("nan"), 0.1]], [[0.1, 0.2], [0.1]], []):
        quiet = report([replace(clip(i, 20.0), frame_errors=errors) for i, errors in enumerate(nothing)] or clips(0.99))
        assert "by frame" not in eval_table(quiet, width=120)
