"""Images: grids of one frame up to 4K, square and not, and a whole ``FluxPipeline``."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import RasterOrder, TileOrder
from diffsparse.patterns import GridStripes, Pattern, Radial, Window
from diffsparse.pipelines import enable_sparse_attention, sparse_attention, sparse_attention_summary, tap_attention
from diffsparse.preset_plans import preset
from tests.pipelines.case import TEXT
from tests.pipelines.claims import shows
from tests.pipelines.models import flux, flux_inputs, masked_attention, mixed_plan, run, wan
from tests.tolerance import GENERATION, assert_near

FLUX = "FluxTransformer2DModel"
#: Pixels by 16: an autoencoder of 8 and patches of 2. The last two are ragged in tiles of 8 x 8.
SIZES = {
    "1K": (64, 64),
    "2K": (128, 128),
    "4K": (256, 256),
    "3840 x 2160": (135, 240),
    "1200 x 3552": (222, 75),
}
PROMPT = 512


def layout_of(size: tuple[int, int], order: Any, pattern: Pattern, block_size: int = 64) -> BlockLayout:
    grid = TokenGrid(1, *size, text_before=PROMPT)
    return build_layout(grid, (HeadEntry(order, pattern),), block_size)


def visual_density(layout: BlockLayout) -> float:
    """Without text, whose rows and columns are always kept."""
    tokens, visual = layout.seq_len, layout.grid.num_visual
    return (layout.density * tokens**2 - (tokens**2 - visual**2)) / visual**2


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", SIZES)
def test_layouts_of_large_images_are_made_in_no_time(name: str, block_size: int) -> None:
    """24 heads of five kinds, at 4K on 66,048 tokens. No matrix of all pairs of tokens (17 GB there) is ever made."""
    grid = TokenGrid(1, *SIZES[name], text_before=PROMPT)
    kinds = (
        HeadEntry(TileOrder(1, 8, 8), Window((1, 0.4, 0.4))),
        HeadEntry(TileOrder(1, 16, 8), Window((1, 33, 33))),
        HeadEntry(TileOrder(1, 8, 8), Radial()),
        HeadEntry(RasterOrder(), GridStripes()),
        HeadEntry(),
    )
    entries = tuple(kinds[i % len(kinds)] for i in range(24))
    tracemalloc.start()
    begin = time.perf_counter()
    layout = build_layout(grid, entries, block_size)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 60 and peak < 2**30, (seconds, peak)  # far above what it takes: 4K takes about 2 s
    blocks = layout.num_blocks
    assert layout.index.col_idx.numel() <= 24 * blocks**2
    assert layout.index.nbytes < 2**28
    assert all(0 < density <= 1 for density in layout.densities)
    assert [density == 1 for density in layout.densities] == [entry.is_dense for entry in entries]


@pytest.mark.parametrize("name", SIZES)
def test_a_window_keeps_what_it_covers(name: str) -> None:
    """Of 33 x 33 tokens: at least the tokens themselves, and no more than a tile beyond them on each side."""
    size = SIZES[name]
    found = visual_density(layout_of(size, TileOrder(1, 8, 8), Window((1, 33, 33))))
    least = np.prod([33 / n for n in size])
    most = np.prod([min(1, (33 + 2 * 8) / n) for n in size])
    assert least < found < most
    turned = visual_density(layout_of(size[::-1], TileOrder(1, 8, 8), Window((1, 33, 33))))
    assert turned == pytest.approx(found)
    wide = visual_density(layout_of(size, TileOrder(1, 8, 8), Window((1, 17, 65))))
    tall = visual_density(layout_of(size[::-1], TileOrder(1, 8, 8), Window((1, 65, 17))))
    assert wide == pytest.approx(tall)


def test_a_window_in_fractions_is_the_same_share_at_any_size() -> None:
    shares = [visual_density(layout_of(size, TileOrder(1, 8, 8), Window((1, 0.4, 0.4)))) for size in SIZES.values()]
    assert all(0.16 < share < 0.36 for share in shares)
    square = shares[:3]
    assert square == sorted(square, reverse=True)  # what tiles add at the border counts the less the larger it is


def radial_density(height: int, width: int) -> float:
    """Equation 5 of the paper counted token by token, rows instead of frames."""
    distance = np.abs(np.arange(height)[:, None] - np.arange(height))
    doubling = 2 ** np.floor(np.log2(np.maximum(distance, 1))).astype(int)
    reach = np.where(distance <= 1, width - 1, width // doubling - 1)
    gaps = np.abs(np.arange(width)[:, None] - np.arange(width)).ravel()
    within = np.array([(gaps <= most).sum() for most in range(-1, width)])
    return float(within[reach + 1].sum()) / (height * width) ** 2


@pytest.mark.parametrize("name", ["1K", "2K", "4K", "3840 x 2160"])
def test_radial_in_space(name: str) -> None:
    size = SIZES[name]
    found = visual_density(layout_of(size, TileOrder(1, 8, 8), Radial()))
    assert radial_density(*size) < found < 3 * radial_density(*size)


def test_radial_gets_sparser_with_the_size() -> None:
    densities = [visual_density(layout_of(SIZES[name], TileOrder(1, 8, 8), Radial())) for name in ("1K", "2K", "4K")]
    assert densities[0] > 1.5 * densities[1] > 2 * densities[2]


def test_radial_by_name_runs_sparse_on_images() -> None:
    """In raster order, which is for video, a block is a piece of a row, and every block would be kept."""
    model, inputs = flux(), flux_inputs(1, 64, 64)
    with sparse_attention(model, "radial"):
        run(model, inputs)
        tiles = sparse_attention_summary(model).transformers["transformer"]
    with sparse_attention(model, preset("radial")):
        run(model, inputs)
        raster = sparse_attention_summary(model).transformers["transformer"]
    assert "tiles" in tiles.plan and tiles.dense_calls == 0 and tiles.call_density is not None
    assert tiles.call_density < 0.7
    assert raster.sparse_calls == 0 and list(raster.dense_reasons) == ["every block is kept on this grid"]
    with sparse_attention(video := wan(), "radial"):
        assert sparse_attention_summary(video).transformers["transformer"].plan == "preset 'radial'"


# -- a whole pipeline --------------------------------------------------------------------------------------------------


def flux_pipeline() -> Any:
    """A ``FluxPipeline`` without text encoders: run it with :func:`generate`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, height: int = 208, width: int = 256, steps: int = 3, **options: Any) -> torch.Tensor:
    """Latents of one image; 13 x 16 tokens unless told otherwise."""
    random = torch.Generator().manual_seed(1)
    options.setdefault("output_type", "latent")
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, 16, generator=random),
        pooled_prompt_embeds=torch.randn(1, 8, generator=random),
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


