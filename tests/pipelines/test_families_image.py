"""Image models of the Flux kind: reference images, masks, adapters, and what must run dense."""

from __future__ import annotations

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import (
    AttentionCall,
    architecture_of,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.families import common
from diffsparse.pipelines.families.common import images, images_by_ids
from diffsparse.pipelines.family import UnknownGridError, family_of
from diffsparse.pipelines.summary import TransformerSummary
from tests.pipelines import zoo_image as zoo
from tests.pipelines.case import TEXT, Inputs
from tests.pipelines.claims import shows
from tests.pipelines.models import masked_attention, mixed_plan, run
from tests.tolerance import MODEL, assert_near

NO_KEY_MASK = "a mask that is not a key-padding mask"


def check_sparse(model: torch.nn.Module, inputs: Inputs, grid: TokenGrid) -> tuple[TransformerSummary, torch.Tensor]:
    """A plan does what it says on this grid; returns the summary of one forward and its output."""
    plan = mixed_plan(model)
    dense = run(model, inputs)
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    with sparse_attention(model, plan):
        found = run(model, inputs)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert_near(found, expected, MODEL)
    assert (found - dense).abs().max() > 1e-3
    assert summary.grids == {str(grid): 1}
    return summary, found


def check_all_sparse(model: torch.nn.Module, inputs: Inputs, grid: TokenGrid) -> torch.Tensor:
    summary, found = check_sparse(model, inputs, grid)
    assert summary.dense_calls == 0 and summary.sparse_calls == len(summary.layers)
    return found


def check_dense(model: torch.nn.Module, inputs: Inputs, reason: str) -> None:
    """Every call runs dense, bitwise, for one reason."""
    dense = run(model, inputs)
    with sparse_attention(model, mixed_plan(model)):
        assert torch.equal(run(model, inputs), dense)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.sparse_calls == 0
    assert len(summary.dense_reasons) <= 1 and all(reason in found for found in summary.dense_reasons)


def ids_of(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.cat([zoo.image_ids(*size, image=i) for i, size in enumerate(sizes)])


# -- grids from positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "grid"),
    [
        ([(5, 7)], TokenGrid(1, 5, 7, text_before=3)),
        ([(7, 5)], TokenGrid(1, 7, 5, text_before=3)),
        ([(1, 6)], TokenGrid(1, 1, 6, text_before=3)),
        ([(6, 1)], TokenGrid(1, 6, 1, text_before=3)),
        ([(1, 1)], TokenGrid(1, 1, 1, text_before=3)),
        ([(5, 7), (5, 7), (5, 7)], TokenGrid(3, 5, 7, text_before=3)),
        ([(5, 7), (7, 5)], TokenGrid(1, 5, 7, text_before=3, text_after=35)),
        ([(5, 7), (5, 7), (4, 3), (5, 7)], TokenGrid(2, 5, 7, text_before=3, text_after=12 + 35)),
    ],
)
def test_grid_of_positions(sizes: list[tuple[int, int]], grid: TokenGrid) -> None:
    ids = ids_of(*sizes)
    for form in (ids, ids[None], ids.long(), ids.half(), torch.nn.functional.pad(ids, (0, 1)), ids + 11, ids - 11):
        assert images_by_ids(form, len(ids), 3) == grid
    assert images_by_ids(torch.stack([ids, ids.flip(0)]), len(ids), 3) == grid  # models read the first item's
    with torch.inference_mode():
        assert images_by_ids(ids_of(*sizes), len(ids), 3) == grid


def test_images_with_the_same_number() -> None:
    """Positions that start anew, or stand aside, are another image, whatever the first axis says."""
    one = zoo.image_ids(5, 7)
    aside = one + torch.tensor([0, 0, 7])
    for other in (one, aside):
        assert images_by_ids(torch.cat([one, other]), 70, 0) == TokenGrid(2, 5, 7)
    assert images_by_ids(torch.cat([one, zoo.image_ids(2, 7)]), 49, 0) == TokenGrid(1, 5, 7, text_after=14)


def test_large_images_in_bfloat16() -> None:
    """Pipelines give positions in the model's type, in which 257 is 256."""
    ids = zoo.image_ids(300, 280).bfloat16()
    assert images_by_ids(ids, 84_000, 0) == TokenGrid(1, 300, 280)
    ids = torch.cat([zoo.image_ids(300, 280), zoo.image_ids(300, 280, image=1)]).bfloat16()
    assert images_by_ids(ids, 168_000, 0) == TokenGrid(2, 300, 280)


def test_positions_that_tell_no_grid() -> None:
    ids = zoo.image_ids(5, 7)
    hole = ids.clone()
    hole[14:, 1] += 2
    swapped = ids.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    for bad in (hole, swapped, torch.zeros(35, 3), ids[torch.randperm(35)], ids * 0.5, ids[:, [0, 2, 1]] * 2):
        with pytest.raises(UnknownGridError, match="are not one image"):
            images_by_ids(bad, 35, 0)
    with pytest.raises(UnknownGridError, match="36 image tokens, but positions of 35"):
        images_by_ids(ids, 36, 0)
    with pytest.raises(UnknownGridError, match="img_ids is missing"):
        images_by_ids(None, 35, 0)
    for bad in (ids[:, :2], ids[:, 0]):
        with pytest.raises(UnknownGridError, match="tell no rows and columns"):
            images_by_ids(bad, 35, 0)


def test_positions_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = common._read_ids

    def count(ids: torch.Tensor, skip: int) -> list[tuple[int, int, int]]:
        reads.append(len(ids))
        return read(ids, skip)

    monkeypatch.setattr(common, "_read_ids", count)
    ids = zoo.image_ids(5, 7)
    for _ in range(3):
        assert images_by_ids(ids, 35, 2) == TokenGrid(1, 5, 7, text_before=2)
    assert images_by_ids(ids, 35, 1) == TokenGrid(1, 5, 7, text_before=1)
    assert len(reads) == 1
    ids.copy_(zoo.image_ids(7, 5))
    assert images_by_ids(ids, 35, 2) == TokenGrid(1, 7, 5, text_before=2)
    assert len(reads) == 2
    for _ in range(40):  # a new tensor may stand where a freed one was
        assert images_by_ids(zoo.image_ids(5, 7), 35, 0) == TokenGrid(1, 5, 7)
        assert images_by_ids(zoo.image_ids(7, 5), 35, 0) == TokenGrid(1, 7, 5)
    assert len(common._KNOWN_IDS) <= 16


def test_images_of_several_frames() -> None:
    assert images([(2, 5, 7), (1, 5, 7), (3, 4, 4)], 2) == TokenGrid(3, 5, 7, text_before=2, text_after=48)


# -- Flux --------------------------------------------------------------------------------------------------------------


def test_kontext_reference_of_another_size() -> None:
    inputs = zoo.kontext_inputs(1, 13, 16)
    inputs["img_ids"] = ids_of((13, 16), (6, 9))
    inputs["hidden_states"] = torch.randn(1, 13 * 16 + 54, 4)
    check_all_sparse(zoo.kontext(), inputs, TokenGrid(1, 13, 16, text_before=TEXT, text_after=54))


@shows(
    "ControlNet",
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "BriaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
)
def test_controlnet_leaves_the_grid_alone() -> None:
    from diffusers import BriaTransformer2DModel

    grid = TokenGrid(1, 13, 16, text_before=TEXT)
    for model, inputs in (
        (zoo.kontext(), zoo.kontext_inputs(1, 13, 16)),
        (zoo.chroma(), zoo.packed_inputs(1, 13, 16)),
        (zoo.bria(), zoo.bria_inputs(1, 13, 16)),
    ):
        plain = check_all_sparse(model, inputs, grid)
        inputs["controlnet_block_samples"] = [torch.randn(1, 208, 48)]
        if not isinstance(model, BriaTransformer2DModel):  # which cuts off the text twice
            inputs["controlnet_single_block_samples"] = [torch.randn(1, 208, 48)]
        assert (check_all_sparse(model, inputs, grid) - plain).abs().max() > 1e-2
    model, inputs = zoo.qwenimage(), zoo.qwenimage_inputs(1, 13, 16)
    plain = check_all_sparse(model, inputs, grid)
    inputs["controlnet_block_samples"] = [torch.randn(2, 208, 48)]
    assert (check_all_sparse(model, inputs, grid) - plain).abs().max() > 1e-2
    model, inputs = zoo.sd3(), zoo.sd3_inputs(1, 13, 16)
    plain = check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_after=TEXT))
    inputs["block_controlnet_hidden_states"] = [torch.randn(2, 208, 48)]
    with_control = check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_after=TEXT))
    assert (with_control - plain).abs().max() > 1e-2


