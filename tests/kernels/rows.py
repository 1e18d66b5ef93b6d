"""Run in a process of its own with TRITON_INTERPRET=1: the kernels for a few queries, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffsparse.kernels.rows import no_rows_kernel, plain
from diffsparse.kernels.rows.host import launch_attend, launch_errors
from tests.kernels.apart import case, finish
from tests.tolerance import Work, assert_near


@dataclass(frozen=True)
class Shape:
    """``splits``: programs that share the keys; ``blocks``: lengths of blocks of keys; ``masked``: keys left out."""

    dim: int
    seq: int
    rows: int
    batch: int = 1
    heads: int = 2
    splits: int = 1
    blocks: tuple[int, ...] = (16, 16, 9)
    masked: bool = False


SHAPES = (
    Shape(16, 65, 3, batch=2, heads=3, splits=3),
    Shape(24, 70, 17, masked=True),
    Shape(64, 131, 33, splits=2, blocks=(64, 64, 3)),
    Shape(72, 200, 20, batch=2, splits=4, masked=True, blocks=(40, 33, 1, 64)),
    Shape(128, 150, 65, heads=1, blocks=(128, 22)),
    Shape(200, 40, 5, splits=2, blocks=(5, 20)),
)
#: The interpreter multiplies bf16 as if it were whole numbers: see tests/kernels/test_gpu.py for that.
FLOATS = (torch.float16,)


def call(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k, v ``[B, S, H, D]``, some rows, and a mask of keys or None."""
    draw = torch.Generator().manual_seed(shape.dim)
    size = (shape.batch, shape.seq, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, generator=draw).to(device, dtype) for _ in range(3))
    rows = torch.randint(shape.seq, (shape.rows,), generator=draw).to(device)
    mask = torch.rand(shape.batch, shape.seq, generator=draw) < 0.7
    mask[0] = False  # an item without any key
    return q, k, v, rows, mask.to(device) if shape.masked else None  # type: ignore[return-value]


def check_attend(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    q, k, v, rows, mask = call(shape, dtype, device)
    scale = 0.7 * shape.dim**-0.5
    out, lse = launch_attend(q, k, v, rows, scale, mask, splits=shape.splits)
    want, sums = plain.attend_rows(q.double(), k.double(), v.double(), rows, scale, mask)
    work = Work(length=shape.seq + shape.dim, sums=2, dtype=dtype)
    assert_near(out.double(), want, work)
    known = sums.isfinite()
    assert torch.equal(known, lse.isfinite())
    assert_near(lse.double()[known], sums[known], work)


def check_errors(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    q, k, v, rows, _ = call(shape, dtype, device)
    scale = shape.dim**-0.5
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [H, S, D], as views
    length = torch.tensor(shape.blocks, device=device)
    width = int(length.max())
    draw = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(shape.seq, generator=draw)[:width] for _ in shape.blocks]).to(device)
    wide = [x.double() for x in (q, k, v)]
    out, lse = (x[0].transpose(0, 1) for x in plain.attend_rows(*(x.transpose(0, 1)[None] for x in wide), rows, scale))
    queries = q[:, rows]
    k, v = (x[:, tokens.reshape(-1)].unflatten(1, tokens.shape) for x in (k, v))  # [H, N, W, D]
    known = plain.summaries_of(k, v, length)
    weights = plain.tail_weights(queries.double(), lse, length, known, scale)
    error, mass = launch_errors(
        queries, k, v, length, out.float(), lse.float(), known, weights.float(), scale
    )  # fmt: skip
    want, share = plain.block_errors(queries.double(), k.double(), v.double(), length, out, lse, known, weights, scale)
    work = Work(length=width + shape.dim, sums=3, dtype=dtype)
    assert_near(mass.double(), share, work)
    assert_near(error.double().sqrt(), want.sqrt(), work)


def main() -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            with case("attend", shape, dtype):
                assert no_rows_kernel(torch.empty(1, shape.dim, dtype=dtype)) is None
                check_attend(shape, dtype)
            with case("errors", shape, dtype):
                check_errors(shape, dtype)
    finish()


if __name__ == "__main__":
    main()