@shows("whole pipeline", FLUX)
def test_a_flux_pipeline_with_sizes_in_turn() -> None:
    """Landscape, portrait (as many tokens), square, and back; the autoencoder runs as before."""
    pipe = flux_pipeline()
    plan = mixed_plan(pipe.transformer)
    sizes = [(208, 256), (256, 208), (224, 224)]
    dense = [generate(pipe, *size) for size in sizes]
    picture = generate(pipe, output_type="pt")
    assert picture.shape[-2:] == (208, 256)
    with tap_attention(pipe, masked_attention(plan)):
        expected = [generate(pipe, *size) for size in sizes]
    with pipe.sparse_attention(plan):
        for i in (0, 1, 2, 0, 1):
            assert_near(generate(pipe, *sizes[i]), expected[i], GENERATION)
        summary = pipe.sparse_attention_summary().transformers["transformer"]
    assert summary.grids == {"7+1x13x16": 6, "7+1x16x13": 6, "7+1x14x14": 3}
    assert (summary.sparse_calls, summary.dense_calls) == (15 * 3, 0)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(expected, dense))
    assert all(torch.equal(generate(pipe, *size), latents) for size, latents in zip(sizes, dense))
    with pipe.sparse_attention("dense"):
        assert torch.equal(generate(pipe, output_type="pt"), picture)


def ip_adapter() -> dict[str, dict[str, torch.Tensor]]:
    """As a file of one has it: a projection to 4 tokens, keys and values for the one double block."""
    random = torch.Generator().manual_seed(3)
    sizes = {
        "0.to_k_ip.weight": (48, 16),
        "0.to_v_ip.weight": (48, 16),
        "0.to_k_ip.bias": (48,),
        "0.to_v_ip.bias": (48,),
    }
    projection = {"proj.weight": (4 * 16, 12), "proj.bias": (4 * 16,), "norm.weight": (16,), "norm.bias": (16,)}
    return {
        "image_proj": {name: torch.randn(size, generator=random) for name, size in projection.items()},
        "ip_adapter": {name: torch.randn(size, generator=random) for name, size in sizes.items()},
    }


@shows("IP-adapter", FLUX)
@pytest.mark.parametrize("first", ["adapter", "plan"])
def test_an_ip_adapter_loaded_and_unloaded(first: str) -> None:
    """Loading puts other processors in. The adapter's own attention, to its image's tokens, goes on dense."""
    oracle = flux_pipeline()
    plan = mixed_plan(oracle.transformer)
    features = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(4))
    picture = {"ip_adapter_image_embeds": [features[0]], "negative_ip_adapter_image_embeds": [features[1]]}
    with tap_attention(oracle, masked_attention(plan)):
        bare = generate(oracle)
        oracle.transformer._load_ip_adapter_weights(ip_adapter())
        expected = generate(oracle, **picture)
    assert (expected - bare).abs().max() > 1e-2

    pipe = flux_pipeline()
    if first == "plan":
        enable_sparse_attention(pipe, plan)
    pipe.transformer._load_ip_adapter_weights(ip_adapter())
    if first == "adapter":
        enable_sparse_attention(pipe, plan)
    assert_near(generate(pipe, **picture), expected, GENERATION)
    pipe.unload_ip_adapter()
    assert_near(generate(pipe), bare, GENERATION)
    summary = pipe.sparse_attention_summary().transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (2 * 3 * 3, 0)