def test_flux_ip_adapter() -> None:
    """The adapter's attention, to keys of its own, goes on dense beside the sparse one."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, inputs = zoo.kontext(), zoo.kontext_inputs(1, 13, 16)
    grid = TokenGrid(1, 13, 16, text_before=TEXT)
    plain = check_all_sparse(model, inputs, grid)
    torch.manual_seed(1)
    processor = FluxIPAdapterAttnProcessor(hidden_size=48, cross_attention_dim=48, num_tokens=(4,))
    model.transformer_blocks[0].attn.set_processor(processor)
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(1, 4, 48)]}
    assert (check_all_sparse(model, inputs, grid) - plain).abs().max() > 1e-3
    processor.scale = [0.0]
    assert_near(check_all_sparse(model, inputs, grid), plain, MODEL)


def test_chroma_mask_is_added_to_the_logits() -> None:
    model, inputs = zoo.chroma(), zoo.packed_inputs(1, 13, 16)
    mask = torch.ones(1, TEXT + 208)
    mask[:, 4:TEXT] = 0
    plain = run(model, inputs)
    for form in (mask, mask.bool()):
        inputs["attention_mask"] = form
        assert (run(model, inputs) - plain).abs().max() > 1e-5
        check_dense(model, inputs, NO_KEY_MASK)


def test_chroma_mask_is_no_key_mask_in_disguise() -> None:
    """It lowers the weight of padding by a factor of e, so leaving those keys out would change the picture."""
    from diffusers import ChromaPipeline

    model, inputs = zoo.chroma(), zoo.packed_inputs(1, 13, 16)
    text = torch.ones(1, TEXT)
    text[:, 4:] = 0
    mask = ChromaPipeline._prepare_attention_mask(None, 1, 208, torch.float32, text)  # as its pipeline makes it
    assert mask.is_floating_point() and mask.shape == (1, TEXT + 208)
    added = run(model, {**inputs, "attention_mask": mask})

    def left_out(call: AttentionCall) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.bool()[:, None, None]).transpose(1, 2)

    with tap_attention(model, left_out):
        assert (run(model, inputs) - added).abs().max() > 1e-3


# -- Flux 2 ------------------------------------------------------------------------------------------------------------


def test_flux2_references_of_other_sizes() -> None:
    inputs = zoo.flux2_inputs(2, 9, 10)
    reference = zoo.image_ids(5, 4, image=30, axes=4)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], reference[None]], dim=1)
    inputs["hidden_states"] = torch.randn(1, 200, 4)
    check_all_sparse(zoo.flux2(), inputs, TokenGrid(2, 9, 10, text_before=TEXT, text_after=20))


def test_flux2_key_value_cache_runs_dense() -> None:
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
    )

    model = zoo.flux2()
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    both = zoo.flux2_inputs(2, 9, 10)
    alone = zoo.flux2_inputs(1, 9, 10)
    grid = TokenGrid(1, 9, 10, text_before=TEXT)
    extract = {**both, "kv_cache_mode": "extract", "num_ref_tokens": 90}
    check_dense(model, extract, "reference images with a key-value cache")
    with torch.no_grad():
        cache = model(**extract)[1]
    check_dense(
        model, {**alone, "kv_cache": cache, "kv_cache_mode": "cached"}, "reference images with a key-value cache"
    )
    # Without reference images it is an ordinary model.
    check_all_sparse(model, alone, grid)
    check_all_sparse(model, {**alone, "kv_cache_mode": "extract"}, grid)


# -- Qwen-Image --------------------------------------------------------------------------------------------------------


def test_qwenimage_edit_and_layered() -> None:
    inputs = zoo.qwenimage_inputs(1, 9, 10)
    inputs["img_shapes"] = [[(1, 9, 10), (1, 9, 10), (1, 5, 4), (1, 3, 3)]] * 2
    inputs["hidden_states"] = torch.randn(2, 180 + 29, 4)
    check_all_sparse(zoo.qwenimage(), inputs, TokenGrid(2, 9, 10, text_before=TEXT, text_after=29))
    from diffusers import QwenImageTransformer2DModel

    config = dict(zoo.qwenimage().config)
    torch.manual_seed(0)
    variant = QwenImageTransformer2DModel.from_config(
        {**config, "zero_cond_t": True, "use_additional_t_cond": True, "use_layer3d_rope": True}
    ).eval()
    inputs["additional_t_cond"] = torch.tensor([0, 1])
    check_all_sparse(variant, inputs, TokenGrid(2, 9, 10, text_before=TEXT, text_after=29))


def test_qwenimage_text_masks() -> None:
    """A hole between text and image; a mask with holes anywhere in the text; none at all."""
    model, grid = zoo.qwenimage(), TokenGrid(1, 13, 16, text_before=TEXT)
    inputs = zoo.qwenimage_inputs(1, 13, 16)
    check_all_sparse(model, inputs, grid)
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    check_all_sparse(model, inputs, grid)
    inputs["encoder_hidden_states_mask"] = None
    check_all_sparse(model, inputs, grid)
    inputs["img_shapes"] = [(1, 13, 16)] * 2
    check_all_sparse(model, inputs, grid)


def test_qwenimage_shapes_that_tell_no_grid() -> None:
    model, inputs = zoo.qwenimage(), zoo.qwenimage_inputs(1, 13, 16)
    check_dense(model, {**inputs, "img_shapes": [[(1, 13, 16)], [(1, 16, 13)]]}, "img_shapes differ within the batch")
    grid = family_of(model).grid
    with pytest.raises(UnknownGridError, match="img_shapes is missing"):
        grid(model.config, {**inputs, "img_shapes": None})
    with pytest.raises(UnknownGridError, match="208 image tokens, but img_shapes of 195"):
        grid(model.config, {**inputs, "img_shapes": [[(1, 13, 15)]] * 2})


# -- Stable Diffusion 3 ------------------------------------------------------------------------------------------------


def test_sd3_perturbed_attention() -> None:
    """The perturbed half of a batch has an additive mask, and runs dense; the other half runs sparse."""
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model, inputs = zoo.sd3(), zoo.sd3_inputs(1, 13, 16)
    model.transformer_blocks[0].attn.set_processor(PAGJointAttnProcessor2_0())
    summary, _ = check_sparse(model, inputs, TokenGrid(1, 13, 16, text_after=TEXT))
    assert summary.sparse_calls == 2 and summary.dense_reasons == {NO_KEY_MASK: 1}


@shows("IP-adapter", "SD3Transformer2DModel")
def test_sd3_ip_adapter() -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model, inputs = zoo.sd35_medium(), zoo.sd3_inputs(1, 13, 16)
    grid = TokenGrid(1, 13, 16, text_after=TEXT)
    plain = check_all_sparse(model, inputs, grid)
    torch.manual_seed(1)
    processor = SD3IPAdapterJointAttnProcessor2_0(
        hidden_size=48, ip_hidden_states_dim=8, head_dim=16, timesteps_emb_dim=8
    )
    model.transformer_blocks[0].attn.set_processor(processor)
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": torch.randn(2, 4, 8), "temb": torch.randn(2, 8)}
    assert (check_all_sparse(model, inputs, grid) - plain).abs().max() > 1e-4


def test_sd3_fused_projections_and_skipped_layers() -> None:
    model, inputs = zoo.sd35_medium(), zoo.sd3_inputs(1, 13, 16)
    grid = TokenGrid(1, 13, 16, text_after=TEXT)
    summary, _ = check_sparse(model, {**inputs, "skip_layers": [1]}, grid)
    assert [layer.sparse_calls for layer in summary.layers] == [1, 1, 0]
    model = zoo.sd3()  # diffusers' own function fails on the second attention of 3.5-medium
    plain = check_all_sparse(model, inputs, grid)
    model.fuse_qkv_projections()
    assert_near(check_all_sparse(model, inputs, grid), plain, MODEL)


# -- others ------------------------------------------------------------------------------------------------------------


def test_auraflow_fused_projections() -> None:
    model, inputs = zoo.auraflow(), zoo.auraflow_inputs(1, 13, 16)
    grid = TokenGrid(1, 13, 16, text_before=TEXT + model.register_tokens.shape[1])
    plain = check_all_sparse(model, inputs, grid)
    model.fuse_qkv_projections()
    assert_near(check_all_sparse(model, inputs, grid), plain, MODEL)


def test_bria_fibo_masks() -> None:
    model, inputs = zoo.bria_fibo(), zoo.bria_fibo_inputs(1, 13, 16)
    mask = inputs["joint_attention_kwargs"]["attention_mask"][:, 0, 0]
    inputs["joint_attention_kwargs"] = {"attention_mask": (mask[:, None] & mask[:, :, None])[:, None]}
    check_dense(model, inputs, NO_KEY_MASK)
    inputs["joint_attention_kwargs"] = {"attention_mask": torch.zeros(2, 1, 1, TEXT + 208)}
    check_dense(model, inputs, NO_KEY_MASK)
    inputs["joint_attention_kwargs"] = None
    check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_before=TEXT))


def test_bria_fibo_edit() -> None:
    inputs = zoo.bria_fibo_inputs(1, 13, 16)
    inputs["img_ids"] = ids_of((13, 16), (3, 4))
    inputs["hidden_states"] = torch.randn(2, 220, 4)
    inputs["joint_attention_kwargs"] = None
    check_all_sparse(zoo.bria_fibo(), inputs, TokenGrid(1, 13, 16, text_before=TEXT, text_after=12))


def test_bria_fibo2_padded_prompts() -> None:
    """Prompts of different lengths: the gist tokens go to the end, those that one item has not are masked."""
    model, inputs = zoo.bria_fibo2(), zoo.bria_fibo2_inputs(1, 13, 16)
    inputs["hidden_states"] = torch.randn(2, 4, 26, 32)
    inputs["timestep"] = torch.full((2,), 0.5)
    inputs["encoder_hidden_states"] = torch.randn(2, 2, 24, 16)
    mask = torch.ones(2, 24, dtype=torch.bool)
    inputs["encoder_attention_mask"] = mask
    check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_before=2 * TEXT))
    mask[1, 10:] = False
    seen: list[AttentionCall] = []
    with tap_attention(model, seen.append):
        run(model, inputs)
    assert [call.kv_len is not None for call in seen] == [False, True, True]
    check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_after=2 * TEXT))
    inputs["context_latents"] = [torch.randn(2, 4, 26, 32)]
    check_all_sparse(model, inputs, TokenGrid(2, 13, 16, text_after=2 * TEXT))


def test_bria_fibo2_context_of_another_size() -> None:
    """The refiner, which holds images alone, runs dense then."""
    inputs = zoo.bria_fibo2_inputs(1, 13, 16)
    inputs["context_latents"] = [torch.randn(1, 4, 8, 6)]
    grid = TokenGrid(1, 13, 16, text_before=TEXT, text_after=12)
    model = zoo.bria_fibo2()
    plan = mixed_plan(model)
    dense = run(model, inputs)
    with sparse_attention(model, plan):
        assert (run(model, inputs) - dense).abs().max() > 1e-4
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.grids == {str(grid): 1}
    assert [layer.sparse_calls for layer in summary.layers] == [0, 1, 1]
    assert summary.dense_reasons == {"220 tokens, the grid 1x13x16 has 208": 1}


def test_hunyuan_image_without_a_second_text() -> None:
    inputs = zoo.hunyuan_image_inputs(1, 13, 16)
    inputs["encoder_hidden_states_2"] = inputs["encoder_attention_mask_2"] = None
    check_all_sparse(zoo.hunyuan_image(), inputs, TokenGrid(1, 13, 16, text_after=TEXT))


def test_flux3_reference_images() -> None:
    model, inputs = zoo.flux3(), zoo.flux3_inputs(1, 13, 16)
    for size in ((13, 16), (4, 5)):
        count = size[0] * size[1]
        inputs["image_cond_hidden_states"] = torch.randn(1, count, 4)
        inputs["image_cond_ids"] = zoo.image_ids(*size, image=10, axes=4)
        check_all_sparse(model, inputs, TokenGrid(1, 13, 16, text_before=TEXT, text_after=count))


def test_patch_sizes() -> None:
    for name, patch in (("kontext", (1, 2, 2)), ("bria_fibo", (1, 1, 1)), ("hunyuan_image", (1, 1, 1))):
        assert architecture_of(zoo.CASES[name].build()).patch_size == patch
    assert architecture_of(zoo.hunyuan_image((2, 2))).patch_size == (1, 2, 2)
