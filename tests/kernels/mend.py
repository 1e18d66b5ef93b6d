"""Run in a process of its own with TRITON_INTERPRET=1: the repair's kernel on the CPU against the plain product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffsparse.kernels.repair import mend_, no_fused_pass
from diffsparse.kernels.repair.host import Tiles, choose_tiles, launch
from diffsparse.repair import HeadRepair
from tests.kernels.apart import case, finish
from tests.tolerance import Work, assert_near

#: The interpreter multiplies bf16 as if it were whole numbers: see tests/kernels/test_gpu.py for that.
FLOATS = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Shape:
    """``before`` and ``after`` tokens of text around the video's; ``wide``: rows of memory have room beside heads.

    own: every item of the batch has maps of its own.
    """

    dim: int
    before: int = 0
    visual: int = 70
    after: int = 0
    batch: int = 1
    heads: int = 2
    wide: bool = False
    own: bool = False

    @property
    def seq(self) -> int:
        return self.before + self.visual + self.after


SHAPES = (
    Shape(16, before=3, visual=65, after=5, batch=2, heads=3),
    Shape(24, visual=64, wide=True),
    Shape(40, visual=1, after=1),
    Shape(64, before=130, visual=131, wide=True, batch=2),
    Shape(72, visual=63, after=9),
    Shape(128, visual=150, after=7, heads=3),
    Shape(160, before=1, visual=33, wide=True),
    Shape(250, visual=66, after=2),
    Shape(256, visual=65, batch=2),
    Shape(48, before=9, visual=70, after=2, batch=3, heads=3, own=True),
    Shape(136, visual=40, batch=2, own=True),
)
#: What is chosen for larger calls than these: several tiles a program, of which some have no tokens.
TILES = (None, Tiles(64, 0, 4, 3), Tiles(16, 16, 4))


def maps(heads: int, dim: int, device: str = "cpu", seed: int = 0, items: int | None = None) -> HeadRepair:
    """Random maps, in float16, or in float32 for each of so many items; the second head has none."""
    draw = torch.Generator().manual_seed(seed)
    shape = (heads,) if items is None else (items, heads)
    weight = torch.randn(*shape, dim, dim, generator=draw) / dim**0.5
    bias = torch.randn(*shape, dim, generator=draw)
    if items is None:
        weight, bias = weight.half(), bias.half()
    used = torch.arange(heads) != 1
    return HeadRepair(weight, bias, used).to(device)


def maps_of(shape: Shape, device: str = "cpu") -> HeadRepair:
    return maps(shape.heads, shape.dim, device, items=shape.batch if shape.own else None)


def output(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """``[B, S, H, D]``: text is NaN, and so is the room between rows; the head without a map has an infinity."""
    room = 8 if shape.wide else 0
    memory = torch.full((shape.batch, shape.seq, shape.heads, shape.dim + room), math.nan, device=device).to(dtype)
    out = memory[..., : shape.dim]
    visual = slice(shape.before, shape.before + shape.visual)
    out[:, visual] = torch.randn(shape.batch, shape.visual, shape.heads, shape.dim).to(device, dtype)
    out[:, visual, 1] *= -0.0
    out[0, shape.before, 1, 0] = math.inf
    return out


def check(out: torch.Tensor, found: torch.Tensor, repair: HeadRepair, shape: Shape) -> None:
    """``found`` is ``out`` repaired, and nothing else has changed: compared bit by bit, so that -0 is not 0."""
    visual = slice(shape.before, shape.before + shape.visual)
    bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
    same, given = found.contiguous().view(bits), out.contiguous().view(bits)
    assert torch.equal(same[:, : shape.before], given[:, : shape.before]), "text before the video"
    assert torch.equal(same[:, visual.stop :], given[:, visual.stop :]), "text after the video"
    assert torch.equal(same[:, :, 1], given[:, :, 1]), "a head without a map"
    # A map is rounded to the output's precision, as the product of a product's operands has to be.
    want = repair.apply_(out.double(), shape.before, shape.visual)
    rest = [h for h in range(shape.heads) if h != 1]
    assert_near(found[:, visual, rest].double(), want[:, visual, rest], Work(shape.dim, dtype=out.dtype))
    near = repair.apply_(out.clone(), shape.before, shape.visual)
    assert_near(found[:, visual, rest], near[:, visual, rest], Work(shape.dim, sums=2))


def contents(x: torch.Tensor) -> torch.Tensor:
    """All of the memory behind a view, as bytes."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).view(torch.uint8)


def check_shape(shape: Shape, dtype: torch.dtype, tiles: Tiles | None) -> None:
    if tiles is not None and not tiles.depth:
        tiles = Tiles(tiles.rows, max(16, 1 << (shape.dim - 1).bit_length()), tiles.warps, tiles.count)
    out, repair = output(shape, dtype), maps_of(shape)
    found = torch.empty(0, dtype=dtype).set_(out.untyped_storage().clone(), 0, out.shape, out.stride())
    before = contents(found).clone()
    launch(found, repair, shape.before, shape.visual, tiles)
    check(out, found, repair, shape)
    if shape.wide:
        size, room = out.element_size(), 8 * out.element_size()
        rows = [x.view(-1, shape.dim * size + room)[:, -room:] for x in (contents(found), before)]
        assert torch.equal(*rows), "the room between rows"


def check_the_choice() -> None:
    """In the interpreter the kernel is what runs; what it cannot take, torch's products do."""
    shape = Shape(32, before=2, after=3)
    out, repair = output(shape, torch.float32), maps(2, 32)
    assert no_fused_pass(out) is None
    found = mend_(out.clone(), repair, shape.before, shape.visual)
    check(out, found, repair, shape)
    for other, why in (
        (out.double(), "torch.float64"),
        (out.transpose(2, 3).contiguous().transpose(2, 3), "contiguous last axis"),
        (torch.randn(1, 9, 2, 257), "heads of 257"),
    ):
        reason = no_fused_pass(other)
        assert reason is not None and why in reason, reason
        dim = other.shape[3]
        found = mend_(other.clone(), maps(2, dim), 2, 5)
        assert_near(found[:, 2:7, 0], maps(2, dim).apply_(other.clone(), 2, 5)[:, 2:7, 0], Work(dim))
    nothing = torch.randn(1, 4, 2, 32)
    assert torch.equal(mend_(nothing.clone(), repair, 4, 0), nothing)
    # Programs enough for a whole GPU before one takes several tiles.
    assert choose_tiles(128, torch.bfloat16, 75600, 40).count > 1 == choose_tiles(128, torch.bfloat16, 5000, 8).count


def shapes() -> Iterator[tuple[Shape, torch.dtype, Tiles | None]]:
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(FLOATS):
            yield shape, dtype, TILES[(i + j) % len(TILES)]


def main() -> None:
    for shape, dtype, tiles in shapes():
        torch.manual_seed(0)
        with case(shape, dtype, tiles):
            check_shape(shape, dtype, tiles)
    with case("choice"):
        check_the_choice()


if __name__ == "__main__":
    main()
    finish()
